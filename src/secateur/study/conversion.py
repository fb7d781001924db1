"""Conversions in the space of a study, each by a name that says what is not the default; and who can recover them"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.budgets import parse_budget
from secateur.errors import StudyError, UnknownNameError
from secateur.plugins import describe

FIELDS = ("targets", "ignore", "device", "compute_dtype", "activation_memory")
"""What a study can fix that a conversion looks at."""
EXAMPLE = "for example convert: {to: factorized, budget: parameters=0.8}"

Conversion = Mapping[str, Any]
"""``to``, and options by the names of the arguments of `convert`; those that have their default are left out."""


def read_conversions(data: Any, where: str) -> dict[str, Conversion]:
    """Name -> conversion, of one mapping or a list of them. Two ways to write the same have the same name.

    Raises:
        UnknownNameError: for an unknown conversion or option; the nearest is suggested.
        StudyError: for what is no mapping of options to values, is no trial of a study, or is named twice.
    """
    found: dict[str, Conversion] = {}
    for one in data if isinstance(data, list) else [data]:
        conversion = _conversion(one, where)
        name = ", ".join(f"{key} {value}" for key, value in conversion.items() if key != "to")
        name = f"{conversion['to']} {name}".strip()
        if name in found:
            raise StudyError(f"{where} names one twice: {name}")
        found[name] = conversion
    if not found:
        raise StudyError(f"{where} is an empty list", hint=EXAMPLE)
    return found


def _conversion(data: Any, where: str) -> Conversion:
    if not isinstance(data, Mapping) or "to" not in data:
        raise StudyError(f"{where} is {data!r}", hint=EXAMPLE)
    to = str(data["to"])
    known = {option.name: option for option in describe("conversions", to, "conversion").options}
    if to == "fused":
        raise StudyError(
            f"{where}: to: fused makes one model out of several, and a study has one",
            hint="leave it out, or convert first and take the result as the model of a study",
        )
    given = {str(key).replace("-", "_"): value for key, value in data.items() if key != "to"}
    for key, value in given.items():
        if key not in known:
            raise UnknownNameError(f"option of conversion {to}", key, known or ["(none)"])
        if not isinstance(value, bool | int | float | str):
            raise StudyError(
                f"{where}: {key} of {to} is {value!r}", hint="give one value; a list of conversions tries several"
            )
    values = {key: _plain(key, given[key]) for key in known if key in given}
    return {"to": to, **{key: one for key, one in values.items() if str(one) != known[key].default.strip("'\"")}}


def _plain(key: str, value: bool | int | float | str) -> bool | int | float | str:
    """A value as what it means, however it was written: 8, "8" and 8.0 are one number."""
    if key == "budget":
        budget = parse_budget(str(value))
        return f"parameters={budget.value!r}" if budget.key == "parameters" else budget.text
    if isinstance(value, str):
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def unfit_for(mode: str, conversion: Conversion, *, all_matrices: bool) -> str:
    """Why `recover` cannot train the result of a conversion in this mode; empty where it can.

    Args:
        all_matrices: whether every matrix of the blocks is converted.
    """
    if mode == "blocks":
        return "it reads the dense weights into the same layers"
    if mode == "adapter-moe":
        return "no adapters are put beside converted layers"
    if mode == "lora" and (conversion["to"] == "shared" or conversion.get("share_central")):
        return "it cannot train weights that several blocks share"
    chains = conversion.get("cores", 2) != 2 and "rank" in conversion  # with a budget some stay whole
    if mode == "lora" and chains and all_matrices:
        return "chains of tensors have no linear layer for an adapter"
    return ""
