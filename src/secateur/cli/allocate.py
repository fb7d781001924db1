"""``secateur allocate``: flags to a recipe, the rule, and a table of who gets how many zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import console, tables
from secateur.cli.options import (
    CALIBRATION_PANEL,
    MACHINE_PANEL,
    OUTPUT_PANEL,
    Debug,
    Device,
    Json,
    Model,
    Overwrite,
    Quiet,
    parse_pairs,
)
from secateur.cli.options import recipe_option as option
from secateur.cli.prune import RecipeFile, build_recipe, parse_overrides

Out = Annotated[
    Path, typer.Option("--out", "-o", rich_help_panel=OUTPUT_PANEL, help="YAML file to write, for prune --allocation.")
]
Allocation = Annotated[
    str | None,
    typer.Option(
        "--allocation",
        metavar="NAME",
        show_default="sensitivity",
        rich_help_panel="What to prune and how",
        help="The rule; `secateur methods` lists them.",
    ),
]


def allocate(
    model: Model,
    out: Out,
    allocation: Allocation = None,
    allocation_options: Annotated[
        list[str] | None, option("allocation_options", "--allocation-option", metavar="KEY=VALUE")
    ] = None,
    sparsity: Annotated[float | None, option("sparsity")] = None,
    targets: Annotated[list[str] | None, option("targets", metavar="PATTERN")] = None,
    ignore: Annotated[list[str] | None, option("ignore", metavar="PATTERN")] = None,
    overrides: Annotated[list[str] | None, option("overrides", "--override", metavar="PATTERN=SPARSITY")] = None,
    seed: Annotated[int | None, option("seed")] = None,
    recipe: RecipeFile = None,
    calibration: Annotated[str | None, option("calibration", panel=CALIBRATION_PANEL)] = None,
    samples: Annotated[int | None, option("samples", panel=CALIBRATION_PANEL)] = None,
    sequence_length: Annotated[int | None, option("sequence_length", panel=CALIBRATION_PANEL)] = None,
    device: Device = None,
    compute_dtype: Annotated[str | None, option("compute_dtype", panel=MACHINE_PANEL)] = None,
    activation_memory: Annotated[str | None, option("activation_memory", panel=MACHINE_PANEL)] = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Divide a sparsity among the matrices of a model by a rule, and write the file that `prune --allocation` takes."""
    flags = {
        "allocation": allocation or ("sensitivity" if recipe is None else None),
        "allocation_options": parse_pairs("--allocation-option", allocation_options or [], "spread=0.1"),
        "sparsity": sparsity,
        "targets": targets,
        "ignore": ignore,
        "overrides": parse_overrides(overrides or []),
        "seed": seed,
        "calibration": calibration,
        "samples": samples,
        "sequence_length": sequence_length,
        "device": device,
        "compute_dtype": compute_dtype,
        "activation_memory": activation_memory,
    }
    with console.working(quiet=quiet) as reporter:
        final = build_recipe(flags, recipe, reporter)
        from secateur.verbs.allocate import allocate as run

        # The seed once more: who types one expects something of it.
        typed: dict[str, Any] = {} if seed is None else {"seed": seed}
        result = run(model, out, recipe=final, overwrite=overwrite, reporter=reporter, **typed)
    console.emit(result, json=json, render=lambda: tables.allocated(result))
