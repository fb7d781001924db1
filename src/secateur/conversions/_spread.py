"""A budget of parameters spread over matrices, by what each further parameter takes off the error."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from secateur.errors import BudgetError


@dataclass(frozen=True)
class Curve:
    """What a matrix may become: for each choice its parameters and its error, both as lists of the same length."""

    parameters: list[int]
    errors: list[float]

    def hull(self) -> list[int]:
        """Choices on the lower convex hull of error over parameters, from the cheapest to that of the least error."""
        order = sorted(range(len(self.errors)), key=lambda c: (self.parameters[c], self.errors[c]))
        kept: list[int] = []
        for choice in order:
            if kept and self.errors[choice] >= self.errors[kept[-1]]:
                continue
            while len(kept) > 1 and self._gain(kept[-2], kept[-1]) <= self._gain(kept[-1], choice):
                kept.pop()
            kept.append(choice)
        return kept

    def _gain(self, before: int, after: int) -> float:
        """Error that goes with each parameter that comes."""
        more = self.parameters[after] - self.parameters[before]
        return (self.errors[before] - self.errors[after]) / more if more else float("inf")


def spread(curves: Sequence[Curve], limit: int) -> list[int]:
    """A choice for each curve, at most ``limit`` parameters together, with the least sum of errors.

    The marginal gain is the same everywhere, as a Lagrange multiplier says: all steps along the hulls are taken in the
    order of their gain, each while it fits. What is left then goes where a choice between two steps fits.

    Raises:
        BudgetError: when the cheapest choices are more than the limit.
    """
    hulls = [curve.hull() for curve in curves]
    chosen = [hull[0] for hull in hulls]
    left = limit - sum(curve.parameters[c] for curve, c in zip(curves, chosen, strict=True))
    if left < 0:
        raise BudgetError(
            f"the budget leaves {limit:,} parameters, and rank 1 everywhere takes {limit - left:,}",
            hint="give a larger share",
        )
    steps = sorted(
        (-curve._gain(a, b), m, place)
        for m, (curve, hull) in enumerate(zip(curves, hulls, strict=True))
        for place, (a, b) in enumerate(itertools.pairwise(hull))
    )
    stuck: dict[int, None] = {}
    for _, m, place in steps:
        more = curves[m].parameters[hulls[m][place + 1]] - curves[m].parameters[chosen[m]]
        if m in stuck or more > left:
            stuck[m] = None
            continue
        chosen[m] = hulls[m][place + 1]
        left -= more
    for m in stuck:
        curve, now = curves[m], chosen[m]
        fits = [c for c, size in enumerate(curve.parameters) if size - curve.parameters[now] <= left]
        best = min(fits, key=lambda c: (curve.errors[c], curve.parameters[c]))
        if curve.errors[best] < curve.errors[now]:
            left -= curve.parameters[best] - curve.parameters[now]
            chosen[m] = best
    return chosen
