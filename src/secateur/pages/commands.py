"""The command line that makes the model of a result: the recipe it was made with, as flags."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

from secateur.errors import SecateurError
from secateur.plugins import Option, describe
from secateur.recipe import Recipe, is_default
from secateur.result import ConvertResult, PruneResult, RecoverResult
from secateur.training import Training

NESTED = ("method_options", "allocation_options", "reconstruct_options", "overrides")
"""Fields of a recipe whose values are not said by one flag."""


def command_of(result: PruneResult | RecoverResult | ConvertResult, out: str) -> str:
    """The command, with flags only for what is not the default.

    Args:
        out: name of the folder it shall write.
    """
    if isinstance(result, ConvertResult):
        flags = [word for name, value in settings_of(result).items() for word in _words(name, value)]
        model, verb = str(result.source.get("model") or "MODEL"), "convert"
        flags = ["--to", result.conversion, *flags]
    elif isinstance(result, PruneResult):
        model, verb = str(result.source.get("model") or "MODEL"), "prune"
        flags = _flags(Recipe, {k: v for k, v in result.recipe.items() if k not in NESTED})
        flags += _options(result.recipe)
    else:
        model, verb = str(result.student.get("model") or "MODEL"), "recover"
        flags = ["--dense"] if result.student.get("conversion") and not result.zeros_held else []
        flags += _flags(Training, {k: v for k, v in result.settings.items() if k != "trainer"})
        trainer = result.settings.get("trainer")
        flags += [f"--trainer={k}={v}" for k, v in (trainer.items() if isinstance(trainer, dict) else ())]
    return shlex.join(["secateur", verb, model, "-o", out, *flags])


def settings_of(result: PruneResult | RecoverResult | ConvertResult) -> dict[str, Any]:
    """The settings that are not the default, by name."""
    if isinstance(result, ConvertResult):
        known = {option.name: option.default.strip("'\"") for option in _conversion_options(result.conversion)}
        known |= {name: str(value) for name, value in Recipe().to_dict().items()}
        changed = {name: value for name, value in result.options.items() if known.get(name) != str(value)}
        return {name: value for name, value in changed.items() if value not in (None, [], False)}
    cls, data = (Recipe, result.recipe) if isinstance(result, PruneResult) else (Training, result.settings)
    return {name: value for name, value in _changed(cls, data).items() if name not in NESTED}


def _conversion_options(name: str) -> tuple[Option, ...]:
    try:
        return describe("conversions", name, "conversion").options
    except SecateurError:  # one that this version does not have
        return ()


def _words(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag]
    return [word for one in (value if isinstance(value, list) else [value]) for word in (flag, str(one))]


def _changed(cls: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    changed = {}
    for entry in dataclasses.fields(cls):
        value = data.get(entry.name)
        if entry.name in data and not is_default(entry, tuple(value) if isinstance(value, list) else value):
            changed[entry.name] = value
    return changed


def _flags(cls: type[Any], data: Mapping[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in _changed(cls, data).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else "--no-" + flag[2:])
        elif name == "structure" and isinstance(value, list):
            if value != ["auto"]:  # what a budget means without it
                flags += [flag, ",".join(map(str, value))]
        elif isinstance(value, list):
            flags += [f"{flag}={one}" for one in value]
        elif value is not None:
            flags += [flag, str(value)]
    return flags


def _options(recipe: Mapping[str, Any]) -> list[str]:
    """Options of method, allocation and reconstruction that are not their defaults, and the overrides."""
    structure = recipe.get("structure") or []
    kind = "expert_criteria" if "experts" in structure else "criteria" if structure else "methods"
    flags: list[str] = []
    for owner, folder in (("method", kind), ("allocation", "allocation"), ("reconstruct", "")):
        try:
            described = describe(folder, str(recipe.get(owner)), folder).options if folder else ()
        except SecateurError:  # one that this version does not have, or a file
            described = ()
        known = {option.name: str(option.default) for option in described}
        options = recipe.get(f"{owner}_options")
        given = options.items() if isinstance(options, dict) else ()
        flags += [f"--{owner}-option={name}={value}" for name, value in given if known.get(name) != str(value)]
    overrides = recipe.get("overrides")
    known_overrides = [one for one in overrides if isinstance(one, dict)] if isinstance(overrides, list) else []
    return flags + [f"--override={one.get('match')}={one.get('sparsity')}" for one in known_overrides]
