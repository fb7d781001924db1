"""``secateur inspect``: what a model is made of, what can be pruned, what cannot and why."""

from __future__ import annotations

from typing import Annotated

import typer

from secateur.cli import console, tables
from secateur.cli.options import OUTPUT_PANEL, Debug, Json, Model, Quiet

Each = Annotated[
    bool,
    typer.Option(
        "--each", rich_help_panel=OUTPUT_PANEL, help="One line for each matrix, not one for each kind of matrix."
    ),
]


def inspect(model: Model, each: Each = False, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Say what a model is made of, what can be pruned, what cannot and why."""
    with console.working(quiet=quiet) as reporter:
        from secateur.verbs.inspect import inspect as run

        result = run(model, reporter=reporter)
    console.emit(result, json=json, render=lambda: tables.inspected(result, each=each))
