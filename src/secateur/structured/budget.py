"""Splits a budget among depth and widths: of all splits that meet it, those with the least predicted loss.

Each structure alone was measured: the loss above that of the whole model, without the first n blocks of an order, or
with s units in every block. What several structures cost together is predicted as the sum; the best few are measured
as a whole afterwards (`secateur.structured.ladder`). Variants of blocks, measured alone and combined
under a limit, are the idea of Bercovich et al., "Puzzle", 2024; there every block is chosen by itself, here one config
speaks for all blocks, so that all splits can be looked at.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from secateur.structured.costs import Cost
from secateur.structured.couplings import Kind

MEASURED_SIZES = 4
"""Sizes of a structure at which its loss is measured."""


@dataclass(frozen=True)
class Curve:
    """Loss above the whole model's by number of units that stay: measured at some, a line between them.

    A smaller size never counts as better than a larger one.
    """

    sizes: Sequence[int]
    """Ascending; the last one is the whole."""
    excess: Sequence[float]

    @classmethod
    def through(cls, points: Mapping[int, float], whole: int) -> Curve:
        """The curve through measured points, and zero at the whole."""
        sizes = [*sorted(points), whole]
        excess, worst = [0.0], 0.0
        for size in sorted(points, reverse=True):
            worst = max(worst, points[size])
            excess.append(worst)
        return cls(sizes, excess[::-1])

    def at(self, size: int) -> float:
        """The loss at a size between the smallest measured and the whole; infinite below."""
        if size < self.sizes[0]:
            return math.inf
        if size >= self.sizes[-1]:
            return 0.0
        right = max(1, bisect.bisect_left(self.sizes, size))
        low, high = self.sizes[right - 1], self.sizes[right]
        below, above = self.excess[right - 1], self.excess[right]
        if size == high or math.isinf(below):
            return above if size == high else below
        return below + (size - low) / (high - low) * (above - below)


@dataclass(frozen=True)
class Split:
    """One way to meet a budget."""

    gone: tuple[int, ...]
    """Blocks to leave out."""
    kept: Mapping[Kind, int]
    """By kind, units that stay in each block; kinds that stay whole are not named."""
    cost: float
    predicted: float
    """Loss above the whole model's."""


def least(cost: Cost, smallest: Mapping[Kind, int], *, depth: bool) -> float:
    """The least that can be reached: one block, where blocks can go, with the smallest number of units."""
    count = len(cost.blocks)
    if not depth:
        return cost.of((), smallest)
    return min(cost.of([index for index in range(count) if index != only], smallest) for only in range(count))


def ladder(cost: Cost, limit: float, kind: Kind, sizes: Sequence[int]) -> list[int]:
    """The sizes of a kind at which its loss is to be measured, descending.

    None is below the largest with which this kind alone meets the limit: a split has no use for less. Where it cannot
    meet it alone, the smallest size is the end.

    Args:
        sizes: that may stay, descending, all smaller than the whole.
    """
    end = next((place for place, size in enumerate(sizes) if cost.of((), {kind: size}) <= limit), len(sizes) - 1)
    count = min(MEASURED_SIZES, end + 1)
    return [sizes[(end + 1) * (step + 1) // count - 1] for step in range(count)]


def splits(
    cost: Cost, limit: float, order: Sequence[int], depth: Sequence[float], sizes: Mapping[Kind, Sequence[int]],
    curves: Mapping[Kind, Curve],
) -> list[Split]:  # fmt: skip
    """The best split for every number of blocks and of units of all kinds but one, by predicted loss.

    Args:
        limit: the most that may be left of the cost.
        order: blocks in the order in which they go.
        depth: loss above the whole model's after each.
        sizes: by kind, numbers of units that may stay, descending; the whole need not be named.
        curves: by kind, loss at these sizes; it does not fall with smaller sizes.
    """
    choices = {kind: [cost.before[kind], *(size for size in own if size != cost.before[kind])]
               for kind, own in sizes.items()}  # fmt: skip
    # Of the kind with the most sizes the largest that fits is the best, so it need not be tried size by size.
    fine = max(choices, key=lambda kind: len(choices[kind]), default=None)
    others = [kind for kind in choices if kind != fine]
    found = []
    for count in range(len(order) + 1):
        gone = order[:count]
        for combination in itertools.product(*(choices[kind] for kind in others)):
            kept = dict(zip(others, combination, strict=True))
            if fine is not None:
                own = choices[fine]
                place = bisect.bisect_left(own, -limit, key=lambda size: -cost.of(gone, {**kept, fine: size}))
                if place == len(own):
                    continue
                kept[fine] = own[place]
            price = cost.of(gone, kept)
            if price > limit:
                continue
            predicted = (depth[count - 1] if count else 0.0) + sum(curves[kind].at(size) for kind, size in kept.items())
            if math.isfinite(predicted):
                cut = {kind: size for kind, size in kept.items() if size < cost.before[kind]}
                found.append(Split(tuple(sorted(gone)), cut, price, predicted))
    return sorted(found, key=lambda split: (split.predicted, split.cost, split.gone))
