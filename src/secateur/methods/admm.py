"""Updates weights by ADMM while the mask grows step by step towards the wanted zeros.

Minimises |X (W - Q)^T|^2 over Q with the wanted zeros. With H = X^T X and n = sqrt(diag H) the inputs are scaled to
one: A = H / (n n^T) + damping·I, and W^ = W ∘ n (|W^| is Wanda's score). The target Y = W^ A holds the same A, so the
damping pulls towards the dense weights. The method of multipliers, with a fixed penalty rho:

    M = the largest |B + U|, while the iteration is at most ``mask_iterations``; B = W^ and U = 0 at the start
    D = (B + U) ∘ M
    U = U + B - D
    B = (Y + rho·(D - U)) (A + rho·I)^-1

In iteration t of ``mask_iterations`` = T the share of zeros is s·(1 - (1 - t/T)^3), so early mistakes are made good by
what is still there; afterwards the mask is fixed and only weights move. For N:M the N largest of each group stay while
the others wait for their turn, lowest of the whole matrix first. The result is (B + U) ∘ M / n.

O(c^3 + iterations·r·c^2) time; one inverse of (c, c) and four copies of W (r, c), e.g. (576, 1536). Source: Boza, "Fast
and Effective Weight Update for Pruned Large Language Models", 2024, algorithm 1 and section 3.3. The authors' code
takes the full share of zeros in every iteration when a whole matrix is compared, and knows only 2:4; this follows the
paper, for every N:M. Inputs that are always zero are pruned first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import CalibrationError, UsageError
from secateur.masks import lowest_nm, lowest_of_matrix
from secateur.methods._common import total_count
from secateur.methods._scaled import solve_scaled
from secateur.plugins import Solved, StatisticsKind, Target
from secateur.statistics import InputStatistics


@dataclass(frozen=True, kw_only=True)
class Admm:
    """The alternating direction method of multipliers."""

    name: ClassVar[str] = "admm"
    statistics: ClassVar[StatisticsKind] = "gram"
    draws: ClassVar[bool] = False

    iterations: int = 20
    """Iterations in all."""
    mask_iterations: int = 15
    """Iterations in which the mask still changes."""
    damping: float = 0.1
    """Added to the diagonal of the scaled Gram matrix, which is 1."""
    penalty: float = 1.0
    """The penalty rho."""

    def __post_init__(self) -> None:
        if not 1 <= self.mask_iterations <= self.iterations:
            raise UsageError(
                f"mask_iterations of admm is {self.mask_iterations} of {self.iterations}",
                hint="it must be from 1 to the number of iterations",
            )
        if not 0 < self.damping <= 1:
            raise UsageError(f"damping of admm is {self.damping:g}", hint="it must be in (0, 1]; 0.1 is usual")
        if not self.penalty > 0:
            raise UsageError(f"penalty of admm is {self.penalty:g}", hint="it must be above 0; 1 is usual")

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

        def search(matrix: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
            matrix.diagonal().add_(self.damping)
            return multipliers(matrix, dense, target, self.iterations, self.mask_iterations, self.penalty)

        return solve_scaled("admm", weight, stats, target, 0.0, search)


def multipliers(
    matrix: Tensor, dense: Tensor, target: Target, iterations: int, mask_iterations: int, penalty: float
) -> tuple[Tensor, Tensor]:
    """The mask, and values on it.

    Args:
        matrix: A, (in, in), positive definite; not changed.
        dense: W^, (out, in), e.g. (576, 1536); not changed.
        iterations: of which the first ``mask_iterations`` choose the mask.
        penalty: rho.

    Returns:
        D, (out, in), and its keep-mask.

    Raises:
        CalibrationError: when A + rho·I cannot be factorised.
    """
    shifted = matrix.clone()
    shifted.diagonal().add_(penalty)
    factor, info = torch.linalg.cholesky_ex(shifted)
    if int(info):
        raise CalibrationError(
            f"the Gram matrix of the {len(matrix)} inputs cannot be factorised", hint="use a larger damping"
        )
    inverse = torch.cholesky_inverse(factor)
    wanted = dense @ matrix
    free, multiplier = dense, torch.zeros_like(dense)
    mask = torch.ones_like(dense, dtype=torch.bool)
    for iteration in range(1, iterations + 1):
        pulled = free + multiplier
        if iteration <= mask_iterations:
            mask = gradual_mask(pulled.abs(), target, 1 - (1 - iteration / mask_iterations) ** 3)
        values = pulled.masked_fill(~mask, 0.0)
        multiplier = pulled - values
        free = torch.add(wanted, values - multiplier, alpha=penalty) @ inverse
    return free.add_(multiplier).masked_fill_(~mask, 0.0), mask


def gradual_mask(score: Tensor, target: Target, share: float) -> Tensor:
    """Keep-mask with a share of the wanted zeros, all of them at 1.

    Args:
        score: (out, in), not negative.
        share: of the zeros that the target asks for, in [0, 1].
    """
    pattern = target.pattern
    if pattern.unstructured:
        return lowest_of_matrix(score, round(share * total_count(target, score.numel())))
    stay = lowest_nm(score, pattern.keep, pattern.group)
    if share >= 1:
        return stay
    return lowest_of_matrix(score.masked_fill(stay, torch.inf), round(share * int((~stay).sum())))
