"""Conversions in the space of a study, each by a name that says what is not the default; and who can recover them"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.budgets import parse_budget
from secateur.errors import StudyError, UnknownNameError
from secateur.plugins import describe
from secateur.study.checks import full_path

FIELDS = ("targets", "ignore", "device", "compute_dtype", "activation_memory")
"""What a study can fix that a conversion looks at."""
EXAMPLE = "for example convert: {to: factorized, budget: parameters=0.8}"
MODELS = "models"
"""The option that names other models."""
NO_MODEL = {"format": "writes a difference, which is no model", "base": "is the model of the study"}
"""Options of `fused` that are for no trial, and why."""

Conversion = Mapping[str, Any]
"""``to``, and options by the names of the arguments of `convert`; those that have their default are left out. Models
are full paths where they are files.
"""


def read_conversions(data: Any, where: str, folder: Path = Path()) -> dict[str, Conversion]:
    """Name -> conversion, of one mapping or a list of them. Two ways to write the same have the same name.

    Args:
        folder: what the paths of other models start from; in a name they are relative to it.

    Raises:
        UnknownNameError: for an unknown conversion or option; the nearest is suggested.
        StudyError: for what is no mapping of options to values, is no trial of a study, or is named twice.
    """
    found: dict[str, Conversion] = {}
    for one in data if isinstance(data, list) else [data]:
        conversion = _conversion(one, where)
        name = ", ".join(f"{key} {_shown(value, folder)}" for key, value in conversion.items() if key != "to")
        name = f"{conversion['to']} {name}".strip()
        if MODELS in conversion:
            conversion = {**conversion, MODELS: tuple(full_path(model, folder) for model in conversion[MODELS])}
        if name in found or conversion in found.values():
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
    given = {str(key).replace("-", "_"): value for key, value in data.items() if key != "to"}
    for key, value in given.items():
        if key not in known:
            raise UnknownNameError(f"option of conversion {to}", key, known or ["(none)"])
        if to == "fused" and key in NO_MODEL:
            raise StudyError(f"{where}: {key} of fused is for no trial: it {NO_MODEL[key]}", hint="leave it out")
        if key == MODELS:
            continue
        if not isinstance(value, bool | int | float | str):
            raise StudyError(
                f"{where}: {key} of {to} is {value!r}", hint="give one value; a list of conversions tries several"
            )
    if MODELS in given:
        given[MODELS] = _models(given[MODELS], f"{where}: {MODELS} of {to}")
    values = {key: given[key] if key == MODELS else _plain(key, given[key]) for key in known if key in given}
    return {"to": to, **{key: one for key, one in values.items() if str(one) != known[key].default.strip("'\"")}}


def _models(value: Any, where: str) -> tuple[str, ...]:
    listed = value if isinstance(value, list) else [value]
    if not listed or not all(isinstance(one, str) and one for one in listed):
        raise StudyError(f"{where} is {value!r}", hint="give a folder or a hub id, or a list of them")
    return tuple(listed)


def _shown(value: Any, folder: Path) -> str:
    """A value as a name says it: of models that are files the paths from the folder."""
    if not isinstance(value, tuple):
        return str(value)
    places = {one: folder / Path(one).expanduser() for one in value if full_path(one, folder) != one}
    return " ".join(os.path.relpath(places[one], folder) if one in places else one for one in value)


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
    if mode == "adapter-moe" and conversion["to"] != "relu":
        return "no adapters are put beside converted layers"
    if mode == "lora" and (conversion["to"] == "shared" or conversion.get("share_central")):
        return "it cannot train weights that several blocks share"
    chains = conversion.get("cores", 2) != 2 and "rank" in conversion  # with a budget some stay whole
    if mode == "lora" and chains and all_matrices:
        return "chains of tensors have no linear layer for an adapter"
    return ""
