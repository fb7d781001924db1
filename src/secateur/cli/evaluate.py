"""``secateur evaluate``: quality of a model, with the protocol beside the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import console, tables
from secateur.cli.options import Debug, Json, Model, Quiet, RunDevice, RunDtype

Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="Text for perplexity and --against: a text file, a dataset NAME[:CONFIG[:SPLIT[:COLUMN]]], or builtin "
        "(passed over by models without a language-model head when there is something else to measure).",
    ),
]
SequenceLength = Annotated[
    int | None,
    typer.Option("--sequence-length", show_default="2048, never more than the model's", help="Tokens in a window."),
]
Samples = Annotated[int | None, typer.Option("--samples", show_default="all", help="Number of windows.")]
Files = Annotated[
    list[Path] | None,
    typer.Option(
        "--files",
        metavar="FILE",
        help="JSONL of minimal pairs (good, bad), multiple choice (goal, sol1, sol2, label), texts with labels (text, "
        "label) for a classifier, or scored pairs (text1, text2, score) for an embedding model; can be given again.",
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--tasks", metavar="TASK", help="Task of lm-eval (extra `lm-eval`); can be given again."),
]
Against = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="MODEL",
        help="For embedding models: another one, usually the dense; rank correlation of the similarities of all pairs "
        "of up to 256 paragraphs of --data.",
    ),
]


def evaluate(
    model: Model,
    data: Data = "builtin",
    sequence_length: SequenceLength = None,
    samples: Samples = None,
    files: Files = None,
    tasks: Tasks = None,
    against: Against = None,
    device: RunDevice = "auto",
    dtype: RunDtype = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure the quality of a model: perplexity, minimal pairs, multiple choice, public suites, labels, embeddings."""
    with console.working(quiet=quiet) as reporter:
        from secateur.verbs.evaluate import evaluate as run

        result = run(
            model,
            data=data,
            sequence_length=sequence_length,
            samples=samples,
            files=tuple(files or ()),
            tasks=tuple(tasks or ()),
            against=against,
            device=device,
            dtype=dtype,
            reporter=reporter,
        )
    console.emit(result, json=json, render=lambda: tables.evaluated(result))
