"""The command line that makes the model of one trial: a recipe, a conversion and training settings said as flags"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Collection
from typing import Any

from secateur.recipe import Recipe, is_default
from secateur.study.conversion import Conversion
from secateur.study.storing import HF, STORED, export_command, unstored_folder
from secateur.training import Training
from secateur.verbs.convert import SETTINGS

_ALL = tuple(entry.name for entry in dataclasses.fields(Recipe))


def command_line(
    model: str, recipe: Recipe, training: Training | None, out: str, *, conversion: Conversion | None = None,
    reads_text: bool = True, format: str = HF,
) -> str:  # fmt: skip
    """``secateur prune ... && secateur recover ... && secateur export ...``, or `convert` in the place of `prune`,
    quoted for a shell.

    Args:
        conversion: None where the model is pruned.
        reads_text: whether the method looks at calibration text; without, flags about it would have no effect.
        format: how the result is stored.
    """
    whole = unstored_folder(out, format)
    made = made_folder(whole, training, conversion)
    verb, flags = "prune", prune_flags(recipe, reads_text=reads_text)
    if conversion is not None:
        own = prune_flags(recipe, reads_text=reads_text, only=SETTINGS)
        verb, flags = "convert", [*convert_flags(conversion), *own]
    said = shlex.join(["secateur", verb, model, "-o", made, *flags, "--no-evaluate"])
    if training is not None:
        dense = ["--dense"] if conversion is not None else []  # there need be no zeros to hold
        said += " && " + shlex.join(
            ["secateur", "recover", made, "-o", whole, *dense, *recover_flags(training), "--no-evaluate"]
        )
    if format in STORED:
        said += " && " + export_command(whole, out, format)
    return said


def made_folder(out: str, training: object, conversion: object) -> str:
    """Where a trial prunes or converts: its own folder, or with ``training`` one beside it, which is recovered."""
    return out if training is None else f"{out}-{'pruned' if conversion is None else 'converted'}"


def convert_flags(conversion: Conversion) -> list[str]:
    """``--to`` and the options; one that is true is a flag alone, as none is true by default."""
    flags = []
    for name, value in conversion.items():
        said = [] if value is True else [*map(str, value)] if isinstance(value, tuple) else [_text(value)]
        flags += [f"--{name.replace('_', '-')}", *said]
    return flags


def prune_flags(recipe: Recipe, *, reads_text: bool = True, only: Collection[str] = _ALL) -> list[str]:
    """The flags that differ from the defaults; how much calibration text is read is always said.

    Args:
        only: fields of the recipe that are said at all.
    """
    flags: list[str] = []
    asked = recipe.method != "auto" and {*recipe.structure} != {"depth"}
    for entry in (entry for entry in dataclasses.fields(Recipe) if entry.name in only):
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
