"""Removes the units that add least to the output on average: squared column norm times mean squared input.

Score S_u = sum over the columns j of unit u of |W_:j|^2·mean(x_j^2): Wanda's score (Sun et al., 2023, eq. 1), squared
and summed over the outputs, so that it is the output energy of the unit when its inputs are not correlated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.criteria._common import best_units, column_scores, squared_norms
from secateur.plugins import Units


@dataclass(frozen=True, kw_only=True)
class Wanda:
    """Weights and activations. It has no options."""

    name: ClassVar[str] = "wanda"
    data: ClassVar[bool] = True

    def choose(self, units: Units, remove: int) -> Tensor:
        """Numbers of the units that stay.

        Raises:
            WeightValueError: when a weight or a statistic is not finite.
        """
        norms = squared_norms(units.weight)
        energy = units.gram.diagonal().to(norms) / units.tokens
        return best_units(column_scores(norms * energy, units.columns), remove, units.parts)
