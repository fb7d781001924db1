"""Removes units one after the other, each time the one whose loss the others can make up for best.

The cost of a unit P is tr(W_P (G^-1_PP)^-1 W_P^T), with W the best matrix for the columns that are left and G the
damped Gram matrix of the inputs (`secateur.least_squares`); W and G^-1 are updated after every removal. Single columns
go in small batches. O(c^3 + c^2·(c + r)·removed / batch) time. Source: optimal brain surgery for groups of
columns: Kurtic et al., "ZipLM", 2023, eq. 3; Ling et al., "SlimGPT", 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.errors import UsageError
from secateur.least_squares import greedy_removal
from secateur.plugins import Units


@dataclass(frozen=True, kw_only=True)
class Obs:
    """Optimal brain surgery for whole units."""

    name: ClassVar[str] = "obs"
    data: ClassVar[bool] = True

    at_once: int = 16
    """Neurons that go before the costs are computed again."""

    def __post_init__(self) -> None:
        if self.at_once < 1:
            raise UsageError(f"at_once of obs is {self.at_once}", hint="it must be at least 1")

    def choose(self, units: Units, remove: int) -> Tensor:
        """Numbers of the units that stay."""
        return greedy_removal(units.problem, units.columns, remove, parts=units.parts, at_once=self.at_once)
