"""Removes units of columns from a matrix and lets the columns that stay make up for them, in closed form.

With inputs X (tokens, c), wanted outputs Y (tokens, r) and W0 (r, c) the matrix as it is, minimise

    |X W^T - Y|^2 + lambda·|W - W0|^2        lambda = damping·mean(diag X^T X)

over the W whose removed columns are zero. With G = X^T X + lambda·I and B = X^T Y + lambda·W0^T the best W for the kept
columns S is W_S^T = G_SS^-1 B_S. Y = X W0^T asks for the outputs of the whole matrix; another Y (what the dense model
had there, less what is already in the residual stream) corrects the errors of everything before it as well.

Sources: optimal brain surgery for groups of columns: Kurtic et al., "ZipLM", 2023, eq. 3; refit of the following
matrix: Lin et al., "MoDeGPT", 2024, and FLAP's bias (An et al., 2023) when a column of ones is appended to X.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.errors import CalibrationError

DOUBLE_LIMIT = 8192
"""Up to this many inputs everything is solved in float64."""


@dataclass
class Quadratic:
    """The objective of one matrix: G (c, c), B (c, r) and W0^T (c, r), all in one number format."""

    gram: Tensor
    target: Tensor
    start: Tensor
    notes: list[str] = field(default_factory=list)

    def best(self, columns: Tensor) -> Tensor:
        """W^T (c, r) with the best values in ``columns`` and zero elsewhere."""
        made = torch.zeros_like(self.start)
        made[columns] = _solve(self.gram[columns][:, columns], self.target[columns])
        return made

    def loss(self, made: Tensor) -> float:
        """Objective of a W^T (c, r), up to a constant."""
        return float((made * (self.gram @ made - 2 * self.target)).sum())


def quadratic(gram: Tensor, cross: Tensor | None, weight: Tensor, damping: float) -> Quadratic:
    """Build the objective.

    Args:
        gram: X^T X, (c, c).
        cross: X^T Y, (c, r); None for Y = X W0^T.
        weight: W0, (r, c).
        damping: lambda as a share of the mean diagonal; at most tenfold three times where G cannot be factorised.

    Raises:
        CalibrationError: when G cannot be factorised.
    """
    number = torch.float64 if len(gram) <= DOUBLE_LIMIT and gram.device.type != "mps" else torch.float32
    gram, start = gram.to(number), weight.t().to(number)
    wanted = gram @ start if cross is None else cross.to(number)
    mean = float(gram.diagonal().mean()) or 1.0
    tried = damping or 1e-6
    for _ in range(4):
        damped = gram + tried * mean * torch.eye(len(gram), dtype=number, device=gram.device)
        if not int(torch.linalg.cholesky_ex(damped).info):
            notes = [f"damping raised from {damping:g} to {tried:g}"] if tried > max(damping, 1e-6) else []
            return Quadratic(damped, wanted + tried * mean * start, start, notes)
        tried *= 10
    raise CalibrationError(
        f"the Gram matrix of {len(gram)} inputs cannot be factorised, not even with damping {tried / 10:g}",
        hint="use more, or other, calibration data",
    )


def greedy_removal(problem: Quadratic, columns: Tensor, remove: int, *, parts: int = 1, at_once: int = 16) -> Tensor:
    """Remove units one after the other (single columns in small batches), each time the one that costs least.

    With W the best matrix for the columns left and P the columns of a unit, its removal costs
    tr(W_P (G^-1_PP)^-1 W_P^T); afterwards W and G^-1 are updated in closed form.

    Args:
        columns: (units, n) columns of each unit.
        remove: units to remove; the same number from each of ``parts`` consecutive parts.
        at_once: single columns that go before the costs are computed again.

    Returns:
        Numbers of the units that stay, ascending.
    """
    units, size = columns.shape
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(problem.gram))
    weight = (inverse @ problem.target).t().contiguous()
    alive = torch.ones(units, dtype=torch.bool, device=weight.device)
    quota = torch.full((parts,), remove // parts)
    part_of = torch.arange(units) * parts // units
    removed = 0
    while removed < remove:
        cost = _costs(weight, inverse, columns)
        open_parts = (quota > 0)[part_of].to(cost.device)
        cost = cost.masked_fill(~(alive & open_parts), torch.inf)
        count = min(at_once, remove - removed) if size == 1 and parts == 1 else 1
        chosen = cost.argsort(stable=True)[:count]
        gone = columns[chosen].reshape(-1)
        block = inverse[:, gone]
        change = torch.linalg.solve(block[gone], block.t())
        weight -= weight[:, gone] @ change
        inverse -= block @ change
        weight[:, gone] = 0
        inverse[gone], inverse[:, gone] = 0, 0
        inverse[gone, gone] = 1
        alive[chosen] = False
        for part in part_of[chosen.cpu()].tolist():
            quota[part] -= 1
        removed += len(chosen)
    return alive.nonzero().squeeze(1).cpu()


def _costs(weight: Tensor, inverse: Tensor, columns: Tensor) -> Tensor:
    """Cost of the removal of every unit, (units,)."""
    if columns.shape[1] == 1:
        index = columns[:, 0]
        return weight[:, index].square().sum(dim=0) / inverse.diagonal()[index]
    own = torch.stack([torch.linalg.solve(inverse[c][:, c], weight[:, c].t() @ weight[:, c]) for c in columns])
    return own.diagonal(dim1=1, dim2=2).sum(dim=1)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrix))
