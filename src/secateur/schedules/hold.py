"""Keeps the zeros that the model has.

The mask is W = 0 at the start, of every matrix with a share of zeros that is not chance, and never changes. Gradients
of held weights are cleared right after backward, so norms and moments see the kept weights only; weights are cleared
after each step, since weight decay and old moments move a weight without a gradient. A bool for each weight, no other
memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.errors import UsageError
from secateur.schedules._base import Pruner, Training


@dataclass(frozen=True, kw_only=True)
class Hold:
    """Fine-tuning with a fixed mask."""

    name: ClassVar[str] = "hold"
    in_parts: ClassVar[bool] = True
    """It compares no weights, so each process may hold a part of a matrix (FSDP2)."""

    def start(self, training: Training) -> Pruner:
        """Take the mask from the weights.

        Raises:
            UsageError: when there are no zeros to hold.
        """
        pruner = Pruner(training)
        if not training.zeros:
            raise UsageError(
                "the model has no zeros: there is no pattern to hold",
                hint="prune it first (`secateur prune`), or use a schedule that prunes, e.g. gradual",
            )
        pruner.pruned = dict(training.zeros)
        return pruner
