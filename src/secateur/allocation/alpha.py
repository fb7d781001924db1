"""Blocks whose matrices have a heavier tail of singular values are pruned less (AlphaPruning).

The eigenvalues l of W W^T, squares of the singular values, are taken to follow a power law above some l_min, whose
exponent is estimated by Hill's formula over the n of them that are at least l_min:

    alpha = 1 + n / (sum ln l_i - n·ln l_min)

l_min is the eigenvalue, from 0.95 to 1.5 times the fullest of 100 bins of log l, for which the power law fits best: the
largest distance between both distribution functions is smallest. A small alpha is a heavy tail: much was learned there.
With A_b the mean alpha of a block, its sparsity is in proportion to 1 - spread at the smallest A_b up to 1 + spread at
the largest, scaled and then shifted, each in [0, 0.95], so that the mean over all weights is what was asked for.

No data; O(r·c·min(r, c)) for a matrix (r, c), one at a time. Source: Lu et al., "AlphaPruning: Using Heavy-Tailed Self
Regularization Theory for Improved Layer-wise Pruning of Large Language Models", 2024, section 3. The authors' code
compares the lower end for l_min with its logarithm, so that it never binds, and may give sparsities above 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.allocation._base import Look, Need, Share, block_means, projected
from secateur.errors import UsageError

_BINS = 100
_NOISE = 1e-10
"""Eigenvalues that small a share of the largest are rounding."""


@dataclass(frozen=True, kw_only=True)
class Alpha:
    """AlphaPruning."""

    name: ClassVar[str] = "alpha"
    needs: ClassVar[Need] = "weights"

    spread: float = 0.3
    """How far the sparsity of a block may be from that of all, as a share of it, before the shift."""

    def __post_init__(self) -> None:
        if not 0 <= self.spread < 1:
            raise UsageError(f"spread of alpha is {self.spread:g}", hint="it must be in [0, 1); 0.3 is usual")

    def measure(self, look: Look) -> Tensor:
        """The exponent of one matrix, a float64 scalar; NaN where it has too few singular values to have one."""
        return torch.tensor(tail_exponent(look.weight), dtype=torch.float64)

    def allocate(self, shares: Sequence[Share], sparsity: float) -> dict[str, float]:
        """Sparsity of each, so that the mean weighted by size is ``sparsity``.

        Raises:
            SparsityError: when the sparsity is outside [0, 0.95].
        """
        known = [Share(s.name, s.size, s.block, tuple(m for m in s.measured if not m.isnan())) for s in shares]
        exponents = block_means(known)
        low, high = min(exponents.values(), default=0.0), max(exponents.values(), default=0.0)
        width = (high - low) or 1.0
        sizes = {one.name: one.size for one in shares}
        factor = {
            one.name: 1 + self.spread * (2 * (exponents[one.block] - low) / width - 1)
            if one.block in exponents and high > low else 1.0 for one in shares
        }  # fmt: skip
        scale = sparsity * sum(sizes.values()) / max(1e-30, sum(sizes[name] * value for name, value in factor.items()))
        return projected({name: scale * value for name, value in factor.items()}, sizes, sparsity)


def tail_exponent(weight: Tensor) -> float:
    """Exponent of the power law of the eigenvalues of W W^T.

    Args:
        weight: W, (out, in), e.g. (576, 1536).
    """
    wide = weight if weight.shape[0] <= weight.shape[1] else weight.t()
    wide = wide.cpu().double()  # some accelerators have no float64
    values = torch.linalg.eigvalsh(wide @ wide.t())
    values = values[values > _NOISE * values[-1]]
    if len(values) < 3:
        return float("nan")
    logs = values.log()
    counts = torch.histc(logs, _BINS, float(logs[0]), float(logs[-1]))
    step = (logs[-1] - logs[0]) / _BINS
    peak = (logs[0] + counts.argmax() * step).exp()  # the lower end of the fullest bin
    best, found = float("inf"), float("nan")
    for start in ((values >= 0.95 * peak) & (values <= 1.5 * peak)).nonzero().squeeze(1).tolist():
        tail = values[start:]
        excess = float(logs[start:].sum() - len(tail) * logs[start])
        if excess <= 0 or len(tail) < 2:
            continue
        exponent = 1 + len(tail) / excess
        fitted = 1 - (tail / tail[0]) ** (1 - exponent)
        distance = float((fitted - torch.arange(len(tail), dtype=torch.float64) / len(tail)).abs().max())
        if distance < best:
            best, found = distance, exponent
    return found
