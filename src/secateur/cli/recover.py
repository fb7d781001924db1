"""``secateur recover``: flags to settings, the run, and the table dense, pruned, recovered."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import console, tables
from secateur.cli.options import MACHINE_PANEL, OUTPUT_PANEL, Debug, Json, Model, Quiet, name_of, parse_pairs
from secateur.cli.prune import Measure, MeasureFiles, Overwrite, Resume, Verify
from secateur.plugins import option_help
from secateur.processes import is_first, leave_group
from secateur.progress import Reporter
from secateur.training import Training

_HELP = option_help(Training)
_DEFAULTS = {entry.name: entry.default for entry in dataclasses.fields(Training)}
TEACH_PANEL = "What is trained on what"
BUDGET_PANEL = "Budget"


def setting(name: str, panel: str, *, metavar: str | None = None) -> Any:
    """A flag for one field of the settings, off unless given."""
    default = _DEFAULTS[name]
    shown = default if isinstance(default, str) else f"{default:g}" if isinstance(default, int | float) else False
    return typer.Option(
        "--" + name.replace("_", "-"), help=_HELP[name], show_default=shown, rich_help_panel=panel, metavar=metavar
    )


Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", show_default="MODEL-recovered in the current folder", rich_help_panel=OUTPUT_PANEL,
        help="Folder to write.",
    ),
]  # fmt: skip
Dense = Annotated[
    bool, typer.Option("--dense", rich_help_panel=TEACH_PANEL, help="Train a model that has no zeros to hold.")
]
MeasureData = Annotated[
    str,
    typer.Option("--measure-data", rich_help_panel=OUTPUT_PANEL, help="Text to measure perplexity on."),
]


def recover(
    model: Model,
    data: Annotated[str | None, setting("data", TEACH_PANEL)] = None,
    mode: Annotated[str | None, setting("mode", TEACH_PANEL)] = None,
    loss: Annotated[str | None, setting("loss", TEACH_PANEL)] = None,
    teacher: Annotated[str | None, setting("teacher", TEACH_PANEL)] = None,
    dense: Dense = False,
    tokens: Annotated[int | None, setting("tokens", BUDGET_PANEL)] = None,
    minutes: Annotated[float | None, setting("minutes", BUDGET_PANEL)] = None,
    learning_rate: Annotated[float | None, setting("learning_rate", TEACH_PANEL)] = None,
    batch_size: Annotated[int | None, setting("batch_size", TEACH_PANEL)] = None,
    sequence_length: Annotated[int | None, setting("sequence_length", TEACH_PANEL)] = None,
    rank: Annotated[int | None, setting("rank", TEACH_PANEL)] = None,
    top_k: Annotated[int | None, setting("top_k", TEACH_PANEL)] = None,
    experts: Annotated[int | None, setting("experts", TEACH_PANEL)] = None,
    dim: Annotated[int | None, setting("dim", TEACH_PANEL)] = None,
    epochs: Annotated[int | None, setting("epochs", BUDGET_PANEL)] = None,
    held_out: Annotated[float | None, setting("held_out", TEACH_PANEL)] = None,
    gradient_checkpointing: Annotated[str | None, setting("gradient_checkpointing", MACHINE_PANEL)] = None,
    save_minutes: Annotated[float | None, setting("save_minutes", MACHINE_PANEL)] = None,
    trainer: Annotated[list[str] | None, setting("trainer", MACHINE_PANEL, metavar="KEY=VALUE")] = None,
    seed: Annotated[int | None, setting("seed", TEACH_PANEL)] = None,
    device: Annotated[str | None, setting("device", MACHINE_PANEL)] = None,
    compute_dtype: Annotated[str | None, setting("compute_dtype", MACHINE_PANEL)] = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    verify: Verify = True,
    evaluate: Measure = True,
    measure_data: MeasureData = "builtin",
    files: MeasureFiles = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train quality back into a pruned model; its zeros stay where they are."""
    flags: dict[str, Any] = {
        "data": data, "mode": mode, "loss": loss, "teacher": teacher, "tokens": tokens, "minutes": minutes,
        "learning_rate": learning_rate, "batch_size": batch_size, "sequence_length": sequence_length, "rank": rank,
        "top_k": top_k, "experts": experts, "dim": dim,
        "epochs": epochs, "held_out": held_out, "gradient_checkpointing": gradient_checkpointing,
        "save_minutes": save_minutes, "trainer": parse_trainer(trainer or []) or None, "seed": seed,
        "device": device, "compute_dtype": compute_dtype,
    }  # fmt: skip
    with console.working(quiet=quiet) as reporter:
        settings = Training(**{name: value for name, value in flags.items() if value is not None})
        where = out if out is not None else default_out(model)
        if out is None and is_first():
            reporter.note(f"the result goes to {where}")
        from secateur.verbs.recover import recover as run

        result = run(
            model, where, settings=settings, dense=dense, resume=resume, overwrite=overwrite, verify=verify,
            evaluate=evaluate, measure_data=measure_data, files=files or (),
            reporter=reporter if is_first() else Reporter(),
        )  # fmt: skip
    if is_first():
        console.emit(result, json=json, render=lambda: tables.recovered(result))
    leave_group()


def parse_trainer(texts: Sequence[str]) -> dict[str, str]:
    """Read ``KEY=VALUE`` texts for transformers.TrainingArguments.

    Raises:
        UsageError: for a text without ``=`` or a key given twice.
    """
    return parse_pairs("--trainer", texts, "lr_scheduler_type=linear")


def default_out(model: str) -> Path:
    """The folder to write when none is given: ``pruned-recovered``.

    Raises:
        UsageError: when no name can be made from MODEL.
    """
    return Path(f"{name_of(model)}-recovered")
