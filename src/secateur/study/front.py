"""Which trials are best: the front of those that no other betters in everything, its knee, and the finalists"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from secateur.study.values import Direction
from secateur.study_result import Trial

Points = Mapping[int, tuple[float, ...]]
"""Number of a trial -> its objectives, each turned so that less is better."""


def points_of(trials: Sequence[Trial], objectives: Mapping[str, Direction]) -> dict[int, tuple[float, ...]]:
    """The complete trials that meet the constraints and have a value in every objective."""
    found = {}
    for trial in trials:
        values = [trial.values.get(name) for name in objectives]
        if trial.state == "complete" and trial.meets is not False and None not in values:
            signs = [1.0 if way == "minimize" else -1.0 for way in objectives.values()]
            found[trial.number] = tuple(
                sign * value for sign, value in zip(signs, values, strict=True) if value is not None
            )
    return found


def best_of(points: Points, objectives: Mapping[str, Direction]) -> dict[str, int]:
    """Objective -> number of the best trial in it; of equal ones the first."""
    return {
        name: min(points, key=lambda number, at=at: (points[number][at], number))  # type: ignore[misc]
        for at, name in enumerate(objectives)
        if points
    }


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether one is nowhere worse and somewhere better; less is better."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))


def front_of(points: Points) -> list[int]:
    """Numbers of those that no other dominates, ascending. Of equal ones all stay."""
    return sorted(
        number for number, point in points.items() if not any(dominates(other, point) for other in points.values())
    )


def knee_of(points: Points, front: Sequence[int]) -> int | None:
    """The trial of the front that lies farthest below the chord between its ends, on normalised log axes.

    Each axis runs from 0 (the best of the front) to 1 (its worst), in the logarithm where all values have one sign; the
    chord is the line (with more objectives the plane) through the points that are best in one and worst in all others.
    With one objective this is its best trial. Of equally far ones the first is taken.
    """
    scaled = _scaled(points, front)
    return min(front, key=lambda number: (round(sum(scaled[number]), 12), number)) if front else None


def _scaled(points: Points, front: Sequence[int]) -> dict[int, list[float]]:
    axes = []
    for axis in zip(*(points[number] for number in front), strict=True):
        numbers = list(axis)
        if all(value > 0 for value in numbers):
            numbers = [math.log(value) for value in numbers]
        elif all(value < 0 for value in numbers):
            numbers = [-math.log(-value) for value in numbers]
        low, span = min(numbers), max(numbers) - min(numbers)
        axes.append([(value - low) / span if span else 0.0 for value in numbers])
    return {number: [axis[at] for axis in axes] for at, number in enumerate(front)}


def finalists_of(points: Points, front: Sequence[int], count: int) -> list[int]:
    """So many of the front: the knee, the best of each objective, then each time the one farthest from those chosen."""
    knee = knee_of(points, front)
    if knee is None:
        return []
    scaled = _scaled(points, front)
    chosen = [knee]
    for axis in range(len(scaled[knee])):
        best = min(front, key=lambda number: (scaled[number][axis], sum(scaled[number]), number))
        if best not in chosen:
            chosen.append(best)
    rest = [number for number in front if number not in chosen]
    while rest and len(chosen) < count:
        far = max(rest, key=lambda number: (min(math.dist(scaled[number], scaled[c]) for c in chosen), -number))
        chosen.append(far)
        rest.remove(far)
    return chosen[:count]


def how_recommended(objectives: Mapping[str, Direction]) -> str:
    """How `knee_of` chose, in words."""
    if len(objectives) == 1:
        (name,) = objectives
        return f"the best in {name} of those that meet the constraints"
    return (
        f"the knee of the front of {', '.join(objectives)}: farthest below the chord between its ends, each objective "
        "on a logarithmic axis from its best to its worst on the front"
    )
