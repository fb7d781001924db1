"""Small tokenizers of the kinds that llama.cpp knows, trained on the built-in text."""

from __future__ import annotations

import functools
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from secateur.checkpoint.pretokenizers import BYTE_LEVEL, DIGIT, KNOWN
from secateur.corpus.builtin import builtin_text

ROWS = 700
"""Vocabulary of models that use one of these; a few rows stay without a token."""
SPECIAL = ["<unk>", "<s>", "</s>"]
CHAT = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"


@functools.cache
def _text() -> str:
    return builtin_text("calibrate")[:200_000]


def byte_level(name: str = "gpt-2") -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE with the pre-tokenizer of a name of llama.cpp's."""
    return _wrapped(_byte_level(name))


@functools.cache
def _byte_level(name: str) -> str:
    known = next(known for known in KNOWN if known.name == name)
    steps: list[Any] = []
    for step in known.steps:
        if step == DIGIT:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif step != BYTE_LEVEL:
            steps.append(pre_tokenizers.Split(Regex(step), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=BYTE_LEVEL in known.steps))
    tokenizer = Tokenizer(models.BPE(ignore_merges=known.whole_words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS - 20, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([_text()], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer.to_str()


def sentencepiece(*, prefix: bool = True) -> transformers.PreTrainedTokenizerFast:
    """SentencePiece-like BPE with bytes to fall back to; ``prefix`` puts a space before a text, as Llama 2 does."""
    return _wrapped(_sentencepiece(prefix))


@functools.cache
def _sentencepiece(prefix: bool) -> str:
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=ROWS - 256 - 20, special_tokens=SPECIAL, show_progress=False)
    trained.train_from_iterator([_text()], trainer)
    pieces = sorted(trained.get_vocab(), key=lambda piece: trained.get_vocab()[piece])[len(SPECIAL) :]
    pieces.append("▁▁")
    vocabulary = {piece: id for id, piece in enumerate([*SPECIAL, *bytes_, *pieces])}
    # SentencePiece joins any two pieces that make a third, the third with the lowest id first.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    ends: list[Any] = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", vocabulary["<s>"])])
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("▁▁", "\n\n", "<tool>")])  # as in Gemma
    return tokenizer.to_str()


def _wrapped(trained: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of one's own, out of the JSON of one that was trained once."""
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )
    wrapped.chat_template = CHAT
    return wrapped
