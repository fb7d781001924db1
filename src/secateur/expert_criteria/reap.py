"""Removes the experts that add least where they are used: mean over their tokens of router weight times output norm.

Score S_e = mean over the tokens x routed to expert e of g_e(x)·|f_e(x)|, with g the weight by which the block itself
multiplies the expert's output f. An expert that no token reached scores 0. Source: Lasby et al., "REAP the Experts: Why
Pruning Prevails for One-Shot MoE Compression", 2025 (arXiv 2510.13999); there all blocks are scored in the whole model,
here each one behind blocks that are already cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.plugins import Experts


@dataclass(frozen=True, kw_only=True)
class Reap:
    """Router-weighted expert activation pruning. It has no options."""

    name: ClassVar[str] = "reap"
    data: ClassVar[bool] = True

    def score(self, experts: Experts) -> Tensor:
        """(experts,): the lowest go."""
        return experts.outputs / experts.tokens.clamp_min(1)
