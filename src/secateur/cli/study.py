"""``secateur study``: run a search and go on with it, or look at what it has found so far"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import console, study_tables
from secateur.cli.options import MACHINE_PANEL, Debug, Json, Quiet
from secateur.progress import Recorder

app = typer.Typer(
    help="Search a space of settings on your model, within your budget, for those that suit your constraints.",
    rich_markup_mode="markdown",
    no_args_is_help=True,
)

StudyFile = Annotated[
    str,
    typer.Argument(
        metavar="STUDY", show_default=False, help="A study file (YAML), or `paper`, which comes with the library."
    ),
]
StudyOrStorage = Annotated[
    str, typer.Argument(metavar="STUDY", show_default=False, help="A study file (YAML), or the storage of a study.")
]
Workers = Annotated[
    int,
    typer.Option(
        "--workers", metavar="N", rich_help_panel=MACHINE_PANEL,
        help="Processes on this machine that run trials, each with its share of the cores.",
    ),
]  # fmt: skip
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray", metavar="ADDRESS", show_default=False, rich_help_panel=MACHINE_PANEL,
        help="Run trials on a Ray cluster instead: auto, HOST:PORT, or local for one on this machine.",
    ),
]  # fmt: skip


@app.command("run")
def run(
    study: StudyFile,
    workers: Workers = 1,
    ray: RayAddress = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Search the settings of a study and measure the best on its test text; goes on with a study that was stopped."""
    with console.working(quiet=quiet) as reporter:
        from secateur.study.spec import load_study

        spec = load_study(study)  # refused before anything heavy is loaded
        from secateur.study.run import run_study

        told = Recorder(reporter)
        result = run_study(spec, workers=workers, ray=ray, reporter=told)
        for warning in result.warnings:
            if warning not in told.warnings:
                reporter.warn(warning)
    console.emit(result, json=json, render=lambda: study_tables.study(result))


@app.command("status")
def status(study: StudyOrStorage, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """What a study has found so far, also while it runs; writes NAME.json beside the storage, for `report`."""
    with console.working(quiet=quiet) as reporter:
        from secateur.study.status import study_status

        result = study_status(Path(study) if Path(study).exists() else study)
        for warning in result.warnings:
            reporter.warn(warning)
    console.emit(result, json=json, render=lambda: study_tables.study(result))
