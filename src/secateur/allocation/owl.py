"""Blocks with more outliers among their scores are pruned less (outlier weighed layerwise sparsity).

Wanda's scores |W_ij|·a_j, a_j = sqrt(mean over tokens of x_j^2) in the dense model, of all matrices of a block are put
together. With O_b the share of them that are larger than ``outlier``·mean, block b gets the sparsity

    s_b = t - 2·spread·(O_b - min O) / (max O - min O)

where one t for all, found by bisection, makes the mean over all weights what was asked for, each s_b in [0, 0.95].
Where all blocks have the same O the rule is uniform.

One dense forward over the calibration data; one block of scores in memory. Source: Yin et al., "Outlier Weighed
Layerwise Sparsity (OWL)", 2024, section 3.2. The authors' code does not weigh blocks by their size, does not cut off at
0 or 1, and divides by zero where all O are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.allocation._base import Look, Need, Share, block_means, projected
from secateur.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Owl:
    """OWL."""

    name: ClassVar[str] = "owl"
    needs: ClassVar[Need] = "norms"

    outlier: float = 5.0
    """A score is an outlier when it is so many times the mean of its block."""
    spread: float = 0.08
    """Half the difference between the sparsities of the blocks with the fewest and the most outliers."""

    def __post_init__(self) -> None:
        if not self.outlier > 0:
            raise UsageError(f"outlier of owl is {self.outlier:g}", hint="it must be above 0; 5 is usual")
        if not 0 <= self.spread <= 0.5:
            raise UsageError(f"spread of owl is {self.spread:g}", hint="it must be in [0, 0.5]; 0.08 is usual")

    def measure(self, look: Look) -> Tensor:
        """Scores of one matrix, (out, in)."""
        if look.stats is None:
            raise ValueError("owl needs the norms of the inputs")
        return look.weight.abs() * look.stats.column_norms().to(look.weight.device)

    def of_block(self, measured: Sequence[Tensor]) -> Tensor:
        """Share of outliers among all scores of a block, a float64 scalar."""
        count = sum(scores.numel() for scores in measured)
        mean = sum(float(scores.sum(dtype=torch.float64)) for scores in measured) / count
        above = sum(int((scores > self.outlier * mean).sum()) for scores in measured)
        return torch.tensor(above / count, dtype=torch.float64)

    def allocate(self, shares: Sequence[Share], sparsity: float) -> dict[str, float]:
        """Sparsity of each, so that the mean weighted by size is ``sparsity``.

        Raises:
            SparsityError: when the sparsity is outside [0, 0.95].
        """
        outliers = block_means(shares)
        low, high = min(outliers.values(), default=0.0), max(outliers.values(), default=0.0)
        width = (high - low) or 1.0
        wanted = {one.name: -2 * self.spread * (outliers[one.block] - low) / width for one in shares}
        return projected(wanted, {one.name: one.size for one in shares}, sparsity)
