"""Prunes by weight times input norm, each output on its own.

Score S_ij = |W_ij|·a_j with a_j = sqrt(mean over tokens of x_j^2). In each row of W (r, c), e.g. (576, 1536), the
k = round(s·c) lowest scores go; for N:M the lowest of every M consecutive inputs. Kept weights are unchanged.

O(r·c) time, O(c) statistics. Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
2023, eq. 1. The authors' code prunes int(s·c) and takes the mean over samples rather than tokens, which does not
change the ranking inside a row.

The authors' code runs each block twice: the norms are those of the dense block on the inputs that really arrive, then
the pruned block gives the inputs of the next one. Running it once, each matrix seeing what its pruned predecessors make
(as everything else here), is as good for single weights and takes half the time. For N:M it is some percent worse in
perplexity, because no weight makes up for an error, and the result hangs on rounding besides: there two passes, and a
float32 forward, are the default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import UsageError
from secateur.methods._common import applied, check_weight, is_identity, never_seen, row_mask, unchanged
from secateur.patterns import Pattern
from secateur.plugins import Solved, StatisticsKind, Target
from secateur.statistics import InputStatistics


@dataclass(frozen=True, kw_only=True)
class Wanda:
    """Weights and activations."""

    name: ClassVar[str] = "wanda"
    statistics: ClassVar[StatisticsKind] = "norms"
    draws: ClassVar[bool] = False

    passes: str = "auto"
    """Forwards through each block: 1, or 2 as in the paper's code; auto is 2 for N:M, else 1."""

    def __post_init__(self) -> None:
        if str(self.passes) not in ("auto", "1", "2"):
            raise UsageError(f"passes of wanda is {self.passes}", hint="it must be auto, 1 or 2")

    def sees_dense_block(self, pattern: Pattern) -> bool:
        """Whether the statistics are to be those of the dense block."""
        return str(self.passes) == "2" or (str(self.passes) == "auto" and not pattern.unstructured)

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
            raise ValueError(f"wanda needs the norms of {weight.shape[1]} inputs")
        norms = stats.column_norms().to(weight.device)
        dead = int(stats.dead().sum())
        notes = []
        if dead == len(norms):
            # All scores would be zero, and the index alone would decide.
            norms = torch.ones_like(norms)
            notes.append(never_seen(stats))
        elif dead:
            notes.append(f"{dead} of {len(norms)} inputs are dead (always zero in the calibration data): pruned first")
        solved = applied(weight, row_mask(wanda_score(weight, norms), target))
        solved.notes.extend(notes)
        return solved


def wanda_score(weight: Tensor, norms: Tensor) -> Tensor:
    """|W_ij|·a_j.

    Args:
        weight: (out, in), e.g. (576, 1536).
        norms: a, (in,).
    """
    return weight.abs().mul_(norms)
