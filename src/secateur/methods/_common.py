"""What every method does before its own work."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import WeightValueError
from secateur.masks import lowest_nm, lowest_of_matrix, lowest_per_row, split_count, zero_count
from secateur.plugins import Solved, Target
from secateur.statistics import InputStatistics


def never_seen(stats: InputStatistics) -> str:
    """Why a matrix all of whose inputs are dead is pruned by magnitude; an expert that no token was sent to, mostly."""
    if stats.tokens == 0:
        return "no calibration token reached this matrix: pruned by magnitude"
    return "all its inputs are zero in the calibration data: pruned by magnitude"


def check_weight(weight: Tensor) -> None:
    """Refuse what no method can prune.

    Raises:
        WeightValueError: when a weight is NaN or infinite.
        ValueError: when the weight is not a float32 matrix.
    """
    if weight.ndim != 2 or weight.dtype != torch.float32:
        raise ValueError(f"expected a float32 matrix, got {weight.dtype} of {tuple(weight.shape)}")
    if weight.numel():
        low, high = torch.aminmax(weight)  # both carry NaN on, so no mask of the whole matrix is needed
        if not bool(low.isfinite() & high.isfinite()):
            raise WeightValueError("the weights hold NaN or infinity", hint="the source is damaged; get it anew")


def is_identity(target: Target) -> bool:
    """Whether nothing at all is asked for."""
    return target.count == 0 or (target.count is None and target.sparsity == 0)


def unchanged(weight: Tensor) -> Solved:
    """The result of an identity target."""
    return Solved(weight.clone(), torch.ones_like(weight, dtype=torch.bool), loss=0.0)


def applied(weight: Tensor, keep: Tensor) -> Solved:
    """Zero what is not kept; the kept weights stay bit-equal."""
    return Solved(weight.masked_fill(~keep, 0.0), keep)  # a product would leave negative zeros


def matrix_mask(score: Tensor, target: Target) -> Tensor:
    """Keep-mask with the whole matrix as comparison group, or N:M."""
    check_pattern(score, target)
    if not target.pattern.unstructured:
        return lowest_nm(score, target.pattern.keep, target.pattern.group)
    return lowest_of_matrix(score, total_count(target, score.numel()))


def row_mask(score: Tensor, target: Target) -> Tensor:
    """Keep-mask with each row as comparison group, or N:M. A given count is spread evenly over the rows."""
    check_pattern(score, target)
    rows, columns = score.shape
    if not target.pattern.unstructured:
        return lowest_nm(score, target.pattern.keep, target.pattern.group)
    if target.count is None:
        return lowest_per_row(score, zero_count(target.sparsity, columns))
    counts = torch.tensor(split_count(target.count, [columns] * rows), device=score.device)
    keep = torch.empty_like(score, dtype=torch.bool)
    for count in counts.unique().tolist():  # at most two, next to each other
        chosen = counts == count
        keep[chosen] = lowest_per_row(score[chosen], count)
    return keep


def total_count(target: Target, n: int) -> int:
    """Zeros among ``n`` weights that form one comparison group, or the count that was given."""
    return zero_count(target.sparsity, n) if target.count is None else target.count


def check_pattern(weight: Tensor, target: Target) -> None:
    """Refuse a target that contradicts itself or does not fit the matrix.

    Raises:
        PatternError: when M does not divide the columns.
        ValueError: when a count comes with N:M, or is larger than the matrix.
    """
    target.pattern.check_divides("a matrix", weight.shape[1])
    if target.count is not None and not target.pattern.unstructured:
        raise ValueError(f"a count cannot be given together with pattern {target.pattern}")
    if target.count is not None and not 0 <= target.count <= weight.numel():
        raise ValueError(f"{target.count} zeros do not fit in {tuple(weight.shape)}")
