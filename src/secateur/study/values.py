"""The quantities that a study can weigh: their names, which way is better, and how a limit on one is written"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from secateur.budgets import parse_size
from secateur.errors import StudyError, UnknownNameError

Direction = Literal["minimize", "maximize"]
Task = Literal["language", "labels"]
"""What the models of a study do: continue text, or choose one class for a text."""
TASKS: tuple[Task, ...] = ("language", "labels")

_COUNTED: dict[str, Direction] = {
    "bytes_disk": "minimize",
    "parameters": "minimize",
    "nonzero": "minimize",
    "sparsity": "maximize",
    "flops_per_token": "minimize",
    "sparse_flops_per_token": "minimize",
    "seconds": "minimize",
}
QUANTITIES: dict[Task, dict[str, Direction]] = {
    "language": {
        "perplexity": "minimize",
        "nll_per_token": "minimize",
        **_COUNTED,
        "decode_tokens_per_second": "maximize",
        "bytes_resident": "minimize",
        "joules_per_token": "minimize",
    },
    "labels": {
        "accuracy": "maximize",
        **_COUNTED,
        "sentences_per_second": "maximize",
        "sentences_per_second_batch_32": "maximize",
        "joules_per_thousand_sentences": "minimize",
    },
}
"""For each task everything that can be an objective or have a limit, and which way is better."""
QUALITY = ("perplexity", "nll_per_token", "accuracy")
SIZES = ("bytes_disk", "bytes_resident")
FLOPS = ("flops_per_token", "sparse_flops_per_token")
ENERGY: dict[Task, str] = {"language": "joules_per_token", "labels": "joules_per_thousand_sentences"}
SPEED = ("decode_tokens_per_second", "bytes_resident", "sentences_per_second", "sentences_per_second_batch_32",
         *ENERGY.values())  # fmt: skip
"""What is measured by running a model for its time, memory or energy, and only when it is asked for."""
COSTLY = (*QUALITY, *SPEED, "seconds")
"""What is not known yet when a model was made and its size counted."""


def read_objectives(data: Any, task: Task = "language") -> dict[str, Direction]:
    """Objective -> direction, of ``perplexity: minimize``.

    Raises:
        StudyError: when there is none, one is not measured in this task, or a direction is no direction.
        UnknownNameError: for an unknown objective or direction; the nearest is suggested.
    """
    if not isinstance(data, Mapping) or not data:
        best = next(iter(QUANTITIES[task].items()))
        raise StudyError("objectives are missing", hint=f"for example: objectives: {{{best[0]}: {best[1]}}}")
    found: dict[str, Direction] = {}
    for raw, direction in data.items():
        name = _quantity(str(raw), "objective", task)
        if direction not in ("minimize", "maximize"):
            raise UnknownNameError(f"direction of {name}", str(direction), ("minimize", "maximize"))
        found[name] = direction
    return found


def _quantity(raw: str, what: str, task: Task) -> str:
    name = raw.replace("-", "_")
    if name in QUANTITIES[task]:
        return name
    for other, names in QUANTITIES.items():
        if name in names:
            hint = "labelled texts need task: labels" if other == "labels" else "leave task: labels out"
            raise StudyError(f"{what} {name} is not measured in a study with task {task}", hint=hint)
    raise UnknownNameError(what, raw, QUANTITIES[task])


@dataclass(frozen=True)
class Constraint:
    """At most, or at least, ``value`` plus ``factor`` times what the dense model has of a quantity."""

    text: str
    name: str
    at_most: bool
    value: float
    factor: float = 0.0

    def limit(self, dense: Mapping[str, float | None]) -> float | None:
        """The limit in the unit of the quantity; None when it hangs on a value the dense model lacks."""
        if not self.factor:
            return self.value
        whole = dense.get(self.name)
        return None if whole is None else whole * self.factor + self.value

    @property
    def keeps_quality(self) -> bool:
        """Whether it says how bad a model may be."""
        return self.name in QUALITY and self.at_most == (self.name != "accuracy")

    def violation(self, values: Mapping[str, float | None], dense: Mapping[str, float | None]) -> float | None:
        """By which share of the limit a model is beyond it, 0 or less when it is met; None when that is not known."""
        value, limit = values.get(self.name), self.limit(dense)
        if value is None or limit is None:
            return None
        beyond = value - limit if self.at_most else limit - value
        return beyond / (abs(limit) or 1.0)


def parse_constraint(text: Any, task: Task = "language") -> Constraint:
    """Read ``bytes_disk <= 150MB``, ``perplexity <= 1.1x``, ``accuracy >= dense - 0.01`` or ``sparsity >= 0.5``.

    Raises:
        StudyError: for a text of another form, a value that makes no sense, or a quantity of another task.
        UnknownNameError: for an unknown quantity; the nearest is suggested.
    """
    match = re.fullmatch(r"\s*([A-Za-z_0-9-]+)\s*(<=|>=)\s*(\S.*?)\s*", str(text))
    if not match:
        raise StudyError(
            f"constraint '{text}' is not QUANTITY <= VALUE or QUANTITY >= VALUE",
            hint="for example: bytes_disk <= 150MB, perplexity <= 1.1x, accuracy >= dense - 0.01 or sparsity >= 0.5",
        )
    name, said = _quantity(match[1], "quantity in a constraint", task), match[3]
    number, factor = None, 0.0
    if beside := re.fullmatch(r"dense(?:\s*([+-])\s*(\S+))?", said):
        number, factor = _number(beside[2] or "0"), 1.0
        number = -number if number is not None and beside[1] == "-" else number
    elif said[-1] in "xX":
        number, factor = 0.0, _number(said[:-1]) or 0.0
        number = number if factor else None
    else:
        number = _number(said)
        if number is None and name in SIZES and (size := parse_size(said)) is not None:
            number = float(size)
    if number is None:
        raise StudyError(
            f"constraint '{text}': '{said}' is no value of {name}",
            hint="give a number, times the dense model's (1.1x), more or less than the dense model's (dense - 0.01), "
            "or for bytes_disk and bytes_resident a size (150MB)",
        )
    if name == "sparsity" and factor:
        raise StudyError(f"constraint '{text}': the dense model's sparsity is no measure", hint="for example 0.5")
    return Constraint(str(text), name, match[2] == "<=", number, factor)


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
    for one in constraints:
        for other in constraints:
            if one.name == other.name and one.at_most and not other.at_most and _apart(one, other, dense):
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


def _apart(upper: Constraint, lower: Constraint, dense: Mapping[str, float | None]) -> bool:
    """Whether the lower limit is above the upper one, as far as that is known: whatever the dense model may have."""
    most, least = upper.limit(dense), lower.limit(dense)
    if most is not None and least is not None:
        return least > most
    above = lower.factor - upper.factor, lower.value - upper.value
    return min(above) >= 0 < max(above)


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
