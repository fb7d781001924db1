"""Removes the units without which the loss would change least, by its gradient at the weights.

First order: S_u = sum over all weights w that go with unit u of |w·g|, g the mean gradient of the loss on a few
calibration sequences. Second order: sum of |w·g - w^2·F / 2|, F the mean of the squared gradients of single sequences
(the diagonal of the empirical Fisher matrix). Needs the model and its gradients in memory, in float32. Source: Ma et
al., "LLM-Pruner", 2023, eq. 5 and 6, there over 10 sequences of 128 tokens; every block keeps the same number of units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.criteria._common import best_units
from secateur.errors import UsageError
from secateur.plugins import Units


@dataclass(frozen=True, kw_only=True)
class Taylor:
    """Taylor expansion of the loss."""

    name: ClassVar[str] = "taylor"
    data: ClassVar[bool] = True

    order: int = 1
    """1: gradients alone; 2: with the diagonal Fisher term."""
    sequences: int = 16
    """Calibration sequences with one backward each."""
    length: int = 256
    """Tokens of each, at most."""

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise UsageError(f"order of taylor is {self.order}", hint="it is 1 or 2")
        for name, least in (("sequences", 1), ("length", 2)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} of taylor is {getattr(self, name)}", hint=f"it must be at least {least}")

    @property
    def second(self) -> bool:
        return self.order == 2

    def salience(self, weight: Tensor, gradient: Tensor, squares: Tensor | None) -> Tensor:
        """The part of each single weight.

        Args:
            weight: any shape.
            gradient: mean of the gradients over the sequences, same shape.
            squares: mean of their squares; only with order 2.
        """
        change = weight * gradient
        if squares is not None:
            change = change - 0.5 * weight.square() * squares
        return change.abs()

    def choose(self, units: Units, remove: int) -> Tensor:
        """Numbers of the units that stay.

        Raises:
            ValueError: when no salience was computed for the units.
            WeightValueError: when a score is not finite.
        """
        if units.salience is None:
            raise ValueError("taylor needs the salience of the units")
        return best_units(units.salience, remove, units.parts)
