"""Which tokens lose: the loss of a dense and a pruned model, by frequency of the token and by its place in the window.

Frequency is the rank of a token in the whole text that the windows are taken from (1 is the most frequent; equal counts
by token number), so that no other data are needed and a rank means the same for every model with this tokenizer.
Positions are counted from the start of the window, where there is no context yet, and put together by powers of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from secateur.report_result import GroupLoss

RANKS = (10, 100, 1000, 10_000)
"""Upper ends of the classes of frequency; the last class is all the rest."""


def frequency_ranks(tokens: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Rank of every token of a vocabulary by its count in a text, (vocabulary,) int64, from 1.

    Args:
        tokens: (n,) int64, the whole text.
    """
    counts = torch.bincount(tokens, minlength=vocabulary)
    ranks = torch.empty_like(counts)
    ranks[counts.argsort(descending=True, stable=True)] = torch.arange(1, len(counts) + 1)
    return ranks


def by_frequency(dense: torch.Tensor, pruned: torch.Tensor, ranks: torch.Tensor) -> list[GroupLoss]:
    """Losses by the rank of the true token; all (n,). Classes without a token are left out."""
    return [_group(label, dense[members], pruned[members]) for label, members in _classes(ranks) if bool(members.any())]


def by_position(dense: torch.Tensor, pruned: torch.Tensor, positions: torch.Tensor) -> list[GroupLoss]:
    """Losses by the number of tokens before the true one; all (n,), positions from 1."""
    groups = []
    low = 1
    while low <= int(positions.max()):
        members = (positions >= low) & (positions < 2 * low)
        label = f"{low}" if low == 1 else f"{low:,}-{2 * low - 1:,}"
        if bool(members.any()):
            groups.append(_group(label, dense[members], pruned[members]))
        low *= 2
    return groups


def _classes(ranks: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    low = 1
    for high in RANKS:
        yield f"{low:,}-{high:,}", (ranks >= low) & (ranks <= high)
        low = high + 1
    yield f"over {RANKS[-1]:,}", ranks >= low


def _group(label: str, dense: torch.Tensor, pruned: torch.Tensor) -> GroupLoss:
    difference = pruned - dense
    means = [float(values.mean()) for values in (dense, pruned, difference)]
    errors = [standard_error(values) for values in (dense, pruned, difference)]
    return GroupLoss(label, len(dense), *means, *errors)


def standard_error(values: torch.Tensor) -> float | None:
    """Of the mean, tokens taken as independent draws; None for a single one."""
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
