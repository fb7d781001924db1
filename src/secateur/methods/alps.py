"""Searches the mask by ADMM while the weights follow, then solves for the best weights on it.

Minimises |X (W - Q)^T|^2 over Q with the wanted zeros. With d = damping, the inputs are scaled to one first: with
H = X^T X + d·mean(diag H)·I and n = sqrt(diag H), A = H / (n n^T) has a unit diagonal and W^ = W ∘ n is the dense
matrix in these units ((W^)^2 is Wanda's score squared). The target is Y = W^ A. The method of multipliers splits the
problem into a free copy B and a copy D with the zeros, which a penalty rho pulls together:

    B = (Y - V + rho·D) (A + rho·I)^-1
    D = the entries of B + V / rho that are largest in magnitude, as many as stay (of each group for N:M), else zero
    V = V + rho·(B - D)

rho starts small, so that the mask moves freely, and grows as it settles, every third iteration: by 1.3 while more than
a tenth of the kept entries changed since, by 1.2 while more than 0.5 % did, by 1.1 while any did. Once less than
``settled`` of them changed in three iterations, or after ``iterations``, the mask is fixed, and the weights on it are
solved by conjugate gradients (`secateur.refit`), starting from D; then Q = D / n.

O(iterations·r·c^2 + inverses·c^3) time; A, one inverse, and four copies of W. Source: Meng, Behdin, Wang and Mazumder,
"ALPS", 2024, algorithms 1 and 2. The authors decompose A once and divide rho by five while the mask does not move; here
the inverse is computed anew where rho changes, which saves a product in every iteration, and rho only grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import CalibrationError, UsageError
from secateur.methods._common import matrix_mask
from secateur.methods._scaled import solve_scaled
from secateur.plugins import Solved, StatisticsKind, Target
from secateur.refit import masked_least_squares
from secateur.statistics import InputStatistics

_LOOK = 3
"""Iterations between two looks at how much the mask has changed."""
_EARLIEST = 9
"""Iterations before which the mask is never taken for settled."""


@dataclass(frozen=True, kw_only=True)
class Alps:
    """ALPS."""

    name: ClassVar[str] = "alps"
    statistics: ClassVar[StatisticsKind] = "gram"
    draws: ClassVar[bool] = False

    iterations: int = 60
    """Most iterations of the search for the mask."""
    settled: float = 0.003
    """Share of the kept entries: when fewer changed in three iterations the search is over."""
    refit_steps: int = 15
    """Steps of conjugate gradients on the mask that was found."""
    damping: float = 0.01
    """Added to the diagonal of the Gram matrix, as a share of its mean."""
    penalty: float = 0.1
    """The penalty rho at the start."""

    def __post_init__(self) -> None:
        for option, value, least in (("iterations", self.iterations, 1), ("refit_steps", self.refit_steps, 0)):
            if value < least:
                raise UsageError(f"{option} of alps is {value}", hint=f"it must be at least {least}")
        if not 0 <= self.settled < 1:
            raise UsageError(f"settled of alps is {self.settled:g}", hint="it must be in [0, 1); 0.003 is usual")
        if not 0 < self.damping <= 1:
            raise UsageError(f"damping of alps is {self.damping:g}", hint="it must be in (0, 1]; 0.01 is usual")
        if not self.penalty > 0:
            raise UsageError(f"penalty of alps is {self.penalty:g}", hint="it must be above 0; 0.1 is usual")

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

        def both(matrix: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
            values, mask = search(matrix, dense, target, self.iterations, self.settled, self.penalty)
            return masked_least_squares(matrix, dense @ matrix, mask, values, self.refit_steps), mask

        return solve_scaled("alps", weight, stats, target, self.damping, both)


def search(
    matrix: Tensor, dense: Tensor, target: Target, iterations: int, settled: float, penalty: float
) -> tuple[Tensor, Tensor]:
    """The mask, and values on it, by the method of multipliers.

    Args:
        matrix: A, (in, in), positive definite with a unit diagonal.
        dense: W^, (out, in), e.g. (576, 1536); not changed.
        settled: the search is over when a smaller share of the kept entries changed in three iterations.
        penalty: rho at the start.

    Returns:
        D, (out, in), and its keep-mask.

    Raises:
        CalibrationError: when A + rho·I cannot be factorised.
    """
    wanted = dense @ matrix
    mask = matrix_mask(dense.abs(), target)
    values = dense * mask
    multiplier = torch.zeros_like(dense)
    before = mask
    inverse, rho = _inverse(matrix, penalty), penalty
    for iteration in range(1, iterations + 1):
        free = (wanted - multiplier).add_(values, alpha=rho) @ inverse
        pulled = torch.add(free, multiplier, alpha=1 / rho)
        mask = matrix_mask(pulled.abs(), target)
        values = pulled.masked_fill_(~mask, 0.0)
        multiplier.add_(free - values, alpha=rho)
        if iteration % _LOOK:
            continue
        changed = int((mask & ~before).sum()) / max(1, int(mask.sum()))
        before = mask
        if iteration >= _EARLIEST and changed <= settled:
            break
        growth = 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1 if changed > 0 else 1.0
        if growth > 1 and iteration < iterations:
            rho *= growth
            inverse = _inverse(matrix, rho)
    return values, mask


def _inverse(matrix: Tensor, penalty: float) -> Tensor:
    """(A + rho·I)^-1."""
    shifted = matrix.clone()
    shifted.diagonal().add_(penalty)
    factor, info = torch.linalg.cholesky_ex(shifted)
    if int(info):
        raise CalibrationError(
            f"the Gram matrix of the {len(matrix)} inputs cannot be factorised", hint="use a larger damping"
        )
    inverse: Tensor = torch.cholesky_inverse(factor)
    return inverse
