"""Pareto fronts: of many models, those that no other betters in both of two quantities, and the knee among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from secateur.report_result import Comparison, Front, ReportModel

Better = Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Axis:
    """What quality is drawn against."""

    name: str
    title: str
    better: Better
    absent: str
    """Why no model may have it."""
    of: Literal["any", "text", "labels"] = "any"
    """Which models can have it: those that continue text, or those of a study of labelled texts."""


AXES = (
    Axis("bytes_disk", "bytes on disk", "minimize", "no input says how large its models are"),
    Axis(
        "decode_speedup",
        "decoding speed, times that of the dense model in the same run",
        "maximize",
        "no input has the speed of a model and of its dense model: prune measures both unless --no-evaluate is given, "
        "secateur bench MODEL --against DENSE --json too",
        "text",
    ),
    Axis(
        "sentences_speedup",
        "sentences a second one at a time, times those of the dense model in the same run",
        "maximize",
        "its study did not ask for sentences_per_second",
        "labels",
    ),
    Axis(
        "sentences_speedup_batch_32",
        "sentences a second at batch 32, times those of the dense model in the same run",
        "maximize",
        "its study did not ask for sentences_per_second_batch_32",
        "labels",
    ),
    Axis(
        "flops_per_token",
        "operations, floating-point for a token",
        "minimize",
        "no input counts operations: secateur bench MODEL --json does",
    ),
    Axis(
        "joules_per_token",
        "energy, joules for a token",
        "minimize",
        "no input has energy: secateur bench MODEL --json meters it where the machine has a meter",
        "text",
    ),
    Axis(
        "joules_per_thousand_sentences",
        "energy, joules for a thousand sentences at batch 32",
        "minimize",
        "it was not metered",
        "labels",
    ),
)


_LOSSES = ("perplexity", "nll_per_token", "bits_per_byte")
"""Qualities that are better the smaller."""


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Numbers of the points that no other betters; both numbers of a point are better the smaller.

    Of equal points the first is kept. Sorted by the first number, so that the second falls.
    """
    front: list[int] = []
    for number in sorted(range(len(points)), key=lambda i: (points[i], i)):
        if not front or points[number][1] < points[front[-1]][1]:
            front.append(number)
    return front


def knee(points: Sequence[tuple[float, float]]) -> int | None:
    """Number of the point of a front that lies farthest below the line between its ends, each quantity scaled to 1.

    Below: where both numbers are smaller than on the line. None when no point does, as with fewer than three.
    """
    if len(points) < 3:
        return None
    (x0, y0), (x1, y1) = points[0], points[-1]
    if x0 == x1 or y0 == y1:
        return None
    depths = [1 - (x - x0) / (x1 - x0) - (y - y1) / (y0 - y1) for x, y in points]
    best = max(range(len(points)), key=lambda i: depths[i])
    return best if depths[best] > 1e-12 else None


def quality_of(models: Sequence[ReportModel]) -> tuple[str, Better]:
    """Which value is the quality that most of these models have: perplexity before accuracies; empty when none."""
    names = dict.fromkeys(name for model in models for name in model.values if is_quality(name))
    if not names:
        return "", "minimize"
    best = max(names, key=lambda n: (sum(n in model.values for model in models), n == "perplexity"))
    return best, "minimize" if best in (*_LOSSES, "loss") else "maximize"


def is_quality(name: str) -> bool:
    """Whether a value says how good a model is."""
    return name in _LOSSES or name.startswith(("accuracy", "macro_f1"))


def of_labels(comparison: Comparison) -> bool:
    """Whether the labels of a study's texts judged its models: `evaluate` names a file in its accuracy."""
    return comparison.quality == "accuracy"


def draw_fronts(comparison: Comparison, models: Sequence[ReportModel]) -> None:
    """Fill in the fronts of a comparison, and for every axis without one the reason."""
    left_out = "text" if of_labels(comparison) else "labels"
    for axis in AXES:
        if axis.of == left_out:
            continue
        both = [
            number
            for number in comparison.models
            if comparison.quality in models[number].values and axis.name in models[number].values
        ]
        own = [models[number].missing.get(axis.name, "") for number in comparison.models]
        if not comparison.quality:
            comparison.missing[axis.name] = "quality was not measured"
        elif len(both) < 2:
            having = sum(axis.name in models[number].values for number in comparison.models)
            reason = axis.absent if not having else f"only {having} of the models with a quality has it"
            comparison.missing[axis.name] = next((f"{axis.absent}: {text}" for text in own if text), reason)
        else:
            comparison.fronts.append(_front(axis, comparison, both, models))


def _front(axis: Axis, comparison: Comparison, both: list[int], models: Sequence[ReportModel]) -> Front:
    def point(number: int) -> tuple[float, float]:
        quality = models[number].values[comparison.quality]
        if comparison.better == "maximize":
            quality = -quality
        elif quality > 0:
            quality = math.log(quality)  # twice the perplexity is as much worse wherever it starts
        value = models[number].values[axis.name]
        return quality, -value if axis.better == "maximize" else value

    # A model that breaks a constraint of its study is drawn, but is no choice.
    allowed = [number for number in both if models[number].meets is not False]
    points = [point(number) for number in allowed]
    front = pareto(points)
    bend = knee([points[i] for i in front])
    return Front(
        axis.name, axis.better, both, [allowed[i] for i in front], None if bend is None else allowed[front[bend]]
    )
