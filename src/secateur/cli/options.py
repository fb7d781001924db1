"""Flags that several commands share. The help of a recipe flag is the docstring of the recipe's field."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.errors import UsageError
from secateur.plugins import option_help
from secateur.recipe import Recipe

_HELP = option_help(Recipe)
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Recipe)}


def recipe_option(
    field: str, flag: str = "", *, panel: str = "What to prune and how", metavar: str | None = None
) -> Any:
    """A flag for one field of the recipe, off unless given, so that a recipe file keeps its say."""
    default = _DEFAULTS[field]
    shown = default if isinstance(default, str) else str(default) if isinstance(default, int) else False
    return typer.Option(
        flag or "--" + field.replace("_", "-"),
        help=_HELP[field],
        show_default=shown,
        rich_help_panel=panel,
        metavar=metavar,
    )


CALIBRATION_PANEL = "Calibration"
MACHINE_PANEL = "Machine"
OUTPUT_PANEL = "Output"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="A folder, a hub id, a .gguf file, `demo` (a real model of 135 M parameters) or `demo-encoder` (22 M).",
    ),
]
Device = Annotated[str | None, recipe_option("device", panel=MACHINE_PANEL)]
RunDtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        rich_help_panel=MACHINE_PANEL,
        help="Number format to run in: auto (as the model), float32, bfloat16, float16.",
    ),
]
RunDevice = Annotated[str, typer.Option("--device", rich_help_panel=MACHINE_PANEL, help=_HELP["device"])]
Json = Annotated[
    bool, typer.Option("--json", rich_help_panel=OUTPUT_PANEL, help="Print exactly one JSON object to stdout.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", rich_help_panel=OUTPUT_PANEL, help="Replace an existing OUT.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", rich_help_panel=OUTPUT_PANEL, help="No progress and no notes; warnings stay.")
]
Debug = Annotated[bool, typer.Option("--debug", rich_help_panel=OUTPUT_PANEL, help="Print the traceback of an error.")]


def parse_pairs(flag: str, texts: Sequence[str], example: str) -> dict[str, str]:
    """Read the ``KEY=VALUE`` texts of a flag.

    Raises:
        UsageError: for a text without ``=`` or a key given twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise UsageError(f"{flag} '{text}' is not KEY=VALUE", hint=f"for example: {flag} {example}")
        if key in found:
            raise UsageError(f"{flag} {key} is given twice", hint="give each one once")
        found[key] = value.strip()
    return found


def name_of(model: str) -> str:
    """What the folder of a result is named after when no OUT is given.

    Raises:
        UsageError: when no name can be made from MODEL.
    """
    path = Path(model)
    name = (path.resolve() if path.name in {"", ".", ".."} else path).name.removesuffix(".gguf")
    if not name:
        raise UsageError(f"no folder name can be made from '{model}'", hint="give one with -o OUT")
    return name
