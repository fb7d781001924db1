"""How work tells what it is doing: a callback object, passed down as an argument. The default says nothing."""

from __future__ import annotations


class Reporter:
    """Receives progress and messages. The command line shows them; a library caller may ignore them."""

    def stage(self, name: str, total: int) -> None:
        """A new stage of ``total`` steps begins; the previous one is over."""

    def advance(self, detail: str = "") -> None:
        """One step of the current stage is done."""

    def note(self, message: str) -> None:
        """Something the user may want to know."""

    def warn(self, message: str) -> None:
        """Something the user must not miss: a rounding, a fallback, a doubt."""


class Recorder(Reporter):
    """Passes everything on to another reporter and keeps the warnings, so that they also reach the result file."""

    def __init__(self, inner: Reporter | None = None) -> None:
        self.inner = inner or Reporter()
        self.warnings: list[str] = []

    def stage(self, name: str, total: int) -> None:
        self.inner.stage(name, total)

    def advance(self, detail: str = "") -> None:
        self.inner.advance(detail)

    def note(self, message: str) -> None:
        self.inner.note(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        self.inner.warn(message)
