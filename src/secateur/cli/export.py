"""``secateur export``: flags to the options of a format, the run, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import console, tables
from secateur.cli.options import OUTPUT_PANEL, Debug, Json, Model, Overwrite, Quiet, name_of
from secateur.errors import UnknownNameError
from secateur.plugins import available, describe

_HELP = {option.name: option.help for option in describe("formats", "gguf", "format").options}

Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", show_default="MODEL.gguf in the current folder", rich_help_panel=OUTPUT_PANEL,
        help="File to write.",
    ),
]  # fmt: skip
Format = Annotated[str, typer.Option("--format", help="Format to write; `secateur methods` lists them.")]
Quantize = Annotated[str | None, typer.Option("--quantize", show_default="f16", help=_HELP["quantize"])]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        rich_help_panel=OUTPUT_PANEL,
        help="Read OUT back and compare it with the model; run it in llama.cpp where that is installed.",
    ),
]


def export(
    model: Model,
    out: Out = None,
    format: Format = "gguf",
    quantize: Quantize = None,
    overwrite: Overwrite = False,
    verify: Verify = True,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a model as a file for another program, read it back, and run it where that program is installed."""
    options = {} if quantize is None else {"quantize": quantize}
    with console.working(quiet=quiet) as reporter:
        formats = available("formats")
        if format not in formats:
            raise UnknownNameError("format", format, formats)
        where = out if out is not None else Path(f"{name_of(model)}.{format}")
        if out is None:
            reporter.note(f"the result goes to {where}")
        from secateur.verbs.export import export as run

        result = run(
            model, where, format=format, overwrite=overwrite, verify=verify, reporter=reporter, **options
        )  # fmt: skip
    console.emit(result, json=json, render=lambda: tables.exported(result))
