"""Prunes weights at random: the floor that every other method must beat.

A uniformly drawn set of exactly k = round(s·r·c) weights of the (r, c) matrix goes; N:M draws in each group. Kept
weights are unchanged. O(r·c) time and memory; no calibration data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.methods._common import applied, check_weight, is_identity, matrix_mask, unchanged
from secateur.plugins import Solved, StatisticsKind, Target
from secateur.statistics import InputStatistics


@dataclass(frozen=True, kw_only=True)
class Random:
    """Random pruning. It has no options; the seed of the run decides."""

    name: ClassVar[str] = "random"
    statistics: ClassVar[StatisticsKind] = "none"
    draws: ClassVar[bool] = True

    def solve(
        self, weight: Tensor, stats: InputStatistics | None, target: Target, *, generator: torch.Generator
    ) -> Solved:
        """Prune one matrix.

        Raises:
            WeightValueError: when a weight is NaN or infinite.
            PatternError: when M does not divide the columns.
        """
        check_weight(weight)
        if is_identity(target):
            return unchanged(weight)
        return applied(weight, matrix_mask(random_score(weight, generator), target))


def random_score(weight: Tensor, generator: torch.Generator) -> Tensor:
    """One draw from [0, 1) for each weight; the same numbers whatever the device of the weight."""
    draw = torch.rand(weight.shape, generator=generator, device=generator.device, dtype=torch.float32)
    return draw.to(weight.device)
