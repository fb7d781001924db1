"""The quantities that a study can weigh: their names, which way is better, and how a limit on one is written"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from secateur.budgets import parse_size
from secateur.errors import StudyError, UnknownNameError

Direction = Literal["minimize", "maximize"]

QUANTITIES: dict[str, Direction] = {
    "perplexity": "minimize",
    "nll_per_token": "minimize",
    "bytes_disk": "minimize",
    "parameters": "minimize",
    "nonzero": "minimize",
    "sparsity": "maximize",
    "flops_per_token": "minimize",
    "sparse_flops_per_token": "minimize",
    "decode_tokens_per_second": "maximize",
    "seconds": "minimize",
}
"""Everything that can be an objective or have a limit, and which way is better."""
QUALITY = ("perplexity", "nll_per_token")
FLOPS = ("flops_per_token", "sparse_flops_per_token")
COSTLY = (*QUALITY, "decode_tokens_per_second", "seconds")
"""What is not known yet when a model was pruned and its size counted."""


def read_objectives(data: Any) -> dict[str, Direction]:
    """Objective -> direction, of ``perplexity: minimize``.

    Raises:
        StudyError: when there is none, or a direction is no direction.
        UnknownNameError: for an unknown objective or direction; the nearest is suggested.
    """
    if not isinstance(data, Mapping) or not data:
        raise StudyError("objectives are missing", hint="for example: objectives: {perplexity: minimize}")
    found: dict[str, Direction] = {}
    for raw, direction in data.items():
        name = str(raw).replace("-", "_")
        if name not in QUANTITIES:
            raise UnknownNameError("objective", str(raw), QUANTITIES)
        if direction not in ("minimize", "maximize"):
            raise UnknownNameError(f"direction of {name}", str(direction), ("minimize", "maximize"))
        found[name] = direction
    return found


@dataclass(frozen=True)
class Constraint:
    """At most, or at least, so much of a quantity; with ``relative``, so many times the dense model's."""

    text: str
    name: str
    at_most: bool
    value: float
    relative: bool = False

    def limit(self, dense: Mapping[str, float | None]) -> float | None:
        """The limit in the unit of the quantity; None when it hangs on a value the dense model lacks."""
        if not self.relative:
            return self.value
        whole = dense.get(self.name)
        return None if whole is None else whole * self.value

    def violation(self, values: Mapping[str, float | None], dense: Mapping[str, float | None]) -> float | None:
        """By which share of the limit a model is beyond it, 0 or less when it is met; None when that is not known."""
        value, limit = values.get(self.name), self.limit(dense)
        if value is None or limit is None:
            return None
        beyond = value - limit if self.at_most else limit - value
        return beyond / (abs(limit) or 1.0)


def parse_constraint(text: Any) -> Constraint:
    """Read ``bytes_disk <= 150MB``, ``perplexity <= 1.1x`` or ``sparsity >= 0.5``.

    Raises:
        StudyError: for a text of another form, or a value that makes no sense.
        UnknownNameError: for an unknown quantity; the nearest is suggested.
    """
    match = re.fullmatch(r"\s*([A-Za-z_-]+)\s*(<=|>=)\s*(\S.*?)\s*", str(text))
    if not match:
        raise StudyError(
            f"constraint '{text}' is not QUANTITY <= VALUE or QUANTITY >= VALUE",
            hint="for example: bytes_disk <= 150MB, perplexity <= 1.1x or sparsity >= 0.5",
        )
    name, said = match[1].replace("-", "_"), match[3]
    if name not in QUANTITIES:
        raise UnknownNameError("quantity in a constraint", match[1], QUANTITIES)
    relative = said[-1] in "xX"
    number = _number(said[:-1] if relative else said)
    if number is None and name == "bytes_disk" and not relative:
        size = parse_size(said)
        number = None if size is None else float(size)
    if number is None or number < 0 or (relative and number == 0):
        raise StudyError(
            f"constraint '{text}': '{said}' is no value of {name}",
            hint="give a number, times the dense model's (1.1x), or for bytes_disk a size (150MB)",
        )
    if name == "sparsity" and relative:
        raise StudyError(f"constraint '{text}': the dense model's sparsity is no measure", hint="for example 0.5")
    return Constraint(str(text), name, match[2] == "<=", number, relative)


def _number(text: str) -> float | None:
    text = text.strip()
    if re.fullmatch(r"(\d+(\.\d*)?|\.\d+)(e-?\d+)?", text):
        return float(text)
    percent = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text)
    return float(percent[1]) / 100 if percent else None


@dataclass(frozen=True)
class Reach:
    """The least and the most of a quantity that any setting of a space can give, and why."""

    low: float
    high: float
    why: str


def check_constraints(
    constraints: Sequence[Constraint], reach: Mapping[str, Reach], dense: Mapping[str, float | None]
) -> None:
    """Refuse constraints that no trial can meet.

    Args:
        reach: quantity -> what the space can give, as far as that is known.
        dense: measured values of the dense model, as far as they are known; limits that hang on others are passed over.

    Raises:
        StudyError: naming the constraint, or the two that contradict each other.
    """
    limits = [(one, one.limit(dense)) for one in constraints]
    known = [(one, limit) for one, limit in limits if limit is not None]
    # Two relative ones can be compared before the dense model is measured.
    known += [(one, one.value) for one, limit in limits if limit is None]
    for one, upper in known:
        for other, lower in known:
            comparable = one.relative == other.relative or None not in (one.limit(dense), other.limit(dense))
            if one.name == other.name and one.at_most and not other.at_most and lower > upper and comparable:
                raise StudyError(
                    f"no trial can meet both '{one.text}' and '{other.text}'", hint="loosen one of the two constraints"
                )
    for one, limit in limits:
        if limit is None or one.name not in reach:
            continue
        span = reach[one.name]
        if one.at_most and span.low > limit * (1 + 1e-9):
            raise StudyError(
                f"no trial can meet '{one.text}': {one.name} is at least {span.low:,.6g} ({span.why})",
                hint="loosen the constraint, or widen the space",
            )
        if not one.at_most and span.high < limit * (1 - 1e-9):
            raise StudyError(
                f"no trial can meet '{one.text}': {one.name} is at most {span.high:,.6g} ({span.why})",
                hint="loosen the constraint, or widen the space",
            )


def violations(
    constraints: Sequence[Constraint], values: Mapping[str, float | None], dense: Mapping[str, float | None]
) -> dict[str, float | None]:
    """Text of each constraint -> by which share it is missed; 0 or less is met, None not known."""
    return {one.text: one.violation(values, dense) for one in constraints}


def meets(missed: Mapping[str, float | None]) -> bool | None:
    """Whether all constraints are met; None while that is not known."""
    if any(value is not None and value > 0 for value in missed.values()):
        return False
    return None if None in missed.values() else True
