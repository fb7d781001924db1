"""``secateur bench``: flags to the measurement, and the table of all models compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import bench_table, console
from secateur.cli.options import MACHINE_PANEL, OUTPUT_PANEL, Debug, Json, Model, Overwrite, Quiet, RunDevice, RunDtype

Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", show_default="none", rich_help_panel=OUTPUT_PANEL,
        help="Keep the result in this .json file; `secateur report` reads it.",
    ),
]  # fmt: skip
Against = Annotated[
    list[str] | None,
    typer.Option("--against", metavar="MODEL", help="A model to compare with in the same run; can be given again."),
]
Baselines = Annotated[
    bool,
    typer.Option(
        "--baselines",
        help="Compare with what one would otherwise take: the dense model in float32, bfloat16 and, in llama.cpp, with "
        "8 and 4 bits; with 8 in torchao where llama.cpp does not know it. The dense model is the first --against, "
        "else the one MODEL was made from, else MODEL.",
    ),
]
Data = Annotated[
    str, typer.Option("--data", help="Text for perplexity: a text file, a dataset, builtin, or none to leave it out.")
]
SequenceLength = Annotated[
    int | None,
    typer.Option("--sequence-length", show_default="1024, never more than the models'", help="Tokens in a window."),
]
PromptTokens = Annotated[int, typer.Option("--prompt-tokens", help="Tokens of the prompt whose reading is timed.")]
NewTokens = Annotated[int, typer.Option("--new-tokens", help="Tokens decoded after it.")]
Rounds = Annotated[int, typer.Option("--rounds", help="How often each model is timed, all of them in turn.")]
Region = Annotated[
    str | None,
    typer.Option("--region", metavar="XXX", help="Country whose electricity CO2 is counted for: three letters (FRA)."),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", rich_help_panel=MACHINE_PANEL, show_default="PyTorch's choice", help="CPU threads."),
]


def bench(
    model: Model,
    out: Out = None,
    against: Against = None,
    baselines: Baselines = False,
    data: Data = "builtin",
    sequence_length: SequenceLength = None,
    prompt_tokens: PromptTokens = 256,
    new_tokens: NewTokens = 32,
    rounds: Rounds = 7,
    region: Region = None,
    threads: Threads = None,
    device: RunDevice = "auto",
    dtype: RunDtype = "auto",
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure size, memory, speed, energy and operations of a model, beside others in the same run."""
    with console.working(quiet=quiet) as reporter:
        from secateur.verbs.bench import bench as run

        result = run(
            model,
            out=out,
            against=tuple(against or ()),
            baselines=baselines,
            data=None if data == "none" else data,
            sequence_length=sequence_length,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            region=region,
            threads=threads,
            device=device,
            dtype=dtype,
            overwrite=overwrite,
            reporter=reporter,
        )
    console.emit(result, json=json, render=lambda: bench_table.benched(result))
