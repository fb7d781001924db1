"""When a trial is given up: what a small part of the texts says of it, against what it would have to beat"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.study.values import Constraint, Direction


@dataclass(frozen=True)
class Bar:
    """What a new trial is held against. All plain data, so that it can travel to another machine."""

    windows: int
    """How many windows, or labelled texts, are looked at."""
    factor: float
    limits: Sequence[tuple[str, float]] = ()
    """Text of a constraint, and the badness on the first part that it stands for."""
    rivals: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    """Complete trials with the same recovery: number, proxy (perplexity, share of wrong texts) and others {objective:
    value}."""
    objectives: Mapping[str, Direction] = field(default_factory=dict)
    """The objectives besides quality; empty when quality is the only one."""
    rivalry: bool = True
    """Whether quality is an objective at all."""
    labels: bool = False
    """Whether texts are labelled: badness is the share of wrong ones then, else the perplexity, and in both cases told
    by its logarithm."""

    def told(self, badness: float) -> str:
        """A badness in words."""
        return f"share of wrong texts {exp(badness):.3f}" if self.labels else f"perplexity {exp(badness):,.4g}"


def limits_of(
    constraints: Sequence[Constraint], dense: Mapping[str, float | None], dense_first: float
) -> list[tuple[str, float]]:
    """The limits on quality as badness on the first part, carried over by the dense model, measured on both.

    Where the dense model has fewer wrong texts in the first part than in all, the limit stays: few say little.

    Args:
        dense_first: badness of the dense model on the first part.
    """
    found = []
    nll, accuracy = dense.get("nll_per_token"), dense.get("accuracy")
    for one in constraints:
        limit = one.limit(dense)
        if not one.keeps_quality or limit is None:
            continue
        if one.name == "accuracy" and accuracy is not None:
            wrong = 1 - limit + max(0.0, math.exp(dense_first) - (1 - accuracy))
            found.append((one.text, math.log(max(wrong, 1e-9))))
        elif nll is not None and limit:
            found.append((one.text, (math.log(limit) if one.name == "perplexity" else limit) + dense_first - nll))
    return found


def hopeless(bar: Bar, nll: float, known: Mapping[str, float | None]) -> str:
    """Why a model is given up; empty when it is not.

    It is given up when its perplexity, or share of wrong texts, on the first part is more than ``factor`` times what a
    constraint allows, or that of a complete trial which is no worse in every other objective. With other objectives
    that are known only when all is measured (speed), trials are not compared.

    Args:
        nll: badness on the first part.
        known: what was counted after pruning, by name.
    """
    first = f"on the first {bar.windows} {'texts' if bar.labels else 'windows'} is more than {bar.factor:g} times the"
    for text, limit in bar.limits:
        if nll > limit + math.log(bar.factor):
            return f"{bar.told(nll)} {first} {bar.told(limit).rsplit(' ', 1)[1]} that '{text}' stands for there"
    if not bar.rivalry or any(known.get(name) is None for name in bar.objectives):
        return ""
    for rival in sorted(bar.rivals, key=lambda one: (one["proxy"], one["number"])):
        if exp(nll) > bar.factor * rival["proxy"] and all(
            _no_worse(rival["others"].get(name), known[name], way) for name, way in bar.objectives.items()
        ):
            beside = f" and is no better in {', '.join(bar.objectives)}" if bar.objectives else ""
            theirs = bar.told(math.log(rival["proxy"])).rsplit(" ", 1)[1]
            return f"{bar.told(nll)} {first} {theirs} of trial {rival['number']}{beside}"
    return ""


def _no_worse(rival: float | None, own: float | None, way: Direction) -> bool:
    if rival is None or own is None:
        return False
    return rival <= own if way == "minimize" else rival >= own


def exp(nll: float) -> float:
    """Perplexity of a negative log-likelihood; infinite when it is beyond the largest float."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
