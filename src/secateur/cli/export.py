"""``secateur export``: flags to the options of a format, the run, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import console, tables
from secateur.cli.options import OUTPUT_PANEL, Debug, Json, Model, Overwrite, Quiet, name_of
from secateur.errors import UnknownNameError
from secateur.plugins import available, describe

_GGUF, _SPARSE = (
    {option.name: option.help for option in describe("formats", name, "format").options} for name in ("gguf", "sparse")
)
SPARSE_PANEL = "With --format sparse"
FOLDERS = frozenset({"sparse", "torchao", "hf"})

Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", show_default="MODEL.gguf, or MODEL-sparse and the like, in the current folder",
        rich_help_panel=OUTPUT_PANEL, help="File or folder to write.",
    ),
]  # fmt: skip
Format = Annotated[str, typer.Option("--format", help="Format to write; `secateur methods` lists them.")]
Quantize = Annotated[
    str | None,
    typer.Option("--quantize", show_default="f16", help=_GGUF["quantize"], rich_help_panel="With --format gguf"),
]
Bits = Annotated[
    int | None, typer.Option("--bits", show_default="16", help=_SPARSE["bits"], rich_help_panel=SPARSE_PANEL)
]  # fmt: skip
GroupSize = Annotated[
    int | None,
    typer.Option("--group-size", show_default=False, help=_SPARSE["group_size"], rich_help_panel=SPARSE_PANEL),
]
EmbeddingBits = Annotated[
    int | None,
    typer.Option("--embedding-bits", show_default=False, help=_SPARSE["embedding_bits"], rich_help_panel=SPARSE_PANEL),
]
Force = Annotated[bool, typer.Option("--force", help=_SPARSE["force"], rich_help_panel=SPARSE_PANEL)]
Each = Annotated[
    bool, typer.Option("--each", help="Show every matrix instead of one row a kind.", rich_help_panel=SPARSE_PANEL)
]  # fmt: skip
Verify = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        rich_help_panel=OUTPUT_PANEL,
        help="Read OUT back and compare it with the model; run it, a GGUF file where llama.cpp is installed.",
    ),
]


def export(
    model: Model,
    out: Out = None,
    format: Format = "gguf",
    quantize: Quantize = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    embedding_bits: EmbeddingBits = None,
    force: Force = False,
    each: Each = False,
    overwrite: Overwrite = False,
    verify: Verify = True,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a model in another format, read it back, and run it where a program for it is installed."""
    given: dict[str, Any] = {
        "quantize": quantize, "bits": bits, "group_size": group_size, "embedding_bits": embedding_bits,
        "force": force or None,
    }  # fmt: skip
    options = {name: value for name, value in given.items() if value is not None}
    with console.working(quiet=quiet) as reporter:
        formats = available("formats")
        if format not in formats:
            raise UnknownNameError("format", format, formats)
        where = out if out is not None else Path(name_of(model) + (f"-{format}" if format in FOLDERS else f".{format}"))
        if out is None:
            reporter.note(f"the result goes to {where}")
        from secateur.verbs.export import export as run

        result = run(
            model, where, format=format, overwrite=overwrite, verify=verify, reporter=reporter, **options
        )  # fmt: skip
    console.emit(result, json=json, render=lambda: tables.exported(result, each=each))
