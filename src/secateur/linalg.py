"""The damped Cholesky factor that the second-order methods share.

For a Gram matrix H = X^T X, damping d and lambda = d·mean(diag H), the factor is the upper triangular R with
R R^T = H + lambda·I. Its inverse U = R^-1 satisfies U^T U = (H + lambda·I)^-1: it is the factor of optimal brain
surgery. R comes from one Cholesky factorisation that runs from the last column to the first; U is never formed as a
whole, since only its diagonal blocks are needed (see `secateur.methods.sparsegpt`). Compared with the usual way
(factorise, invert, factorise the inverse) that is a quarter of the arithmetic, and one c·c buffer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.errors import CalibrationError

DOUBLE_LIMIT = 2048
"""Up to this many inputs the factorisation runs in float64, which costs little there."""
_FIRST_DAMPING = 0.01
_LAST_DAMPING = 1.0
_BLOCK = 256


@dataclass(frozen=True)
class Factor:
    """R with R R^T = H + diag(added)."""

    upper: Tensor
    """R, (in, in) float32, zero below the diagonal."""
    added: Tensor
    """What was added to the diagonal of H, (in,) float64: the damping, and a stand-in at dead inputs."""
    damping: float
    """The relative damping that was used in the end."""
    notes: list[str] = field(default_factory=list)


def damped_factor(gram: Tensor, dead: Tensor, damping: float) -> Factor:
    """Factorise H + lambda·I; when that fails, once more with ten times the damping, up to 1.

    Dead inputs (a zero row and column of H) get the mean of the others on the diagonal, so that they neither break the
    factorisation nor touch the other inputs.

    Args:
        gram: H, (in, in), symmetric, e.g. (1536, 1536) float32; not changed.
        dead: (in,) bool.
        damping: lambda as a share of the mean diagonal of the inputs that are not dead.

    Raises:
        CalibrationError: when no damping up to 1 helps; the Gram matrix is not one of finite numbers then.
    """
    notes: list[str] = []
    diagonal = gram.diagonal().double() if _has_double(gram.device) else gram.diagonal().cpu().double()
    dead = dead.to(diagonal.device)
    live = int((~dead).sum())
    mean = float(diagonal[~dead].mean()) if live else 1.0
    if live < len(dead):
        notes.append(f"{len(dead) - live} of {len(dead)} inputs are dead (always zero in the calibration data)")
    tried = damping
    while True:
        added = torch.full_like(diagonal, tried * mean)
        added[dead] += mean
        upper = _factorise(gram, added)
        if upper is not None:
            break
        if tried >= _LAST_DAMPING:
            raise CalibrationError(
                f"the Gram matrix of the {len(dead)} inputs cannot be factorised, not even with damping {tried:g}",
                hint="use more, or other, calibration data",
            )
        tried = min(max(10 * tried, _FIRST_DAMPING), _LAST_DAMPING)
    if tried != damping:
        notes.append(f"damping raised from {damping:g} to {tried:g}: the Gram matrix was not positive definite")
    return Factor(upper, added, tried, notes)


def inverse_block(factor: Factor, start: int, stop: int) -> Tensor:
    """U = R^-1 on a diagonal block, (stop - start, stop - start) float32 upper triangular."""
    block = factor.upper[start:stop, start:stop]
    if _has_double(block.device):
        block = block.double()
    eye = torch.eye(stop - start, dtype=block.dtype, device=block.device)
    inverse: Tensor = torch.linalg.solve_triangular(block, eye, upper=True)
    return inverse.float()


def _factorise(gram: Tensor, added: Tensor) -> Tensor | None:
    """R in float32, or None when H is not positive definite."""
    formats = [torch.float64] if gram.shape[0] <= DOUBLE_LIMIT else [torch.float32, torch.float64]
    for dtype in formats:
        home = gram.device if dtype == torch.float32 or _has_double(gram.device) else torch.device("cpu")
        work = gram.to(device=home, dtype=dtype, copy=True)
        work.diagonal().add_(added.to(device=home, dtype=dtype))
        if reverse_cholesky_(work):
            return work.to(device=gram.device, dtype=torch.float32)
        del work
    return None


def reverse_cholesky_(matrix: Tensor, block: int = _BLOCK) -> bool:
    """Overwrite a symmetric matrix A with the upper triangular R of A = R R^T; only its upper half is read.

    Works in place, from the last block of columns to the first. On failure the content is undefined.

    Returns:
        Whether A was positive definite.
    """
    for stop in range(matrix.shape[0], 0, -block):
        start = max(0, stop - block)
        corner = matrix[start:stop, start:stop]
        # The lower factor of the matrix read backwards is the upper factor read backwards.
        lower, info = torch.linalg.cholesky_ex(corner.triu().flip(0, 1), upper=False)
        if int(info):
            return False
        upper = lower.flip(0, 1)
        corner.copy_(upper)
        if not start:
            break
        panel = matrix[:start, start:stop]
        panel.copy_(torch.linalg.solve_triangular(upper.t(), panel, upper=False, left=False))
        for right in range(start, 0, -block):
            left = max(0, right - block)
            matrix[:right, left:right].addmm_(panel[:right], panel[left:right].t(), alpha=-1)
        matrix[start:stop, :start].zero_()
    return bool(matrix.diagonal().isfinite().all())


def _has_double(device: torch.device) -> bool:
    return device.type != "mps"
