"""Prunes by relative importance times input norm: what is large beside its own row and column goes last.

Score S_ij = (|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|)·a_j^alpha, a_j = sqrt(mean over tokens of x_j^2). Of the
whole matrix W (r, c), e.g. (576, 1536), the k = round(s·r·c) lowest scores go, or of each row the round(s·c) lowest;
for N:M the lowest of every M consecutive inputs. A row or column of zeros has score 0. Kept weights are unchanged; with
``--refit`` they are solved anew.

O(r·c) time, O(c) statistics. Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large
Language Models", 2024, eq. 4. The channel permutation of that paper is no part of the method: ``--permute`` does it
for every method where it can be folded into the stored model; elsewhere a gather before each matrix would be needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import UnknownNameError, UsageError
from secateur.methods._common import applied, check_weight, is_identity, matrix_mask, never_seen, row_mask, unchanged
from secateur.plugins import Solved, StatisticsKind, Target
from secateur.statistics import InputStatistics

SCOPES = ("matrix", "row")


@dataclass(frozen=True, kw_only=True)
class Ria:
    """Relative importance and activations."""

    name: ClassVar[str] = "ria"
    statistics: ClassVar[StatisticsKind] = "norms"
    draws: ClassVar[bool] = False

    power: float = 0.5
    """The power alpha of the input norm; 0 ignores the inputs, 1 weighs them as wanda does."""
    scope: str = "matrix"
    """Which weights are compared with each other: those of a matrix, or of a row."""

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise UnknownNameError("scope of method ria", self.scope, SCOPES)
        if not 0 <= self.power <= 2:
            raise UsageError(f"power of ria is {self.power:g}", hint="it must be in [0, 2]; 0.5 is usual")

    def solve(
        self, weight: Tensor, stats: InputStatistics | None, target: Target, *, generator: torch.Generator
    ) -> Solved:
        """Prune one matrix.

        Raises:
            WeightValueError: when a weight is NaN or infinite.
            PatternError: when M does not divide the columns.
            ValueError: without statistics, or when they are of another width.
        """
        check_weight(weight)
        if is_identity(target):
            return unchanged(weight)
        if stats is None or stats.in_features != weight.shape[1]:
            raise ValueError(f"ria needs the norms of {weight.shape[1]} inputs")
        dead = stats.dead().to(weight.device)
        count = int(dead.sum())
        if count == len(dead):
            return Solved(*_magnitude(weight, target), notes=[never_seen(stats)])
        # A power of 0 would bring dead inputs back.
        norms = stats.column_norms().to(weight.device).pow(self.power).masked_fill(dead, 0.0)
        score = ria_score(weight, norms)
        solved = applied(weight, row_mask(score, target) if self.scope == "row" else matrix_mask(score, target))
        if count:
            solved.notes.append(
                f"{count} of {len(dead)} inputs are dead (always zero in the calibration data): pruned first"
            )
        return solved


def ria_score(weight: Tensor, norms: Tensor) -> Tensor:
    """The score of each weight.

    Args:
        weight: (out, in), e.g. (576, 1536).
        norms: a^alpha, (in,).
    """
    size = weight.abs()
    tiny = torch.finfo(weight.dtype).tiny
    across, along = (size.sum(dim=dim, keepdim=True).clamp_min(tiny) for dim in (1, 0))
    return (size / across + size / along).mul_(norms)


def _magnitude(weight: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    solved = applied(weight, matrix_mask(weight.abs(), target))
    return solved.weight, solved.mask
