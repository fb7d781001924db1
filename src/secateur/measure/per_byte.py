"""Bits per byte: the loss on a text by its bytes, which models of different vocabularies can be compared by"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from secateur.errors import CalibrationError
from secateur.measure.perplexity import perplexity
from secateur.progress import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_LONGER = "give a larger --sequence-length"


@dataclass(frozen=True)
class PerByte:
    """Loss of each passage and of all."""

    bits: tuple[float, ...]
    """Of each passage together."""
    nbytes: tuple[int, ...]
    """Of the UTF-8 of each passage behind its first token, which nothing predicts."""

    @property
    def by_passage(self) -> tuple[float, ...]:
        """Bits per byte of each."""
        return tuple(bits / count for bits, count in zip(self.bits, self.nbytes, strict=True))

    @property
    def bits_per_byte(self) -> float:
        """Of all together."""
        return sum(self.bits) / sum(self.nbytes)


@dataclass(frozen=True)
class Passages:
    """What windows of tokens stand for in their text."""

    texts: tuple[str, ...]
    nbytes: tuple[int, ...]
    """Of each behind its first token."""


def passages(text: str, tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> Passages:
    """The passages of a text that the windows of a tokenizer cover; see `secateur.corpus.windows.windows`.

    A character that two windows share, each having some of its bytes, counts in both.

    Args:
        length: tokens in a window.
        count: of windows, at most as many as the text has.

    Raises:
        CalibrationError: when the tokenizer does not know where its tokens stand, or a window is one character.
    """
    places = _places(text, tokenizer)
    texts, nbytes = [], []
    for first in range(0, count * length, length):
        window = places[first : first + length]
        texts.append(text[window[0][0] : window[-1][1]])
        nbytes.append(_bytes(text, window))
    return Passages(tuple(texts), tuple(nbytes))


def of_windows(by_window: Sequence[float], length: int, found: Passages) -> PerByte:
    """Bits per byte of a model whose windows the passages are.

    Args:
        by_window: nats per token in each window, as `secateur.measure.perplexity.perplexity` gives them.
        length: tokens in a window.
    """
    return PerByte(tuple(nats * (length - 1) / math.log(2) for nats in by_window), found.nbytes)


def of_passages(
    model: Any, tokenizer: PreTrainedTokenizerBase, found: Sequence[str], *, longest: int,
    reporter: Reporter | None = None,
) -> PerByte:  # fmt: skip
    """Bits per byte of a model with another vocabulary, on the same passages.

    As with perplexity, every token but the first of a passage is predicted from those before it.

    Args:
        longest: most tokens that the model takes; a passage with more is cut there, and so are its bytes.

    Raises:
        CalibrationError: when the tokenizer does not know where its tokens stand, or makes a passage one token.
        RunError: when the model gives NaN.
    """
    reporter = reporter or Reporter()
    reporter.stage("bits per byte", len(found))
    bits, nbytes = [], []
    for text in found:
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:longest]
        places = _places(text, tokenizer)[: len(tokens)]
        if len(tokens) < 2:
            raise CalibrationError("a passage is a single token", hint=_LONGER)
        measured = perplexity(model, torch.tensor([tokens]))
        bits.append(measured.nll_per_token * measured.tokens / math.log(2))
        nbytes.append(_bytes(text, places))
        reporter.advance()
    return PerByte(tuple(bits), tuple(nbytes))


def _places(text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """First character of every token, and the one behind its last."""
    if not tokenizer.is_fast:
        raise CalibrationError(f"{type(tokenizer).__name__} does not know where its tokens stand in a text")
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [(int(first), int(last)) for first, last in found["offset_mapping"]]


def _bytes(text: str, places: Sequence[tuple[int, int]]) -> int:
    """Bytes behind the first of some tokens."""
    count = len(text[places[0][1] : places[-1][1]].encode())
    if not count:
        raise CalibrationError("a window is a single character", hint=_LONGER)
    return count
