"""Verbs replaced by stand-ins that record how they were called: the command line is tested without a model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from secateur.cli.app import main


class Verb:
    """Stands in for one verb: keeps the call, then answers, raises, or runs what it was given."""

    def __init__(self) -> None:
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.calls = 0
        self.answer: Any = None
        self.during: Callable[..., Any] = lambda reporter: None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.args, self.kwargs, self.calls = args, kwargs, self.calls + 1
        self.during(kwargs.get("reporter"))
        return self.answer


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Verb]:
    def install(name: str) -> Verb:
        stand_in = Verb()
        monkeypatch.setitem(sys.modules, f"secateur.verbs.{name}", SimpleNamespace(**{name: stand_in}))
        return stand_in

    return install


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimpleNamespace]:
    """Run a command line in this process; status, stdout and stderr come back."""
    monkeypatch.setenv("COLUMNS", "140")

    def command(*arguments: str) -> SimpleNamespace:
        capsys.readouterr()
        status = main(arguments)
        captured = capsys.readouterr()
        return SimpleNamespace(status=status, out=captured.out, err=captured.err)

    return command
