"""Peak memory against depth, and for a model larger than its own peak.

Random Llama models are made on disk tensor by tensor. Peak resident memory is what the kernel reports for the whole
`secateur prune` process. An 8-block model and its 32-block sibling show that memory does not grow with depth; the shape
of TinyLlama 1.1B (2.2 GB in bfloat16) shows that a model needs less memory than its own file takes.

    python benchmarks/memory.py [--only depth,large]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import _common
import torch
import transformers

DEPTH = {
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
}
TINYLLAMA = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_hidden_layers": 22,
}


def make_model(folder: Path, text: Path, **shape: Any) -> Path:
    """Write a random Llama in bfloat16 without ever holding it, and a tokenizer trained on the text."""
    from accelerate import init_empty_weights
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from secateur.checkpoint.writer import CheckpointWriter, layout_for

    config = transformers.LlamaConfig(
        max_position_embeddings=2048, tie_word_embeddings=False, dtype="bfloat16", **shape
    )
    config.architectures = ["LlamaForCausalLM"]
    with init_empty_weights():
        skeleton = transformers.LlamaForCausalLM(config)
    entries = [(name, torch.bfloat16, tuple(p.shape)) for name, p in skeleton.named_parameters()]
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    with CheckpointWriter(folder, layout_for(entries)) as writer:
        for name, dtype, size in entries:
            values = torch.ones(size) if "norm" in name else torch.randn(size, generator=generator) * 0.02
            writer.write(name, values.to(dtype))
        writer.finish()
    config.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator([text.read_text()], trainers.BpeTrainer(vocab_size=4096))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def prune(folder: Path, samples: int, length: int) -> dict[str, Any]:
    """Prune by SparseGPT; time and peak memory of the process."""
    out = folder.with_name(folder.name + "-pruned")
    arguments = ["prune", str(folder), "-o", str(out), "--method", "sparsegpt", "--samples", str(samples), "--quiet"]
    arguments += ["--sequence-length", str(length), "--no-refit", "--no-verify", "--no-evaluate", "--json"]
    measured = _common.secateur(*arguments)
    sparsity = json.loads(measured.stdout)["sparsity"]
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {
        "file MB": size / 1e6,
        "peak MB": measured.peak_rss_bytes / 1e6,
        "seconds": measured.seconds,
        "sparsity": sparsity,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="depth,large")
    only = parser.parse_args().only.split(",")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        from secateur.corpus.load import load_text

        text = Path(scratch) / "text.txt"
        text.write_text(load_text("builtin", "calibration").text)
        if "depth" in only:
            for blocks in (8, 32):
                folder = make_model(Path(scratch) / f"blocks{blocks}", text, num_hidden_layers=blocks, **DEPTH)
                rows.append({"model": f"random, {blocks} blocks of 768", "tokens": "8x512", **prune(folder, 8, 512)})
            rows[-1]["against 8 blocks"] = rows[-1]["peak MB"] / rows[-2]["peak MB"]
        if "large" in only:
            folder = make_model(Path(scratch) / "large", text, **TINYLLAMA)
            rows.append({"model": "random, TinyLlama 1.1B shape", "tokens": "8x512", **prune(folder, 8, 512)})
    _common.store("memory", " ".join(__doc__.split("\n\n")[1].split()), rows)


if __name__ == "__main__":
    main()
