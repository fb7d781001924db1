"""What a method may know of the inputs of a matrix: how many tokens, their squares, and their Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from secateur.errors import CalibrationError
from secateur.linalg import Factor, damped_factor

_CHUNK = 1 << 23
"""Numbers of input that are cast and squared at a time (32 MB in float32)."""
_PANEL = 128
"""Rows of the Gram matrix that one product computes."""


@dataclass
class InputStatistics:
    """Statistics of the inputs x of one or more matrices with the same input, summed over tokens.

    ``norms`` collects the squares only, O(in) memory; ``gram`` also X^T X, O(in^2) memory.
    """

    in_features: int
    kind: Literal["norms", "gram"]
    device: str | torch.device = "cpu"
    tokens: int = field(default=0, init=False)
    sum_squares: Tensor = field(init=False)
    """Sum over tokens of x^2, (in,) float64."""
    _lower: Tensor | None = field(default=None, init=False, repr=False)
    _mirrored: bool = field(default=True, init=False, repr=False)
    _factors: dict[float, Factor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        # Apple's MPS has no float64; the sums are small, so they live beside it on the CPU.
        home = "cpu" if torch.device(self.device).type == "mps" else self.device
        self.sum_squares = torch.zeros(self.in_features, dtype=torch.float64, device=home)
        if self.kind == "gram":
            self._lower = torch.zeros(self.in_features, self.in_features, dtype=torch.float32, device=self.device)

    @property
    def gram(self) -> Tensor | None:
        """X^T X, (in, in) float32, or None when only norms are collected."""
        if self._lower is not None and not self._mirrored:
            for start in range(0, self.in_features, _PANEL):
                stop = min(start + _PANEL, self.in_features)
                self._lower[:start, start:stop] = self._lower[start:stop, :start].t()
            self._mirrored = True
        return self._lower

    def update(self, x: Tensor) -> None:
        """Add inputs.

        Args:
            x: (..., in), any floating dtype, e.g. (1, 1024, 576).

        Raises:
            CalibrationError: when an input is NaN, infinite, or so large that its square is; nothing is added then.
        """
        rows = x.detach().reshape(-1, self.in_features).to(self.device)
        step = max(1, _CHUNK // self.in_features)
        chunks = rows.split(step)
        squares = torch.zeros_like(self.sum_squares)
        for chunk in chunks:
            squares += chunk.float().square().sum(dim=0).to(squares)
        if not bool(squares.isfinite().all()):
            raise CalibrationError(
                "the activations hold NaN or infinity",
                hint="try --compute-dtype float32, and check the model on this text with `secateur evaluate`",
            )
        self._factors.clear()
        self.tokens += rows.shape[0]
        self.sum_squares += squares
        if self._lower is not None and len(rows):
            self._mirrored = False
            for chunk in chunks:
                _add_lower_gram(self._lower, chunk.float())

    def merge(self, other: InputStatistics) -> None:
        """Add what another object has seen.

        Raises:
            ValueError: when the two are not of the same kind and width.
        """
        if (other.in_features, other.kind) != (self.in_features, self.kind):
            raise ValueError(f"cannot merge {other.kind} of {other.in_features} inputs into {self}")
        self._factors.clear()
        self.tokens += other.tokens
        self.sum_squares += other.sum_squares.to(self.sum_squares)
        if self._lower is not None and other._lower is not None:
            # Above the diagonal one of the two may be stale, so the sum is mirrored again when it is read.
            self._mirrored = False
            self._lower += other._lower.to(self._lower)

    def column_norms(self) -> Tensor:
        """Root mean square of each input over the tokens, (in,) float32; zero before any token was seen."""
        return (self.sum_squares / max(1, self.tokens)).sqrt().float()

    def dead(self) -> Tensor:
        """Inputs that were zero at every token, (in,) bool."""
        return self.sum_squares == 0

    def factor(self, damping: float) -> Factor:
        """The damped factor of the Gram matrix; computed once for all matrices that share this input.

        Raises:
            ValueError: when no Gram matrix is collected.
            CalibrationError: when the Gram matrix cannot be factorised.
        """
        if damping not in self._factors:
            gram = self.gram
            if gram is None:
                raise ValueError("a factor needs statistics of kind 'gram'")
            self._factors[damping] = damped_factor(gram, self.dead(), damping)
        return self._factors[damping]


def _add_lower_gram(gram: Tensor, x: Tensor) -> None:
    """Add x^T x to the panels on and below the diagonal: little more than half of the full product."""
    for start in range(0, gram.shape[0], _PANEL):
        stop = min(start + _PANEL, gram.shape[0])
        gram[start:stop, :stop].addmm_(x[:, start:stop].t(), x[:, :stop])
