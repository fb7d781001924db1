"""The only printer: results to stdout; progress, notes and errors to stderr, live on a terminal and plain elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Protocol

from rich.console import Console, RenderableType

from secateur.errors import Interrupted
from secateur.progress import Reporter

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PLAIN_INTERVAL = 10.0
"""Seconds between two progress lines where there is no terminal."""
PLAIN_WIDTH = 200
"""Columns where there is no terminal to ask; wide, so that a line of a list stays a line for `grep`."""


class JsonResult(Protocol):
    """A result that says itself as one JSON object."""

    def to_json(self) -> str: ...


def _console(*, stderr: bool) -> Console:
    # Made anew each time, so that the streams of the moment are used; NO_COLOR and COLUMNS are read by Rich.
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, PLAIN_WIDTH)
    return console


def write(text: str) -> None:
    """One piece of text to stdout, exactly as it is."""
    sys.stdout.write(text + "\n")


class Stream:
    """A text to stdout while it is made. Made before the work, whose own stdout goes to stderr."""

    def __init__(self) -> None:
        self._out = sys.stdout
        self._told = 0

    def write(self, piece: str) -> None:
        """The next piece."""
        self._out.write(piece)
        self._out.flush()
        self._told += len(piece)

    def end(self, text: str) -> None:
        """What is missing of the whole text, and the end of the line."""
        self._out.write(text[self._told :] + "\n")


def write_error(text: str) -> None:
    """One piece of text to stderr, exactly as it is."""
    sys.stderr.write(text + "\n")


def show(item: RenderableType) -> None:
    """A table or text of a result to stdout."""
    console = _console(stderr=False)
    if console.is_terminal:
        console.print(item)
        return
    with console.capture() as captured:  # Rich fills every line up to the width of its table
        console.print(item)
    write("\n".join(line.rstrip() for line in captured.get().splitlines()))


def emit(result: JsonResult, *, json: bool, render: Callable[[], RenderableType]) -> None:
    """The result of a command: one JSON object, or what people read."""
    if json:
        write(result.to_json())
    else:
        show(render())


def fail(message: str, hint: str = "") -> None:
    """The line that names what went wrong, and the line that says what to do."""
    console = _console(stderr=True)
    _line(console, "error", message, "bold red")
    if hint:
        _line(console, "hint", hint, "cyan")


def _line(console: Console, label: str, message: str, style: str) -> None:
    from rich.text import Text

    text = Text(f"{label}: ", style=style)
    text.append(" ".join(message.split()), style="default not bold")
    console.print(text, soft_wrap=True)  # one line stays one line


def resident_memory() -> int:
    """Bytes of memory this process holds now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def duration(seconds: float) -> str:
    """A time for people: ``8 s``, ``1 min 05 s``, ``2 h 03 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class ConsoleReporter(Reporter):
    """Shows progress on stderr. ``quiet`` leaves out everything but warnings, which are never silent.

    ``clock`` gives seconds; it is an argument so that tests need not wait.
    """

    def __init__(self, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = _console(stderr=True)
        self._quiet = quiet
        self._clock = clock
        self._name = ""
        self._total = 0
        self._done = 0
        self._began = self._said = clock()
        self._live: Progress | None = None
        self._task: TaskID | None = None

    def stage(self, name: str, total: int) -> None:
        self.close()
        self._name, self._total, self._done = name, total, 0
        self._began = self._said = self._clock()
        if self._quiet:
            return
        if self._console.is_terminal:
            self._live = _progress_bar(self._console, counted=total > 1)
            self._task = self._live.add_task(name, total=total or None, detail="", memory=_memory())
            self._live.start()
        elif total > 1:
            _line(self._console, name, f"0/{total}", "bold")

    def advance(self, detail: str = "") -> None:
        self._done += 1
        if self._quiet:
            return
        if self._live is not None and self._task is not None:
            self._live.update(self._task, advance=1, detail=detail, memory=_memory())
            return
        now = self._clock()
        if now - self._said >= PLAIN_INTERVAL and self._done < self._total:
            self._said = now
            left = duration((now - self._began) / self._done * (self._total - self._done))
            where = f" ({detail})" if detail else ""
            _line(self._console, self._name, f"{self._done}/{self._total}{where}, {left} left, {_memory()}", "bold")

    def note(self, message: str) -> None:
        if not self._quiet:
            _line(self._console, "note", message, "dim")

    def warn(self, message: str) -> None:
        _line(self._console, "warning", message, "yellow")

    def close(self, *, finished: bool = True) -> None:
        """End the current stage; ``finished`` says that its work was done, which is then told in one line."""
        if self._live is not None:
            self._live.stop()
            self._live = self._task = None
        if self._name and finished and not self._quiet:
            steps = f"{self._done} of {self._total} " if self._total > 1 else ""
            _line(self._console, self._name, f"{steps}done in {duration(self._clock() - self._began)}", "bold")
        self._name = ""


def _memory() -> str:
    return f"{resident_memory() / 1e6:,.0f} MB"


def _progress_bar(console: Console, *, counted: bool) -> Progress:
    """Steps and time left where there are steps to count, else the time it has taken so far."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    steps: list[ProgressColumn] = [TimeElapsedColumn()]
    if counted:
        steps = [BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(compact=True), TextColumn("left")]

    return Progress(
        TextColumn("{task.description}", style="bold", markup=False),
        *steps,
        TextColumn("{task.fields[memory]}"),
        TextColumn("{task.fields[detail]}", style="dim", markup=False),
        console=console,
        transient=True,
        refresh_per_second=4,  # the cores belong to the work
        redirect_stdout=False,
    )


@contextmanager
def working(*, quiet: bool) -> Iterator[ConsoleReporter]:
    """The time in which a verb works: progress is shown, and what libraries print to stdout goes to stderr.

    Raises:
        Interrupted: on Ctrl-C, unless the verb itself has already said how to go on.
    """
    reporter = ConsoleReporter(quiet=quiet)
    try:
        with redirect_stdout(sys.stderr):
            yield reporter
    except KeyboardInterrupt:
        reporter.close(finished=False)
        raise Interrupted("interrupted", hint="nothing of this command was finished; run it again") from None
    except BaseException:
        reporter.close(finished=False)
        raise
    reporter.close()
