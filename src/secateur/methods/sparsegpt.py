"""Prunes column by column, and lets the columns that follow make up for each error (blocked optimal brain surgery).

Minimises |X (W - Q)^T|^2 = sum over rows of (w - q) H (w - q)^T with H = X^T X + lambda·I, W (r, c) the dense and Q the
pruned matrix. With R upper triangular, R R^T = H (`secateur.linalg`), this is |(W - Q) R|^2, and column j of (W - Q) R
depends on the columns up to j only. Hence, with the columns before j fixed, the best value of column j is

    v_j = w_j + sum_{i<j} (w_i - q_i) R_ij / R_jj

and pruning entry (n, j) costs (v_nj·R_jj)^2: its score. Columns go in blocks B:

1. v_B = w_B + (W - Q)_{<B} R_{<B,B} U_BB with U_BB = R_BB^-1: the best values given all blocks before.
2. Mask: the round(s·r·|B|) lowest scores of the whole block go. For N:M the mask is chosen group by group instead,
   from values that know the errors of all columns before the group.
3. For j in B: q_j = keep_j·v_j; e_j = (v_j - q_j)·R_jj; v_{j'} -= U_jj'·e_j for the later j' in B.

O(c^3 / 3 + r·c^2) time; one c·c float32 factor, shared by all matrices with the same input, and one copy of W.
Source: Frantar and Alistarh, "SparseGPT", 2023, algorithm 1, which works on U = R^-1 for all columns, updates
everything to the right of a block, and zeroes the inputs that are always zero. Step 1 gives the same values out of R
alone, which saves the inversion. Inputs that are always zero get score 0 here, so they are pruned first; when there
are more of them than weights to prune, the rest stay, because the count is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import UsageError
from secateur.linalg import Factor, inverse_block
from secateur.masks import lowest_of_columns, lowest_of_matrix, split_count, zero_count
from secateur.methods._common import check_pattern, check_weight, is_identity, never_seen, unchanged
from secateur.plugins import Solved, StatisticsKind, Target
from secateur.statistics import InputStatistics

_STRIP = 32
"""Columns whose errors are spread one by one; over the rest of the block they are spread by one product."""


@dataclass(frozen=True, kw_only=True)
class SparseGPT:
    """SparseGPT."""

    name: ClassVar[str] = "sparsegpt"
    statistics: ClassVar[StatisticsKind] = "gram"
    draws: ClassVar[bool] = False

    block_size: int = 128
    """Columns whose weights are compared with each other."""
    damping: float = 0.01
    """Added to the diagonal of the Gram matrix, as a share of its mean; raised tenfold where that is not enough."""

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise UsageError(f"block_size of sparsegpt is {self.block_size}", hint="it must be at least 1")
        if not 0 <= self.damping <= 1:
            raise UsageError(f"damping of sparsegpt is {self.damping:g}", hint="it must be in [0, 1]; 0.01 is usual")

    def solve(
        self, weight: Tensor, stats: InputStatistics | None, target: Target, *, generator: torch.Generator
    ) -> Solved:
        """Prune one matrix.

        Raises:
            WeightValueError: when a weight is NaN or infinite.
            PatternError: when M does not divide the columns.
            CalibrationError: when the Gram matrix cannot be factorised.
            ValueError: without a Gram matrix, or when it is of another width.
        """
        check_weight(weight)
        if is_identity(target):
            return unchanged(weight)
        check_pattern(weight, target)
        if stats is None or stats.in_features != weight.shape[1]:
            raise ValueError(f"sparsegpt needs the Gram matrix of {weight.shape[1]} inputs")
        factor = stats.factor(self.damping)
        dead = stats.dead().to(weight.device)
        notes = list(factor.notes)
        if bool(dead.all()):
            # The factor is a multiple of the identity, so without a zero score for all the scores are magnitudes.
            dead = torch.zeros_like(dead)
            notes = [never_seen(stats)]
        solved = sparsegpt(weight, factor, dead, target, self.block_size)
        solved.notes.extend(notes)
        return solved


def sparsegpt(weight: Tensor, factor: Factor, dead: Tensor, target: Target, block_size: int) -> Solved:
    """Prune one matrix given the factor of its inputs.

    Args:
        weight: W, (out, in) float32, e.g. (576, 1536); not changed.
        factor: of H, (in, in).
        dead: inputs whose weights are pruned first, (in,) bool.
    """
    rows, columns = weight.shape
    upper = factor.upper.to(weight.device)
    group = target.pattern.group
    if group:
        block_size = max(group, block_size // group * group)
    starts = range(0, columns, block_size)
    counts = _block_counts(target, rows, [min(block_size, columns - start) for start in starts])

    # Columns are worked on one by one, so they lie as rows here. Finished blocks hold W - Q instead of W.
    work = weight.t().clone(
        memory_format=torch.contiguous_format
    )  # a copy even where the weight is itself a turned one
    pruned_weight = torch.empty((rows, columns), dtype=weight.dtype, device=weight.device)
    keep = torch.empty((rows, columns), dtype=torch.bool, device=weight.device)
    loss = torch.zeros((), dtype=torch.float64)
    for start, count in zip(starts, counts, strict=True):
        stop = min(start + block_size, columns)
        inverse = inverse_block(factor, start, stop).to(weight.device)
        values = work[start:stop].clone()
        if start:
            values.addmm_(inverse.t(), upper[:start, start:stop].t() @ work[:start])
        scale = upper.diagonal()[start:stop].unsqueeze(1)
        score_scale = scale.masked_fill(dead[start:stop].unsqueeze(1), 0.0)
        if group:
            keep_block, errors = _solve_groups(values, scale, score_scale, inverse, target.pattern.keep, group)
        else:
            keep_block = lowest_of_matrix((values * score_scale).square_().t(), count).t()
            errors = _solve_masked(values, scale, inverse, keep_block)
        values.masked_fill_(~keep_block, 0.0)
        pruned_weight[:, start:stop] = values.t()
        keep[:, start:stop] = keep_block.t()
        work[start:stop] -= values
        loss += _undamped_loss(errors, work[start:stop], factor.added[start:stop])
    return Solved(pruned_weight, keep, loss=max(0.0, float(loss)))


def _block_counts(target: Target, rows: int, widths: list[int]) -> list[int]:
    """Zeros in each block of columns."""
    sizes = [rows * width for width in widths]
    if target.count is not None:
        return split_count(target.count, sizes)
    return [zero_count(target.sparsity, size) for size in sizes]


def _solve_masked(values: Tensor, scale: Tensor, inverse: Tensor, keep: Tensor) -> Tensor:
    """Step 3 with a given mask. ``values`` (block, out) become those each column had when its turn came.

    Returns:
        The errors e, (block, out).
    """
    # e_j = v_j·R_jj where pruned, else 0; the factor is the same for the whole block.
    errors = scale * ~keep
    width = values.shape[0]
    for start in range(0, width, _STRIP):
        stop = min(start + _STRIP, width)
        _spread(values, errors, inverse, start, stop)
        if stop < width:
            values[stop:].addmm_(inverse[start:stop, stop:].t(), errors[start:stop], alpha=-1)
    return errors


def _solve_groups(
    values: Tensor, scale: Tensor, score_scale: Tensor, inverse: Tensor, keep: int, group: int
) -> tuple[Tensor, Tensor]:
    """Step 3 for N:M: each group of ``group`` columns chooses its mask when its turn comes.

    Returns:
        The mask and the errors e, both (block, out).
    """
    mask = torch.empty_like(values, dtype=torch.bool)
    errors = torch.empty_like(values)
    for start in range(0, values.shape[0], group):
        stop = start + group
        if start:
            values[start:stop].addmm_(inverse[:start, start:stop].t(), errors[:start], alpha=-1)
        score = (values[start:stop] * score_scale[start:stop]).square_()
        mask[start:stop] = lowest_of_columns(score, group - keep)
        errors[start:stop] = scale[start:stop] * ~mask[start:stop]
        _spread(values, errors, inverse, start, stop)
    return mask, errors


def _spread(values: Tensor, errors: Tensor, inverse: Tensor, start: int, stop: int) -> None:
    """Fix the columns ``start`` to ``stop`` one by one; ``errors`` holds R_jj where pruned and becomes e."""
    for j in range(start, stop):
        if j > start:
            values[j].addmv_(errors[start:j].t(), inverse[start:j, j], alpha=-1)
        errors[j] *= values[j]


def _undamped_loss(errors: Tensor, difference: Tensor, added: Tensor) -> Tensor:
    """|(W - Q) R|^2 of a block without what was added to the diagonal of H, as a float64 scalar on the CPU."""
    squares = difference.square().sum(dim=1).cpu().double()
    return errors.square().sum(dim=1).cpu().double().sum() - (squares * added.cpu()).sum()
