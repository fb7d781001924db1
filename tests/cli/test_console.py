"""Progress: plain lines where there is no terminal, quiet means no progress, warnings are never silent."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout

import pytest

from secateur.cli import console


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_plain_lines_come_at_intervals_and_at_the_end(capsys):
    clock = Clock()
    reporter = console.ConsoleReporter(clock=clock)
    reporter.stage("pruning", 30)
    for step in range(30):
        clock.now += 4
        reporter.advance(f"block [{step}]")
    reporter.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "pruning: 0/30"
    assert lines[1].startswith("pruning: 3/30 (block [2]), 1 min 48 s left, ")
    assert lines[1].endswith(" MB")
    assert lines[-1] == "pruning: 30 of 30 done in 2 min 00 s"
    assert len(lines) == 11


def test_a_new_stage_ends_the_one_before(capsys):
    reporter = console.ConsoleReporter(clock=Clock())
    reporter.stage("first", 1)
    reporter.advance()
    reporter.stage("second", 1)
    assert capsys.readouterr().err == "first: done in 0 s\n"


def test_quiet_keeps_only_warnings(capsys):
    reporter = console.ConsoleReporter(quiet=True, clock=Clock())
    reporter.stage("pruning", 3)
    reporter.advance()
    reporter.note("a note")
    reporter.warn("a warning [with brackets]")
    reporter.close()
    assert capsys.readouterr().err == "warning: a warning [with brackets]\n"


def test_a_terminal_gets_a_bar_and_no_rubbish_is_left(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    clock = Clock()
    reporter = console.ConsoleReporter(clock=clock)
    reporter.stage("pruning", 2)
    clock.now += 61
    reporter.advance("block [1]")
    reporter.warn("look")
    reporter.advance("block [2]")
    reporter.close()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "2 of 2 done in 1 min 01 s" in shown.err
    assert "look" in shown.err


def test_no_color_is_obeyed(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    console.fail("the cause", "the mend")
    assert "\x1b[31m" not in capsys.readouterr().err
    monkeypatch.delenv("NO_COLOR")
    console.fail("the cause", "the mend")
    assert "31m" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (7380, "2 h 03 min")]
)
def test_durations(seconds, text):
    assert console.duration(seconds) == text


def test_an_unfinished_stage_is_not_called_done(capsys):
    def work():
        with console.working(quiet=False) as reporter:
            reporter.stage("pruning", 3)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work()
    assert "done" not in capsys.readouterr().err


def test_a_streamed_text_is_whole_and_once(capsys):
    stream = console.Stream()
    with redirect_stdout(sys.stderr):  # as while a verb works
        for piece in ("Once", " upon"):
            stream.write(piece)
    assert capsys.readouterr().out == "Once upon"
    stream.end("Once upon a time")
    assert capsys.readouterr().out == " a time\n"
