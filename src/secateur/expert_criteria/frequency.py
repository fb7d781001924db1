"""Removes the experts that the fewest calibration tokens are routed to.

Score S_e = number of tokens routed to expert e. Source: the usual baseline; Lu et al., "Not All Experts are Equal",
2024, and Lasby et al., "REAP the Experts", 2025, compare with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.plugins import Experts


@dataclass(frozen=True, kw_only=True)
class Frequency:
    """Use of the experts. It has no options."""

    name: ClassVar[str] = "frequency"
    data: ClassVar[bool] = True

    def score(self, experts: Experts) -> Tensor:
        """(experts,): the lowest go."""
        return experts.tokens
