"""Divides the zeros so that the predicted loss is smallest: an error curve for each matrix, and an exact choice.

Pruning a matrix W to Q changes its outputs by (W - Q) x. To second order, with the Fisher information taken to be
diagonal over the outputs o, that raises the loss per token by

    e(s) = 1/2 · sum_o g_o · |X (w_o - q_o)^T|^2 / tokens      g_o = mean over tokens of (d loss / d y_o)^2

Each matrix is pruned to ``levels`` sparsities from ``spread`` below to ``spread`` above what is asked for; its curve is
the lower convex hull of these e(s). Then the sum of all curves is minimised under the budget of zeros. Since they are
convex, the minimum is where all slopes de / d(zeros) are equal to one Lagrange multiplier, and it is found exactly:
pieces of all hulls are taken by ascending slope until there are zeros enough, the last one in part.

One dense forward over the calibration data, one backward on ``sequences`` windows with the model in memory, and a solve
for each matrix and level, one matrix at a time. Sources: the choice by Lagrange multipliers is that of Shoham and
Gersho, "Efficient bit allocation for an arbitrary set of quantizers", 1988; errors of layers as its curves are those of
Frantar and Alistarh, "SPDY", 2022; the weights g those of Theis et al., "Faster gaze prediction with dense networks and
Fisher pruning", 2018. Errors of different matrices are taken to add up, as they do while they are small.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.allocation._base import HIGHEST, Look, Need, Share
from secateur.errors import SparsityError, UsageError
from secateur.patterns import check_sparsity
from secateur.refit import row_errors

Curve = list[tuple[float, float]]
"""Points (sparsity, predicted loss), ascending in sparsity."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Predicted loss, divided best."""

    name: ClassVar[str] = "sensitivity"
    needs: ClassVar[Need] = "gram"
    gradients: ClassVar[bool] = True

    spread: float = 0.15
    """How far the sparsity of a matrix may be from that of all."""
    levels: int = 7
    """Sparsities that each matrix is tried at."""
    sequences: int = 8
    """Calibration windows that the loss is taken on, one backward for each."""
    length: int = 512
    """Tokens of each, at most."""
    solver: str = "sparsegpt"
    """Method that prunes to each level."""

    def __post_init__(self) -> None:
        for option, value, least in (
            ("levels", self.levels, 2), ("sequences", self.sequences, 1), ("length", self.length, 2),
        ):  # fmt: skip
            if value < least:
                raise UsageError(f"{option} of sensitivity is {value}", hint=f"it must be at least {least}")
        if not 0 < self.spread <= 0.5:
            raise UsageError(f"spread of sensitivity is {self.spread:g}", hint="it must be in (0, 0.5]; 0.15 is usual")

    def measure(self, look: Look) -> Tensor:
        """The curve of one matrix, (levels, 2) float64: sparsity and predicted loss in nats a token."""
        stats, fisher = look.stats, look.fisher
        if stats is None or stats.gram is None or fisher is None:
            raise ValueError("sensitivity needs the Gram matrix of the inputs and gradients of the outputs")
        gram = stats.gram.to(look.weight.device)
        points = []
        for level in levels_around(look.sparsity, self.spread, self.levels):
            errors = row_errors(gram, look.weight - look.solve(level))
            points.append((level, float((fisher.cpu().double() * errors).sum()) / (2 * max(1, stats.tokens))))
        return torch.tensor(points, dtype=torch.float64)

    def allocate(self, shares: Sequence[Share], sparsity: float) -> dict[str, float]:
        """Sparsity of each, so that the mean weighted by size is ``sparsity``.

        Raises:
            SparsityError: when the sparsity is outside [0, 0.95].
        """
        curves = {one.name: _curve(one.measured) for one in shares}
        return best_shares(curves, {one.name: one.size for one in shares}, sparsity)


def _curve(measured: Sequence[Tensor]) -> Curve:
    """The curve of one matrix, or of stacked experts, which all get the same sparsity: their errors add up."""
    errors = torch.stack([one[:, 1] for one in measured]).sum(dim=0)
    return list(zip(measured[0][:, 0].tolist(), errors.tolist(), strict=True))


def levels_around(sparsity: float, spread: float, count: int) -> list[float]:
    """So many sparsities at equal distances, the outermost ``spread`` away, all in [0, 0.95].

    Raises:
        SparsityError: when ``sparsity`` itself is outside.
    """
    check_sparsity(sparsity)
    if sparsity > HIGHEST:
        raise SparsityError(
            f"sparsity {sparsity:g} cannot be met: no matrix is pruned to more than {HIGHEST:g}",
            hint="use --allocation uniform, or another sparsity",
        )
    low, high = max(0.0, sparsity - spread), min(HIGHEST, sparsity + spread)
    return [low + (high - low) * step / (count - 1) for step in range(count)]


def best_shares(curves: Mapping[str, Curve], sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """The sparsities with the smallest sum of curves whose mean weighted by size is ``sparsity``.

    Args:
        curves: of each matrix, at least one point; between two points a curve is taken to be straight.

    Raises:
        SparsityError: when the curves do not reach from below to above ``sparsity``.
    """
    check_sparsity(sparsity)
    hulls = {name: convex_hull(curve) for name, curve in curves.items()}
    made = {name: hull[0][0] for name, hull in hulls.items()}
    missing = sum(sizes[name] * (sparsity - share) for name, share in made.items())
    most = sum(sizes[name] * (hull[-1][0] - hull[0][0]) for name, hull in hulls.items())
    slack = 1e-9 * sum(sizes[name] for name in curves)
    if missing < -slack or missing > most + slack:
        raise SparsityError(
            f"sparsity {sparsity:g} cannot be met: the matrices were tried at other sparsities only",
            hint="use --allocation uniform, or another sparsity",
        )
    pieces = [
        ((e1 - e0) / ((s1 - s0) * sizes[name]), name, s1 - s0)
        for name, hull in hulls.items() for (s0, e0), (s1, e1) in itertools.pairwise(hull)
    ]  # fmt: skip
    for _, name, width in sorted(pieces):  # the pieces of one hull come in their order: its slopes ascend
        taken = min(width, max(0.0, missing) / sizes[name])
        made[name] += taken
        missing -= taken * sizes[name]
    return made


def convex_hull(curve: Curve) -> Curve:
    """The points of a curve that lie on its lower convex hull."""
    hull: Curve = []
    for point in sorted(curve):
        if hull and point[0] == hull[-1][0]:
            continue  # of equal sparsities the lower loss comes first
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _above(first: tuple[float, float], middle: tuple[float, float], last: tuple[float, float]) -> bool:
    """Whether the middle point is on or above the line through the others."""
    run, rise = last[0] - first[0], last[1] - first[1]
    return (middle[1] - first[1]) * run >= rise * (middle[0] - first[0])
