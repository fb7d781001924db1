"""Removes the units with the smallest weights: the sum of squares over all their rows and columns.

Needs no calibration data to choose. Source: the usual baseline; Li et al., "Pruning Filters for Efficient ConvNets",
2017, with the norm taken over everything that goes with a unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.criteria._common import best_units, column_scores, squared_norms
from secateur.plugins import Units


@dataclass(frozen=True, kw_only=True)
class Magnitude:
    """Magnitude. It has no options."""

    name: ClassVar[str] = "magnitude"
    data: ClassVar[bool] = False

    def choose(self, units: Units, remove: int) -> Tensor:
        """Numbers of the units that stay.

        Raises:
            WeightValueError: when a weight is not finite.
        """
        own = column_scores(squared_norms(units.weight), units.columns)
        return best_units(own + units.feeding.to(own), remove, units.parts)
