"""Prunes the smallest weights.

Score |W_ij|. The comparison group is the whole matrix (r, c), each row, or all matrices of the model together; of a
group of n weights the k = round(s·n) smallest go. For N:M the smallest of every M consecutive inputs. Kept weights are
unchanged. O(r·c) time; no calibration data. The global scope reads every matrix twice and holds one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import UnknownNameError
from secateur.methods._common import applied, check_weight, is_identity, matrix_mask, row_mask, unchanged
from secateur.methods._radix import lowest_counts
from secateur.plugins import Solved, StatisticsKind, Target
from secateur.statistics import InputStatistics

SCOPES = ("matrix", "row", "global")


@dataclass(frozen=True, kw_only=True)
class Magnitude:
    """Magnitude pruning."""

    name: ClassVar[str] = "magnitude"
    statistics: ClassVar[StatisticsKind] = "none"
    draws: ClassVar[bool] = False

    scope: str = "matrix"
    """Which weights are compared with each other: those of a matrix, of a row, or of the whole model (global)."""

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise UnknownNameError("scope of method magnitude", self.scope, SCOPES)

    def plan(self, names: Sequence[str], load: Callable[[str], Tensor], sparsity: float) -> dict[str, int] | None:
        """Zeros of each matrix under the global scope; None under the others, which need no plan.

        Exactly round(sparsity·total) weights go, the smallest |w| of all; of equal ones the earlier matrix and the
        lower index go first. ``load`` is called twice for each name, and one matrix is held at a time.

        Raises:
            WeightValueError: when a weight is NaN or infinite; the matrix is named.
        """
        return lowest_counts(names, load, sparsity) if self.scope == "global" else None

    def solve(
        self, weight: Tensor, stats: InputStatistics | None, target: Target, *, generator: torch.Generator
    ) -> Solved:
        """Prune one matrix. The global scope takes ``target.count`` from `plan`.

        Raises:
            WeightValueError: when a weight is NaN or infinite.
            PatternError: when M does not divide the columns.
        """
        check_weight(weight)
        if is_identity(target):
            return unchanged(weight)
        return applied(weight, magnitude_mask(weight, target, self.scope))


def magnitude_mask(weight: Tensor, target: Target, scope: str) -> Tensor:
    """Keep-mask, (out, in) bool, of the largest weights of each comparison group."""
    return (row_mask if scope == "row" else matrix_mask)(weight.abs(), target)
