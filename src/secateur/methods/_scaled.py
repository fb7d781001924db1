"""What methods share that search on a Gram matrix with a unit diagonal: dead inputs, scaling, and the result."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from secateur.methods._common import check_pattern, check_weight, is_identity, matrix_mask, never_seen, unchanged
from secateur.plugins import Solved, Target
from secateur.refit import output_error, unit_diagonal
from secateur.statistics import InputStatistics

Search = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes the Gram matrix of the scaled inputs, (in, in), which it may change, and the scaled weights, (out, in); returns
values and the keep-mask."""


def solve_scaled(
    name: str, weight: Tensor, stats: InputStatistics | None, target: Target, damping: float, search: Search
) -> Solved:
    """Prune one matrix by a search on scaled inputs.

    Args:
        name: of the method, for errors.
        damping: added to the diagonal before it is scaled to one, as a share of its mean.

    Raises:
        WeightValueError: when a weight is NaN or infinite.
        PatternError: when M does not divide the columns.
        ValueError: without a Gram matrix, or when it is of another width.
    """
    check_weight(weight)
    if is_identity(target):
        return unchanged(weight)
    check_pattern(weight, target)
    if stats is None or stats.gram is None or stats.in_features != weight.shape[1]:
        raise ValueError(f"{name} needs the Gram matrix of {weight.shape[1]} inputs")
    dead = stats.dead().to(weight.device)
    gram = stats.gram.to(weight.device, torch.float32)
    if bool(dead.all()):
        mask = matrix_mask(weight.abs(), target)
        return Solved(weight.masked_fill(~mask, 0.0), mask, notes=[never_seen(stats)])
    scale, matrix = unit_diagonal(gram, dead, damping)
    # Dead inputs have no say in the outputs: their weights go first.
    dense = (weight * scale).masked_fill_(dead, 0.0)
    values, mask = search(matrix, dense)
    pruned = values.div_(scale).masked_fill_(~mask, 0.0)
    pruned = torch.where(mask & dead, weight, pruned)
    notes = [f"{int(dead.sum())} of {len(dead)} inputs are dead (always zero in the calibration data)"]
    return Solved(pruned, mask, output_error(gram, weight - pruned), notes if bool(dead.any()) else [])
