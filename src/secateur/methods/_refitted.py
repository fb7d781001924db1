"""A method whose kept weights are solved anew at the end, and which methods that is done for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from secateur.errors import UsageError
from secateur.patterns import Pattern
from secateur.plugins import Method, Solved, StatisticsKind, Target, sees_dense_block
from secateur.refit import refit
from secateur.statistics import InputStatistics


def with_refit(method: Method, asked: bool | None) -> Method:
    """The method with or without a refit at its end.

    Args:
        asked: None refits where the method has a Gram matrix anyway. A method with an option ``refit_steps`` does its
            own; False sets its steps to 0.

    Raises:
        UsageError: when a refit is asked for beside ``refit_steps=0``.
    """
    steps = getattr(method, "refit_steps", None)
    if steps is not None:
        if asked and not steps:
            raise UsageError(f"--refit and refit_steps=0 of {name_of(method)} contradict", hint="leave one of them out")
        options: Any = method
        return dataclasses.replace(options, refit_steps=0) if asked is False else method
    wanted = method.statistics == "gram" if asked is None else asked
    if not wanted or isinstance(method, Refitted):
        return method
    made: Any = Refitted(method)
    return cast("Method", made)


def name_of(method: Method) -> str:
    """What a method is called."""
    return str(getattr(method, "name", type(method).__name__))


@dataclass(frozen=True)
class Refitted:
    """A method, and then least squares on its mask (`secateur.refit`); it asks for the Gram matrix.

    The mask is the one that was found, and the error of the outputs is never larger than before.
    """

    statistics: ClassVar[StatisticsKind] = "gram"
    method: Method

    def sees_dense_block(self, pattern: Pattern) -> bool:
        """As the method says."""
        return sees_dense_block(self.method, pattern)

    def plan(self, names: Sequence[str], load: Callable[[str], Tensor], sparsity: float) -> dict[str, int] | None:
        """Zeros of each matrix, where the method fixes them over the whole model."""
        planner = getattr(self.method, "plan", None)
        return None if planner is None else planner(names, load, sparsity)

    def solve(
        self, weight: Tensor, stats: InputStatistics | None, target: Target, *, generator: torch.Generator
    ) -> Solved:
        """Prune one matrix and refit what stays.

        Raises:
            SecateurError: whatever the method refuses.
            ValueError: without a Gram matrix, or when it is of another width.
        """
        if stats is None or stats.gram is None or stats.in_features != weight.shape[1]:
            raise ValueError(f"a refit needs the Gram matrix of {weight.shape[1]} inputs")
        solved = self.method.solve(
            weight, None if self.method.statistics == "none" else stats, target, generator=generator
        )
        dead = stats.dead().to(weight.device)
        if bool(solved.mask.all()) or bool(dead.all()):
            return solved  # nothing went, or nothing is known of the inputs
        made, before, after = refit(weight, solved.weight, solved.mask, stats.gram.to(weight.device), dead)
        return Solved(made, solved.mask, after, solved.notes, before)
