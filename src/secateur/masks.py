"""Masks with exact counts. The lowest scores go; of equal scores the one with the lower index goes first.

A plain comparison with a threshold prunes too many on ties (zero weights, dead inputs), so the threshold is only the
first step here: what is equal to it is then counted out by index. Every function returns a mask of what is *kept*.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import WeightValueError

_PAIRWISE_GROUP = 8
"""Up to this many in a group, comparing all pairs is cheaper than sorting."""
_SAMPLED_SELECTION = 1 << 16
"""From this many scores on, the threshold is bracketed on a sample first."""
_SAMPLE = 1 << 12


def zero_count(sparsity: float, n: int) -> int:
    """Zeros among ``n`` weights at a sparsity: ``round(sparsity * n)``, an exact half going to the even number."""
    return round(sparsity * n)


def split_count(count: int, sizes: list[int]) -> list[int]:
    """Divide ``count`` zeros among groups in proportion to their sizes, by rounding down the running total.

    The shares add up to ``count`` and no share is larger than its group.
    """
    total = sum(sizes)
    shares, seen, given = [], 0, 0
    for size in sizes:
        seen += size
        until = count * seen // total
        shares.append(until - given)
        given = until
    return shares


def lowest_of_matrix(score: Tensor, k: int) -> Tensor:
    """Keep all but the ``k`` lowest scores of the whole matrix; indices count along the rows.

    Args:
        score: (rows, columns), e.g. |W| of (576, 1536).

    Returns:
        bool, the shape of ``score``, False at exactly ``k`` places.

    Raises:
        WeightValueError: when a score is NaN.
    """
    _refuse_nan(score)
    _check_count(k, score.numel())
    if k == 0 or k == score.numel():
        return torch.full_like(score, k == 0, dtype=torch.bool)
    threshold, below = _kth_smallest(score.reshape(-1), k)
    keep = score > threshold
    ties = score == threshold
    missing = k - below  # how many of the scores equal to the threshold must still go
    if missing < int(ties.sum()):
        keep |= _after_first(ties.reshape(1, -1), missing).reshape(score.shape)
    return keep


def lowest_per_row(score: Tensor, k: int) -> Tensor:
    """Keep all but the ``k`` lowest scores of each row.

    Args:
        score: (rows, columns), e.g. |W|·a of (576, 1536).

    Returns:
        bool, the shape of ``score``, False at exactly ``k`` places in every row.

    Raises:
        WeightValueError: when a score is NaN.
    """
    _refuse_nan(score)
    _check_count(k, score.shape[1])
    if k == 0 or k == score.shape[1]:
        return torch.full_like(score, k == 0, dtype=torch.bool)
    threshold = score.kthvalue(k, dim=1, keepdim=True).values
    keep = score > threshold
    surplus = score.shape[1] - k - keep.sum(dim=1)  # equal to the threshold, and to be kept
    rows = surplus.nonzero().squeeze(1)
    if len(rows):
        ties = score[rows] == threshold[rows]
        missing = ties.sum(dim=1, keepdim=True) - surplus[rows].unsqueeze(1)
        keep[rows] |= _after_first(ties, missing)
    return keep


def lowest_nm(score: Tensor, keep: int, group: int) -> Tensor:
    """Keep the ``keep`` highest of every ``group`` consecutive scores of a row.

    Args:
        score: (rows, columns), columns a multiple of ``group``.

    Returns:
        bool, the shape of ``score``.

    Raises:
        WeightValueError: when a score is NaN.
        ValueError: when ``group`` does not divide the columns.
    """
    rows, columns = score.shape
    if columns % group:
        raise ValueError(f"{columns} columns do not divide by {group}")
    grouped = score.reshape(rows * (columns // group), group).t()
    return lowest_of_columns(grouped, group - keep).t().reshape(rows, columns)


def lowest_of_columns(score: Tensor, k: int) -> Tensor:
    """Keep all but the ``k`` lowest scores of each column; made for few rows and many columns.

    Args:
        score: (group, n), e.g. (4, 1536).

    Returns:
        bool, the shape of ``score``, False at exactly ``k`` places in every column.

    Raises:
        WeightValueError: when a score is NaN.
    """
    _refuse_nan(score)
    group = score.shape[0]
    _check_count(k, group)
    if group > _PAIRWISE_GROUP:
        order = score.argsort(dim=0, stable=True)
        keep = torch.ones_like(score, dtype=torch.bool)
        return keep.scatter_(0, order[:k], False)
    score = score.contiguous()
    # lower[i] counts the scores that go before score i; the earlier of two equals goes first.
    lower = torch.zeros(score.shape, dtype=torch.int8, device=score.device)
    for i in range(1, group):
        first = score[:i] <= score[i]
        lower[i] += first.sum(dim=0, dtype=torch.int8)
        lower[:i] += ~first
    return lower >= k


def _kth_smallest(flat: Tensor, k: int) -> tuple[Tensor, int]:
    """The k-th smallest value (k from 1), and how many values are strictly below it."""
    low, high = _bracket(flat, k)
    below = 0
    candidates = flat
    if low is not None and high is not None:
        # Both ends are counted exactly, so a sample that misleads costs time and never changes the result.
        below_low = int((flat < low).sum())
        inside = flat[(flat >= low) & (flat <= high)]
        if below_low < k <= below_low + len(inside):
            below, candidates = below_low, inside
    threshold = candidates.kthvalue(k - below).values
    return threshold, below + int((candidates < threshold).sum())


def _bracket(flat: Tensor, k: int) -> tuple[Tensor | None, Tensor | None]:
    """Two values that very likely enclose the k-th smallest, from an evenly spaced sample."""
    n = flat.numel()
    if n < _SAMPLED_SELECTION:
        return None, None
    # A step that shares no factor with the row length walks over all columns.
    sample = flat[:: max(1, n // _SAMPLE) | 1].sort().values
    position = k / n * len(sample)
    margin = 4 * len(sample) ** 0.5  # eight standard deviations of the rank of a median
    low = sample[max(0, int(position - margin))] if position > margin else flat.amin()
    high = sample[int(position + margin)] if position + margin < len(sample) else flat.amax()
    return low, high


def _after_first(ties: Tensor, count: int | Tensor) -> Tensor:
    """True at the ties of each row that come after its first ``count`` ones."""
    return ties & (ties.cumsum(dim=1) > count)


def _check_count(k: int, n: int) -> None:
    if not 0 <= k <= n:
        raise ValueError(f"{k} zeros do not fit among {n} weights")


def _refuse_nan(score: Tensor) -> None:
    if score.numel() and bool(score.amin().isnan()):
        raise WeightValueError("a pruning score is NaN", hint="check the weights and the calibration data for NaN")
