"""Least squares on a fixed mask: the best values of the weights that are kept, by conjugate gradients.

For each row w of a matrix W (r, c) with keep-mask M, and a symmetric positive definite A (c, c), this finds the q with
zeros outside the mask that minimises (q - w0) A (q - w0)^T, which solves P A P q = P A w0 with P = diag(M). All rows go
together, each with its own step sizes (Shewchuk's algorithm, "An introduction to the conjugate gradient method",
1994, with the diagonal of A taken to be one: scale the inputs first). A step is one product, 2·r·c^2 operations.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_least_squares(
    matrix: Tensor, wanted: Tensor, mask: Tensor, start: Tensor, steps: int, tolerance: float = 1e-6
) -> Tensor:
    """Improve values on a mask.

    Args:
        matrix: A, (in, in), symmetric positive definite, its diagonal near one; e.g. (1536, 1536).
        wanted: A w0 of every row, (out, in); e.g. (576, 1536).
        mask: True where a weight is kept, (out, in) bool.
        start: values to begin with, (out, in); those outside the mask are taken for zero. The objective never rises.
        steps: at most so many.
        tolerance: a row is done when its residual is that small a share of what is wanted.

    Returns:
        (out, in), zero outside the mask.
    """
    keep = mask.to(wanted.dtype)
    values = start * keep
    residual = (wanted - values @ matrix) * keep
    direction = residual.clone()
    size = residual.square().sum(dim=1, keepdim=True)
    enough = (wanted * keep).square().sum(dim=1, keepdim=True) * tolerance**2
    tiny = torch.finfo(wanted.dtype).tiny
    for _ in range(steps):
        active = size > enough
        if not bool(active.any()):
            break
        image = (direction @ matrix).mul_(keep)
        length = size / (direction * image).sum(dim=1, keepdim=True).clamp_min(tiny)
        length = torch.where(active, length, 0.0)
        values.addcmul_(direction, length)
        residual.addcmul_(image, length, value=-1)
        before, size = size, residual.square().sum(dim=1, keepdim=True)
        direction.mul_(size / before.clamp_min(tiny)).add_(residual)
    return values
