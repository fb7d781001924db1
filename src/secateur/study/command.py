"""The command line that makes the model of one trial: a recipe and training settings said as flags"""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from secateur.recipe import Recipe, is_default
from secateur.training import Training


def command_line(model: str, recipe: Recipe, training: Training | None, out: str, *, reads_text: bool = True) -> str:
    """``secateur prune ... && secateur recover ...``, quoted for a shell.

    Args:
        reads_text: whether the method looks at calibration text; without, flags about it would have no effect.
    """
    pruned = out if training is None else f"{out}-pruned"
    line = ["secateur", "prune", model, "-o", pruned, *prune_flags(recipe, reads_text=reads_text), "--no-evaluate"]
    said = shlex.join(line)
    if training is not None:
        said += " && " + shlex.join(
            ["secateur", "recover", pruned, "-o", out, *recover_flags(training), "--no-evaluate"]
        )
    return said


def prune_flags(recipe: Recipe, *, reads_text: bool = True) -> list[str]:
    """The flags that differ from the defaults; how much calibration text is read is always said."""
    flags: list[str] = []
    asked = recipe.method != "auto" and {*recipe.structure} != {"depth"}
    for entry in dataclasses.fields(Recipe):
        value = getattr(recipe, entry.name)
        flag = "--" + entry.name.replace("_", "-")
        if entry.name in ("calibration", "samples", "sequence_length"):
            if reads_text and value is not None:
                flags += [flag, _text(value)]
        elif entry.name == "method":
            flags += [flag, value] if asked else []
        elif entry.name in ("method_options", "allocation_options", "reconstruct_options"):
            for key, one in value.items():
                flags += [f"--{entry.name.removesuffix('s').replace('_', '-')}", f"{key}={_text(one)}"]
        elif is_default(entry, value):
            continue
        elif entry.name == "structure":
            flags += [flag, ",".join(value)]
        elif entry.name in ("targets", "ignore"):
            for one in value:
                flags += [flag, one]
        elif entry.name == "overrides":
            for one in value:
                flags += ["--override", f"{one.match}={_text(one.sparsity)}"]
        elif isinstance(value, bool):
            flags.append(flag if value else f"--no-{entry.name}")
        else:
            flags += [flag, _text(value)]
    return flags


def recover_flags(training: Training) -> list[str]:
    """The flags that differ from the defaults."""
    flags: list[str] = []
    for entry in dataclasses.fields(Training):
        value = getattr(training, entry.name)
        flag = "--" + entry.name.replace("_", "-")
        if entry.name == "trainer":
            for key, one in value.items():
                flags += [flag, f"{key}={_text(one)}"]
        elif value != entry.default:
            flags += [flag, _text(value)]
    return flags


def _text(value: Any) -> str:
    """A value as a flag reads it back: floats with all their digits."""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)
