"""Removes the experts with the smallest weights: the sum of squares over all that is an expert's own.

Needs no calibration data. The router does not count. Source: the usual baseline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.plugins import Experts


@dataclass(frozen=True, kw_only=True)
class Magnitude:
    """Magnitude. It has no options."""

    name: ClassVar[str] = "magnitude"
    data: ClassVar[bool] = False

    def score(self, experts: Experts) -> Tensor:
        """(experts,): the lowest go."""
        return experts.squares
