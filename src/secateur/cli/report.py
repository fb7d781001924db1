"""``secateur report``: results of any commands to one page, to Markdown, or to JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import console
from secateur.cli.options import MACHINE_PANEL, OUTPUT_PANEL, Debug, Json, Overwrite, Quiet, RunDevice
from secateur.errors import UsageError
from secateur.result import RESULT_FILE

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="DIR|STUDY|BENCH.json|ALLOCATION.yaml...",
        show_default=False,
        help="Folders that `prune` or `recover` wrote, studies (the file that was run, its storage, or the .json "
        "beside it), files of `secateur bench -o` and of `secateur allocate`.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", show_default="stdout, for md and json", rich_help_panel=OUTPUT_PANEL, help="File to write.",
    ),
]  # fmt: skip
Format = Annotated[
    str | None,
    typer.Option(
        "--format", show_default="by the name of OUT, html", rich_help_panel=OUTPUT_PANEL, help="html, md or json."
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt", metavar="TEXT", show_default="a short one",
        help="Text that the dense and the pruned models continue; can be given again.",
    ),
]  # fmt: skip
TextFile = Annotated[
    str,
    typer.Option(
        "--text", metavar="FILE", help="Text that losses are measured on: a text file, a dataset, or builtin."
    ),
]
SequenceLength = Annotated[
    int | None,
    typer.Option("--sequence-length", show_default="512, never more than the model's", help="Tokens in a window."),
]
Samples = Annotated[int | None, typer.Option("--samples", show_default="4", help="Number of windows.")]
Run = Annotated[
    bool,
    typer.Option(
        "--run/--no-run", rich_help_panel=MACHINE_PANEL,
        help="Open the models of the folders, finalists of studies, and their dense models: losses by token, what "
        "breaks, continuations.",
    ),
]  # fmt: skip


def _results(inputs: list[str]) -> list[str]:
    """The inputs, with the result file of every study that was named by its own file or storage, as it is now."""
    from secateur.allocation_file import is_allocation_file
    from secateur.study.read import is_file_of_study, storages_of

    found: list[str] = []
    for given in inputs:
        path = Path(given).expanduser()
        of_study = is_file_of_study(given) and not (path / RESULT_FILE).is_file() and not is_allocation_file(path)
        if of_study or path.suffix == ".db":
            from secateur.study.status import result_file, study_status

            for storage in storages_of(given):
                study_status(storage)
                found.append(str(result_file(storage)))
        else:
            found.append(given)
    return found


def report(
    inputs: Inputs,
    out: Out = None,
    format: Format = None,
    prompt: Prompts = None,
    text: TextFile = "builtin",
    sequence_length: SequenceLength = None,
    samples: Samples = None,
    run: Run = True,
    device: RunDevice = "auto",
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare pruned models, a study or benchmarks on one page: what to take, and what breaks and why."""
    by_name = {".md": "md", ".json": "json"}.get(out.suffix, "html") if out is not None else "html"
    chosen = format or ("json" if json and out is None else by_name)
    if out is None and chosen == "html":
        raise UsageError("a page needs a file", hint="name one with -o report.html, or use --format md")
    if out is None and json and chosen != "json":
        raise UsageError(f"--json and --format {chosen} both write to stdout", hint="give -o FILE, or leave --json out")
    with console.working(quiet=quiet) as reporter:
        from secateur.verbs.report import render
        from secateur.verbs.report import report as build

        result = build(
            _results(inputs),
            out,
            format=chosen,
            prompts=tuple(prompt or ()),
            text=text,
            run=run,
            sequence_length=sequence_length,
            samples=samples,
            device=device,
            overwrite=overwrite,
            reporter=reporter,
        )
        shown = "" if out is not None else render(result, chosen)
    if out is None:
        console.write(shown.rstrip("\n"))
    elif json:
        console.write(result.to_json())
    else:
        for sentence in result.answer:
            console.write(sentence)
        if result.command:
            console.write(result.command)
        shows = f"{len(result.models)} models" if result.models else f"allocations: {len(result.allocations)}"
        console.write(f"{out.resolve()} ({shows}; {out.stat().st_size / 1e6:.1f} MB)")
