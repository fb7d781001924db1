"""``secateur study``: run a search and go on with it, or look at what it has found so far"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli import console, study_tables
from secateur.cli.options import MACHINE_PANEL, Debug, Json, Quiet
from secateur.progress import Recorder

if TYPE_CHECKING:
    from secateur.study_result import StudyResult

app = typer.Typer(
    help="Search a space of settings on your model, within your budget, for those that suit your constraints.",
    rich_markup_mode="markdown",
    no_args_is_help=True,
)

StudyFile = Annotated[
    str,
    typer.Argument(
        metavar="STUDY",
        show_default=False,
        help="A study file (YAML), or `paper` or `classifier`, which come with the library.",
    ),
]  # fmt: skip
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


Data = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="SOURCE", show_default=False,
        help="Where labelled texts are, instead of what the study says: a folder of JSONL files, or a dataset.",
    ),
]  # fmt: skip


@app.command("run")
def run(
    study: StudyFile,
    data: Data = None,
    workers: Workers = 1,
    ray: RayAddress = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Search the settings of a study and measure the best on its test text; goes on with a study that was stopped."""
    with console.working(quiet=quiet) as reporter:
        from secateur.study.read import load_studies

        specs = load_studies(study, source=data)  # refused before anything heavy is loaded
        from secateur.study.run import run_study

        results = []
        for spec in specs:
            told = Recorder(reporter)
            results.append(run_study(spec, workers=workers, ray=ray, reporter=told))
            for warning in results[-1].warnings:
                if warning not in told.warnings:
                    reporter.warn(warning)
    _emit(results, json)


@app.command("status")
def status(study: StudyOrStorage, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """What a study has found so far, also while it runs; writes NAME.json beside the storage, for `report`."""
    with console.working(quiet=quiet) as reporter:
        from secateur.study.read import storages_of
        from secateur.study.status import study_status

        results = [study_status(path) for path in storages_of(study)]
        for result in results:
            for warning in result.warnings:
                reporter.warn(warning)
    _emit(results, json)


def _emit(results: list[StudyResult], json: bool) -> None:
    """One study as its result, those of several models as a list in one object."""
    from secateur.study_result import StudyResults

    found = results[0] if len(results) == 1 else StudyResults(results)
    console.emit(found, json=json, render=lambda: study_tables.studies(results))
