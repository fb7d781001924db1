"""Removes the units whose inputs vary least: a constant input can be made up for by a bias.

Score S_u = sum over the columns j of unit u of |W_:j|^2·var(x_j): WIFV of An et al., "FLAP", 2023, eq. 5, without the
standardisation between layers, since every block keeps the same number of units. The constant part goes into the bias
of the matrix where it has one: the least-squares update does it, by a column of ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.criteria._common import best_units, column_scores, squared_norms
from secateur.plugins import Units


@dataclass(frozen=True, kw_only=True)
class Flap:
    """Fluctuation. It has no options."""

    name: ClassVar[str] = "flap"
    data: ClassVar[bool] = True

    def choose(self, units: Units, remove: int) -> Tensor:
        """Numbers of the units that stay.

        Raises:
            WeightValueError: when a weight or a statistic is not finite.
        """
        norms = squared_norms(units.weight)
        tokens = units.tokens
        variance = units.gram.diagonal().to(norms) / tokens - (units.sums.to(norms) / tokens).square()
        return best_units(column_scores(norms * variance.clamp_min(0), units.columns), remove, units.parts)
