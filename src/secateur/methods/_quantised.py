"""A method whose kept weights are rounded to few bits, each error made good by the other weights of its row.

Minimises (D - W) H (D - W)^T for each row, H = X^T X + lambda·I, over the D whose kept weights are codes times scales
(`secateur.quantise`) and whose other weights are zero. The mask is that of the method; D starts with its weights
rounded to nearest, then cyclic coordinate descent goes over the columns, ``PASSES`` times: with all others fixed, the
best value of column j is

    v_j = d_j - (G_j / H_jj),    G = (D - W) H,    d_j = scale·round(v_j / scale) where kept, else 0

for all rows at once, so no step makes the error larger. Scales stay, and so does the largest code of each group: then a
group is its own rounding in the sparse format, and `export --format sparse` with the same bits and group size loses
nothing. A row keeps what was rounded to nearest where that has the smaller error of the outputs, without lambda.

O(PASSES·r·c^2) time, mostly in products of whole groups of columns; five copies of W. Source: Behdin et
al., "QuantEase", 2023 (arXiv 2309.01885), with a mask; Frantar and Alistarh, "SparseGPT", 2023, section 3.5, round
within their sweep instead, whose errors also go to weights that are pruned later and are lost there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from secateur.errors import UsageError
from secateur.methods._refitted import Refitted, name_of
from secateur.patterns import Pattern
from secateur.plugins import Method, Solved, StatisticsKind, Target, sees_dense_block
from secateur.quantise import LIMITS, expand_scales, settled
from secateur.refit import DAMPING, row_errors
from secateur.statistics import InputStatistics

PASSES = 3
"""Of coordinate descent over the columns."""


def with_bits(method: Method, bits: int | None, group_size: int) -> Method:
    """The method with its kept weights rounded; without bits the method itself.

    Raises:
        UsageError: when it has no Gram matrix, which says how errors are made good.
    """
    if bits is None:
        return method
    if method.statistics != "gram":
        raise UsageError(
            f"--bits needs the Gram matrix of the inputs, which {name_of(method)} does not gather",
            hint="add --refit, or use --method sparsegpt or alps",
        )
    made: Any = Quantised(method, bits, group_size)
    return cast("Method", made)


def bare(method: Method) -> Method:
    """The method without what comes after it."""
    while isinstance(method, Quantised | Refitted):
        method = method.method
    return method


@dataclass(frozen=True)
class Quantised:
    """A method, and then its kept weights in few bits."""

    statistics: ClassVar[StatisticsKind] = "gram"
    method: Method
    bits: int
    group_size: int
    """Columns that share a scale."""

    def sees_dense_block(self, pattern: Pattern) -> bool:
        """As the method says."""
        return sees_dense_block(self.method, pattern)

    def plan(self, names: Sequence[str], load: Callable[[str], Tensor], sparsity: float) -> dict[str, int] | None:
        """Zeros of each matrix, where the method fixes them over the whole model."""
        planner = getattr(self.method, "plan", None)
        return None if planner is None else planner(names, load, sparsity)

    def around(self, method: Method) -> Quantised:
        """The same for another method, such as that for a matrix that no token reached."""
        return dataclasses.replace(self, method=method)

    def solve(
        self, weight: Tensor, stats: InputStatistics | None, target: Target, *, generator: torch.Generator
    ) -> Solved:
        """Prune one matrix and round what stays; to nearest, where nothing is known of the inputs.

        Raises:
            SecateurError: whatever the method refuses.
        """
        known = None if self.method.statistics == "none" else stats
        solved = self.method.solve(weight, known, target, generator=generator)
        nearest = rounded(solved.weight, self.bits, self.group_size)
        made: dict[str, Any] = {"weight": nearest, "loss_before_rounding": solved.loss}
        if stats is not None and stats.gram is not None and not bool(stats.dead().all()):
            gram = stats.gram.to(weight.device)
            keep = solved.mask & (solved.weight != 0)  # what is zero already stays zero
            lower = descend(weight, solved.weight, keep, gram, self.bits, self.group_size)
            errors = [row_errors(gram, weight - one) for one in (nearest, lower)]
            better = errors[1] < errors[0]
            made["weight"] = torch.where(better.to(weight.device)[:, None], lower, nearest)
            made["loss"] = float(torch.where(better, errors[1], errors[0]).sum())
        return dataclasses.replace(solved, **made)


def rounded(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Each weight to the nearest of the grid of its group, (out, in) float32; zeros stay zero."""
    codes, scales = settled(weight, bits, group_size)
    return _product(codes.float(), expand_scales(scales, weight.shape[1], group_size))


def descend(
    weight: Tensor, pruned: Tensor, mask: Tensor, gram: Tensor, bits: int, group_size: int, passes: int = PASSES
) -> Tensor:
    """The weights on the grid, by coordinate descent from those rounded to nearest.

    Args:
        weight: W, the dense matrix, (out, in) float32, e.g. (576, 1536).
        pruned: what the method made of it, (out, in), zero outside the mask: the scales are found on it.
        mask: True where a weight is kept, (out, in) bool.
        gram: X^T X, (in, in) float32.
        bits: 8 or 4.
        group_size: columns that share a scale.

    Returns:
        D, (out, in) float32.
    """
    rows, columns = weight.shape
    added = DAMPING * float(gram.diagonal().mean())
    diagonal = gram.diagonal() + added
    numbers, found = settled(pruned, bits, group_size)
    # Columns are worked on one by one, so they lie as rows here.
    codes = numbers.t().float().contiguous()
    scales = expand_scales(found, columns, group_size).expand(rows, columns).t().contiguous()
    keep = (mask.t() & (scales != 0)).contiguous()
    values = codes * scales
    difference = values - weight.t()
    gradient = torch.addmm(difference, gram, difference, beta=added)
    del difference
    low, high = LIMITS[bits]
    for _ in range(passes):
        for start in range(0, columns, group_size):
            stop = min(start + group_size, columns)
            block, change = gram[start:stop, start:stop], torch.zeros_like(values[start:stop])
            largest = codes[start:stop].abs().amax(0)
            free = keep[start:stop] & (codes[start:stop].abs() < largest)
            for j in range(stop - start):
                here = start + j
                slope = gradient[here]
                if j:
                    slope = torch.addmv(slope, change[:j].t(), block[:j, j])
                wanted = (values[here] - slope / diagonal[here]) / scales[here]
                codes[here] = torch.where(free[j], wanted.round_().clamp_(low, high), codes[here])
                made = codes[here] * scales[here]
                change[j] = made - values[here]
                values[here] = made
            gradient.addmm_(gram[:, start:stop], change)
            gradient[start:stop].add_(change, alpha=added)
    return _product(codes, scales).t().contiguous()


def _product(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes times scales, exact in float32, without negative zeros."""
    return torch.where(codes == 0, 0.0, codes * scales)
