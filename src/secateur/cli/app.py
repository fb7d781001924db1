"""The command ``secateur``: its sub-commands, and how an error becomes one line and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, cast

import typer

from secateur.cli import (
    allocate,
    bench,
    console,
    convert,
    evaluate,
    export,
    generate,
    inspect,
    methods,
    prune,
    recover,
    report,
    study,
)
from secateur.errors import SecateurError

USAGE_ERROR = cast("type[Exception]", typer.BadParameter.__mro__[1])
"""Typer's own class of command-line mistakes; it is exported only as the base of BadParameter."""

app = typer.Typer(
    name="secateur",
    help="Prune Transformers, measure what it did, and prove the result.",
    epilog="Start with: secateur prune demo -o pruned",
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        import secateur

        console.write(f"secateur {secateur.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Prune Transformers, measure what it did, and prove the result."""


app.command("inspect")(inspect.inspect)
app.command("prune")(prune.prune)
app.command("allocate")(allocate.allocate)
app.command("recover")(recover.recover)
app.command("convert")(convert.convert)
app.command("evaluate")(evaluate.evaluate)
app.command("bench")(bench.bench)
app.command("export")(export.export)
app.command("generate")(generate.generate)
app.command("report")(report.report)
app.command("methods")(methods.methods)
app.add_typer(study.app, name="study")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status; nothing is raised.

    0 done; 2 bad usage or bad input, nothing written; 1 failed part-way; 3 verification failed; 130 Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Read here and not from a parsed flag: the parsing itself may be what fails.
    debug = "--debug" in given
    try:
        if given[:1] == ["convert"]:
            given = convert.spread_values(given)
        status = app(given or ["--help"], prog_name="secateur", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) has left. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SecateurError as error:
        _trace(debug)
        if not error.told:
            console.fail(error.message, error.hint)
        return error.exit_code
    except USAGE_ERROR as error:
        _trace(debug)
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "secateur"
        message = getattr(error, "format_message", error.__str__)()
        console.fail(message, f"`{command} --help` lists what can be given")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        console.fail("interrupted")
        return 130
    except Exception as error:  # noqa: BLE001 - a bug of ours: said in one line unless asked for more
        _trace(debug)
        hint = "" if debug else "run the same command with --debug for the details"
        console.fail(f"internal error: {type(error).__name__}: {error}", hint)
        return 1
    return status if isinstance(status, int) else 0


def _trace(debug: bool) -> None:
    if debug:
        console.write_error(traceback.format_exc().rstrip())


def entry() -> None:
    """The installed script."""
    sys.exit(main())
