"""Training data: windows of a text or labelled texts, divided once into what is trained on and what is held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset

from secateur.errors import CalibrationError, UsageError


@dataclass(frozen=True)
class Split:
    """Indices of the examples to train on and of those held out."""

    train: list[int]
    held_out: list[int]


def split(count: int, share: float, *, shuffle: bool, seed: int) -> Split:
    """Hold out ``round(share * count)`` examples, at least one when ``share`` is not 0.

    Windows of a running text are neighbours, so its end is held out; labelled texts are independent and drawn.

    Raises:
        CalibrationError: when nothing would be left to train on.
    """
    apart = max(1, round(share * count)) if share else 0
    if apart >= count:
        raise CalibrationError(
            f"{count} examples are too few to hold out {apart} of them", hint="give more data, or --held-out 0"
        )
    order = list(range(count))
    if shuffle:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return Split(order[: count - apart], order[count - apart :])


class Answers(Protocol):
    """What a teacher says about each window."""

    def __getitem__(self, window: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Classes (tokens, k) int64 and their log-probabilities (tokens, k) float32 of one window."""


class Windows(Dataset[dict[str, Any]]):
    """Windows of a text, each with its number, by which the teacher's answer is found."""

    def __init__(self, windows: torch.Tensor, indices: Sequence[int], teacher: Answers | None = None) -> None:
        self._windows, self._indices, self._teacher = windows, list(indices), teacher

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = self._indices[position]
        item: dict[str, Any] = {"input_ids": self._windows[index]}
        if self._teacher is not None:
            item["teacher_ids"], item["teacher_log_probabilities"] = self._teacher[index]
        return item


def stack(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of windows: all have one length."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


class Texts(Dataset[dict[str, Any]]):
    """Tokenised texts of different lengths, with their labels where there are any."""

    def __init__(self, tokens: Sequence[list[int]], labels: Sequence[int] | None, indices: Sequence[int]) -> None:
        self._tokens, self._labels, self._indices = tokens, labels, list(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = self._indices[position]
        item: dict[str, Any] = {"input_ids": self._tokens[index]}
        if self._labels is not None:
            item["labels"] = self._labels[index]
        return item


class Pad:
    """Makes a batch of texts: padded on the right to the longest, with the mask that says where they end."""

    def __init__(self, pad_token: int) -> None:
        self._pad = pad_token

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(item["input_ids"]) for item in items)
        ids = torch.full((len(items), longest), self._pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, item in enumerate(items):
            length = len(item["input_ids"])
            ids[row, :length] = torch.tensor(item["input_ids"])
            mask[row, :length] = 1
        batch = {"input_ids": ids, "attention_mask": mask}
        if "labels" in items[0]:
            batch["labels"] = torch.tensor([item["labels"] for item in items])
        return batch


def steps_for(tokens: int, batch_size: int, length: int) -> int:
    """Optimiser steps that a budget pays for, rounded down.

    Raises:
        UsageError: when it does not pay for one.
    """
    steps = tokens // (batch_size * length)
    if steps < 1:
        raise UsageError(
            f"--tokens {tokens:,} allows no step: one takes {batch_size} x {length:,} = {batch_size * length:,} tokens",
            hint="give a larger budget, or a smaller --batch-size or --sequence-length",
        )
    return steps
