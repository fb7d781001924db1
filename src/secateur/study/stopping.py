"""When a trial is given up: what a few windows of text say of it, against what it would have to beat"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.study.values import QUALITY, Constraint, Direction


@dataclass(frozen=True)
class Bar:
    """What a new trial is held against. All plain data, so that it can travel to another machine."""

    windows: int
    factor: float
    limits: Sequence[tuple[str, float]] = ()
    """Text of a constraint, and the negative log-likelihood per token on the first windows that it stands for."""
    rivals: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    """Complete trials with the same recovery: number, proxy (perplexity) and others {objective: value}."""
    objectives: Mapping[str, Direction] = field(default_factory=dict)
    """The objectives besides quality; empty when quality is the only one."""
    rivalry: bool = True
    """Whether quality is an objective at all."""


def limits_of(
    constraints: Sequence[Constraint], dense: Mapping[str, float | None], dense_first: float
) -> list[tuple[str, float]]:
    """The limits on quality, carried over to the first windows by the dense model, which was measured on both.

    Args:
        dense_first: nats per token of the dense model on the first windows.
    """
    found = []
    whole = dense.get("nll_per_token")
    for one in constraints:
        limit = one.limit(dense)
        if one.name in QUALITY and one.at_most and limit and whole is not None:
            nll = math.log(limit) if one.name == "perplexity" else limit
            found.append((one.text, nll + dense_first - whole))
    return found


def hopeless(bar: Bar, nll: float, known: Mapping[str, float | None]) -> str:
    """Why a pruned model is given up; empty when it is not.

    It is given up when its perplexity on the first windows is more than ``factor`` times what a constraint allows, or
    that of a complete trial which is no worse in every other objective. With other objectives that are known only
    when all is measured (speed), trials are not compared.

    Args:
        nll: nats per token on the first windows.
        known: what was counted after pruning, by name.
    """
    proxy = exp(nll)
    for text, limit in bar.limits:
        if nll > limit + math.log(bar.factor):
            return (
                f"perplexity {proxy:,.4g} on the first {bar.windows} windows is more than {bar.factor:g} times the "
                f"{exp(limit):,.4g} that '{text}' stands for there"
            )
    if not bar.rivalry or any(known.get(name) is None for name in bar.objectives):
        return ""
    for rival in sorted(bar.rivals, key=lambda one: (one["proxy"], one["number"])):
        if proxy > bar.factor * rival["proxy"] and all(
            _no_worse(rival["others"].get(name), known[name], way) for name, way in bar.objectives.items()
        ):
            beside = f" and is no better in {', '.join(bar.objectives)}" if bar.objectives else ""
            return (
                f"perplexity {proxy:,.4g} on the first {bar.windows} windows is more than {bar.factor:g} times the "
                f"{rival['proxy']:,.4g} of trial {rival['number']}{beside}"
            )
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
