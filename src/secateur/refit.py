"""Least squares on a fixed mask: the best values of the weights that are kept, by conjugate gradients.

For each row w of a matrix W (r, c) with keep-mask M, and a symmetric positive definite A (c, c), this finds the q with
zeros outside the mask that minimises (q - w0) A (q - w0)^T, which solves P A P q = P A w0 with P = diag(M). All rows go
together, each with its own step sizes (Shewchuk's algorithm, "An introduction to the conjugate gradient method",
1994, with the diagonal of A taken to be one: scale the inputs first). A step is one product, 2·r·c^2 operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 20
"""Steps of conjugate gradients that are enough after a method that knew the inputs."""
DAMPING = 0.01
"""Added to the diagonal of the Gram matrix, as a share of its mean: pulls towards the dense weights."""


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


def refit(
    weight: Tensor, pruned: Tensor, mask: Tensor, gram: Tensor, dead: Tensor, steps: int = STEPS,
) -> tuple[Tensor, float, float]:  # fmt: skip
    """The best values for the kept weights of a pruned matrix; each row keeps the better of what it had and this.

    Minimises (q - w) (H + lambda·I) (q - w)^T over the q with the zeros of the mask, lambda = 0.01·mean(diag H), from
    the values that are there. Better is what has the smaller error of the outputs, |X (w - q)^T|^2, without lambda.

    Args:
        weight: W, the dense matrix, (out, in) float32, e.g. (576, 1536).
        pruned: Q, (out, in), zero outside the mask.
        mask: True where a weight is kept, (out, in) bool.
        gram: H = X^T X, (in, in) float32.
        dead: inputs that are always zero, (in,) bool; their weights stay as they are.

    Returns:
        The new Q, and the error of the outputs summed over rows and calibration tokens, before and after.
    """
    scale, matrix = unit_diagonal(gram, dead, DAMPING)
    dense = (weight * scale).masked_fill_(dead, 0.0)
    start = (pruned * scale).masked_fill_(dead, 0.0)
    values = masked_least_squares(matrix, dense @ matrix, mask, start, steps).div_(scale)
    values = torch.where(mask & ~dead, values, pruned)
    before, after = (row_errors(gram, weight - one) for one in (pruned, values))
    better = after < before
    return (
        torch.where(better.to(values.device)[:, None], values, pruned),
        float(before.sum()),
        float(torch.where(better, after, before).sum()),
    )


def unit_diagonal(gram: Tensor, dead: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The damped Gram matrix of inputs scaled to one.

    Args:
        gram: X^T X, (in, in) float32, e.g. (1536, 1536); not changed.
        dead: inputs that are always zero, (in,) bool; they get a diagonal of one and touch no other.

    Returns:
        The scale n, (in,), one at dead inputs, and A, (in, in).
    """
    diagonal = gram.diagonal().cpu().double()  # some accelerators have no float64
    absent = dead.cpu()
    added = damping * diagonal[~absent].mean()
    scale = (diagonal + added).masked_fill(absent, 1.0).sqrt().float().to(gram.device)
    matrix = gram / scale / scale[:, None]
    matrix.diagonal().fill_(1.0)
    return scale, matrix


def row_errors(gram: Tensor, difference: Tensor) -> Tensor:
    """|X (w - q)^T|^2 of each row, summed over the calibration tokens, (out,) float64 on the CPU.

    Args:
        difference: W - Q, (out, in).
    """
    # Some accelerators have no float64; the sums are short, so they are taken in float32 first.
    return (difference @ gram).mul_(difference).sum(dim=1).clamp_min_(0.0).cpu().double()


def output_error(gram: Tensor, difference: Tensor) -> float:
    """|X (W - Q)^T|^2, summed over the calibration tokens.

    Args:
        difference: W - Q, (out, in).
    """
    return max(0.0, float((difference @ gram).mul_(difference).sum(dtype=torch.float64)))
