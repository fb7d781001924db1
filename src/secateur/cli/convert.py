"""``secateur convert``: flags to a conversion, the run, and the table before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from secateur.cli import console, tables
from secateur.cli.options import (
    CALIBRATION_PANEL,
    MACHINE_PANEL,
    Debug,
    Device,
    Json,
    Model,
    Quiet,
    name_of,
    recipe_option,
)
from secateur.cli.prune import Measure, MeasureData, MeasureFiles, Out, Overwrite, Prompt, Resume, Verify
from secateur.errors import UsageError
from secateur.plugins import available, describe

CONVERSIONS = tuple(available("conversions"))


def option(conversion: str, field: str, metavar: str | None = None) -> Any:
    """A flag for one option of a conversion; its help is the docstring of the field."""
    found = {entry.name: entry for entry in describe("conversions", conversion, "conversion").options}[field]
    default = found.default.strip("'\"")
    return typer.Option(
        f"--{field.replace('_', '-')}",
        help=found.help,
        show_default=default if default not in ("", "None", "()", "False") else False,
        rich_help_panel=f"--to {conversion}",
        metavar=metavar,
    )


def convert(
    model: Model,
    to: Annotated[
        str, typer.Option("--to", metavar="NAME", show_default=False, help=f"Conversion: {', '.join(CONVERSIONS)}.")
    ],
    cores: Annotated[int | None, option("factorized", "cores")] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            "--rank",
            show_default="32 for fused",
            help="Rank of every matrix (factorized) or of every difference (fused); `full` loses nothing.",
        ),
    ] = None,
    budget: Annotated[str | None, option("factorized", "budget", "parameters=SHARE")] = None,
    weighting: Annotated[str | None, option("factorized", "weighting")] = None,
    share_central: Annotated[bool | None, option("factorized", "share_central")] = None,
    models: Annotated[list[str] | None, option("fused", "models", "MODEL...")] = None,
    router_rank: Annotated[int | None, option("fused", "router_rank")] = None,
    top: Annotated[int | None, option("fused", "top")] = None,
    rest: Annotated[str | None, option("fused", "rest")] = None,
    format: Annotated[str | None, option("fused", "format")] = None,
    base: Annotated[str | None, option("fused", "base", "MODEL")] = None,
    experts: Annotated[int | None, option("moe", "experts")] = None,
    top_k: Annotated[int | None, option("moe", "top_k")] = None,
    router: Annotated[str | None, option("moe", "router")] = None,
    split: Annotated[str | None, option("moe", "split")] = None,
    groups: Annotated[int | None, option("shared", "groups")] = None,
    iterations: Annotated[int | None, option("shared", "iterations")] = None,
    step: Annotated[str | None, option("shared", "step", "NUMBER")] = None,
    targets: Annotated[list[str] | None, recipe_option("targets", metavar="PATTERN")] = None,
    ignore: Annotated[list[str] | None, recipe_option("ignore", metavar="PATTERN")] = None,
    seed: Annotated[int | None, recipe_option("seed")] = None,
    calibration: Annotated[str | None, recipe_option("calibration", panel=CALIBRATION_PANEL)] = None,
    samples: Annotated[int | None, recipe_option("samples", panel=CALIBRATION_PANEL)] = None,
    sequence_length: Annotated[int | None, recipe_option("sequence_length", panel=CALIBRATION_PANEL)] = None,
    device: Device = None,
    dtype: Annotated[str | None, recipe_option("dtype", panel=MACHINE_PANEL)] = None,
    compute_dtype: Annotated[str | None, recipe_option("compute_dtype", panel=MACHINE_PANEL)] = None,
    activation_memory: Annotated[str | None, recipe_option("activation_memory", panel=MACHINE_PANEL)] = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    verify: Verify = True,
    evaluate: Measure = True,
    data: MeasureData = "builtin",
    files: MeasureFiles = None,
    prompt: Prompt = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make a model cheaper by other means than zeros: factors, experts of which few run, or several models in one."""
    flags = {
        "cores": cores, "rank": rank, "budget": budget, "weighting": weighting, "share_central": share_central,
        "models": tuple(models) if models else None, "router_rank": router_rank, "top": top, "rest": rest,
        "format": format, "base": base, "experts": experts, "top_k": top_k, "router": router, "split": split,
        "groups": groups, "iterations": iterations, "step": step,
        "targets": targets, "ignore": ignore, "seed": seed,
        "calibration": calibration, "samples": samples, "sequence_length": sequence_length, "device": device,
        "dtype": dtype, "compute_dtype": compute_dtype, "activation_memory": activation_memory,
    }  # fmt: skip
    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None and value != []}
    with console.working(quiet=quiet) as reporter:
        from secateur.verbs.convert import convert as run

        where = out if out is not None else f"{name_of(model)}-{to}"
        if out is None:
            reporter.note(f"the result goes to {where}")
        result = run(
            model, where, to=to, resume=resume, overwrite=overwrite, verify=verify, evaluate=evaluate, data=data,
            files=files or (), prompt=prompt, reporter=reporter, **given,
        )  # fmt: skip
    console.emit(result, json=json, render=lambda: tables.converted(result))


def spread_values(arguments: Sequence[str], flag: str = "--models") -> list[str]:
    """``--models A B -o OUT`` as ``--models A --models B -o OUT``: every word up to the next flag belongs to it.

    Raises:
        UsageError: when none follows.
    """
    made: list[str] = []
    taking = False
    for place, word in enumerate(arguments):
        if word == flag:
            if place + 1 == len(arguments) or arguments[place + 1].startswith("-"):
                raise UsageError(f"{flag} names no model", hint=f"for example: {flag} A B")
            taking = True
        elif word.startswith("-"):
            taking = False
            made.append(word)
        else:
            made += [flag, word] if taking else [word]
    return made
