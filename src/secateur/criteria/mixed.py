"""Neurons as wanda chooses them, whole heads and groups as obs does: the default for units.

The costs of obs are those of one matrix on the calibration tokens. For heads and groups, few and large, that is what
counts. Of a thousand neurons it keeps those that a few tokens with very large inputs hang on, and the model with the
most energy left was better on text kept aside: docs/structured.md has the figures. The same least squares follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.criteria.obs import Obs
from secateur.criteria.wanda import Wanda
from secateur.plugins import Units


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """One criterion for units of a single column, one for those of several. It has no options."""

    name: ClassVar[str] = "mixed"
    data: ClassVar[bool] = True

    def choose(self, units: Units, remove: int) -> Tensor:
        """Numbers of the units that stay.

        Raises:
            WeightValueError: when a weight or a statistic is not finite.
        """
        criterion = Wanda() if units.columns.shape[1] == 1 else Obs()
        return criterion.choose(units, remove)
