"""Towards the dense model's outputs: weights that make up for what the inputs of a matrix have already lost.

Behind pruned matrices a matrix W gets inputs X~ (tokens, c) where the dense model has X. The best weights for the dense
outputs, min |X~ V^T - X W^T|^2 + lambda·|V - W|^2, are

    V^T = W^T + K W^T,    K = (X~^T X~ + lambda·I)^-1 X~^T (X - X~),    lambda = damping·mean(diag X~^T X~)

and a pruning method that starts from V instead of W then corrects the errors of everything before it. Only a share beta
of K is taken, because K is fitted to few tokens: on tokens held out, |beta·X~ K W^T - (X - X~) W^T|^2 has its minimum
in closed form, which is cut to [0, 1]. beta = 0 is the usual target. Source: the asymmetric objective of GPTAQ (Li et
al. 2025, arXiv 2504.02692), solved in closed form before pruning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import CalibrationError
from secateur.statistics import InputStatistics

DAMPING = 0.01
_DOUBLE_LIMIT = 2048
"""Up to this many inputs everything is solved in float64."""


class Drift:
    """How far the inputs of a matrix are from the dense model's, summed over tokens: X~^T (X - X~), O(in^2) memory.

    Args:
        held_out: whether some tokens are kept apart to choose beta by; that takes two more matrices.
    """

    def __init__(self, width: int, device: str | torch.device = "cpu", *, held_out: bool) -> None:
        self.cross = torch.zeros(width, width, dtype=torch.float32, device=device)
        """X~^T (X - X~) of the tokens that are not held out, (in, in)."""
        self.held = InputStatistics(width, "gram", device=device) if held_out else None
        self.held_cross = torch.zeros_like(self.cross) if held_out else None
        self._solved: tuple[Tensor, Tensor] | None = None

    def update(self, x: Tensor, dense: Tensor, *, held_out: bool = False) -> None:
        """Add inputs of the same tokens.

        Args:
            x: those that arrive, (..., in), e.g. (1, 1024, 576).
            dense: those of the dense model, in the same shape.
            held_out: only beta is chosen by them.

        Raises:
            ValueError: when the shapes differ.
        """
        if x.shape != dense.shape:
            raise ValueError(f"inputs are {tuple(x.shape)}, those of the dense model {tuple(dense.shape)}")
        self._solved = None
        ours = x.detach().reshape(-1, x.shape[-1]).to(self.cross)
        change = dense.detach().reshape(-1, x.shape[-1]).to(self.cross) - ours
        if not held_out:
            self.cross.addmm_(ours.t(), change)
            return
        assert self.held is not None
        assert self.held_cross is not None
        self.held.update(ours)
        self.held_cross.addmm_(ours.t(), change)

    def corrected(self, weight: Tensor, stats: InputStatistics, beta: float | None) -> tuple[Tensor, float]:
        """V, and the beta that was taken.

        Args:
            weight: W, (out, in) float32, e.g. (576, 1536).
            stats: of all inputs that arrived, those held out among them.
            beta: None chooses it by the tokens held out.

        Raises:
            CalibrationError: when the damped Gram matrix cannot be factorised.
            ValueError: when beta shall be chosen and nothing was held out.
        """
        gram = stats.gram
        if gram is None:
            raise ValueError("a correction needs statistics of kind 'gram'")
        if self._solved is None:
            cross, held = self.cross, self.held
            fitted = whole = _solve(gram, cross)
            if held is not None and self.held_cross is not None and held.gram is not None:
                fitted = _solve(gram - held.gram, cross)
                whole = _solve(gram, cross + self.held_cross)
            self._solved = fitted, whole
        fitted, whole = self._solved
        if beta is None:
            if self.held is None or self.held_cross is None or self.held.gram is None:
                raise ValueError("beta cannot be chosen: no tokens were held out")
            change = fitted @ weight.t()
            wanted = float((change * (self.held_cross @ weight.t())).sum(dtype=torch.float64))
            size = float((change * (self.held.gram @ change)).sum(dtype=torch.float64))
            beta = min(max(wanted / size, 0.0), 1.0) if size > 0 else 0.0
        return torch.addmm(weight, weight, whole.t(), alpha=beta), beta


def _solve(gram: Tensor, cross: Tensor) -> Tensor:
    """K, (in, in) float32."""
    double = len(gram) <= _DOUBLE_LIMIT and gram.device.type != "mps"
    matrix = gram.to(torch.float64 if double else torch.float32, copy=True)
    added = DAMPING * float(matrix.diagonal().mean())
    matrix.diagonal().add_(added or 1.0)
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        raise CalibrationError(
            f"the Gram matrix of {len(gram)} inputs cannot be factorised", hint="use more, or other, calibration data"
        )
    return torch.cholesky_solve(cross.to(matrix.dtype), factor).float()
