"""Refits the rows that make the units of a gated network, with what follows them held.

A gated network gives y = D(s ∘ (U z)): the factors s = act(G z) of a token do not depend on U, so its output is linear
in U as well as in D. With inputs Z (tokens, c), factors S (tokens, k), D (r, k) and wanted outputs Y (tokens, r) minimise

    |(S ∘ (Z U^T)) D^T - Y|^2 + lambda·|U - U0|^2
    lambda = damping·mean_j(|D_j|^2·mean_t S_tj^2)·mean(diag Z^T Z)

over U (k, c) by preconditioned conjugate gradients. The normal matrix is sum_t (D^T D ∘ s_t s_t^T) ⊗ z_t z_t^T; it is
never formed. The preconditioner is its block diagonal with s_t replaced by its mean square: (|D_j|^2·mean_t S_tj^2) ⊗
(Z^T Z), damped. A few steps are enough, and fewer than all of them keep U near U0. Alternating such refits with those of
D (`secateur.least_squares`) is alternating least squares.

Source: conjugate gradients: Hestenes and Stiefel 1952. That a layer's own outputs are what a cut layer is refitted to:
Kurtic et al., "ZipLM", 2023; that the rows before the cut are refitted too is ours.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

AT_ONCE = 2048
"""Tokens that are multiplied at once, which bounds what lies in memory beside the arguments."""


def refit_rows(
    inputs: Tensor, factors: Tensor, following: Tensor, wanted: Tensor, start: Tensor, *, damping: float, steps: int
) -> Tensor:
    """The rows U after a few steps from U0.

    Args:
        inputs: Z, (tokens, c); products are taken in its number format and summed in float32.
        factors: S, (tokens, k).
        following: D, (r, k).
        wanted: Y, (tokens, r).
        start: U0, (k, c).
        damping: lambda as a share of the mean curvature.
        steps: of conjugate gradients; 0 gives U0.

    Returns:
        U, (k, c) float32.
    """
    number = inputs.dtype
    start, following = start.float(), following.float()
    narrow = following.to(number)
    scale = following.square().sum(dim=0) * factors.float().square().mean(dim=0)
    second = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float32, device=inputs.device)
    for rows in _parts(len(inputs)):
        second += (inputs[rows].t() @ inputs[rows]).float()
    pull = damping * float(scale.mean()) * float(second.diagonal().mean())
    if not pull > 0:  # nothing arrives, or nothing follows: every U gives the same
        return start.clone()
    eye = torch.eye(len(second), dtype=torch.float64, device=second.device)
    inverse = torch.linalg.inv(second.double() + 0.01 * float(second.diagonal().mean()) * eye).float()
    divisor = (scale + 1e-3 * scale.mean())[:, None]

    def forward(u: Tensor, rows: slice) -> Tensor:
        units = factors[rows] * (inputs[rows] @ u.to(number).t())
        return (units @ narrow.t()).float()

    def backward(error: Tensor, rows: slice) -> Tensor:
        return ((factors[rows] * (error.to(number) @ narrow)).t() @ inputs[rows]).float()

    def curvature(u: Tensor) -> Tensor:
        total = pull * u
        for rows in _parts(len(inputs)):
            total += backward(forward(u, rows), rows)
        return total

    residual = torch.zeros_like(start)
    for rows in _parts(len(inputs)):
        residual += backward(wanted[rows].float() - forward(start, rows), rows)
    change = torch.zeros_like(start)
    improved = residual / divisor @ inverse
    direction = improved.clone()
    product = (residual * improved).sum()
    for _ in range(steps):
        curved = curvature(direction)
        along = (direction * curved).sum()
        if not (bool(along > 0) and bool(product > 0)):
            break
        step = product / along
        change += step * direction
        residual = residual - step * curved
        improved = residual / divisor @ inverse
        before, product = product, (residual * improved).sum()
        direction = improved + product / before * direction
    return start + change


def _parts(count: int) -> Iterator[slice]:
    for begin in range(0, count, AT_ONCE):
        yield slice(begin, min(begin + AT_ONCE, count))
