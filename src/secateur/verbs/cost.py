"""What a recovery run costs: how many steps its budget is, measured on the spot and told before the training starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from secateur.checkpoint.ledger import Ledger
from secateur.errors import UsageError
from secateur.processes import Processes
from secateur.progress import Reporter
from secateur.recovery.blocks import duration
from secateur.training import CACHED, SAVE_MINUTES
from secateur.verbs.lesson import Lesson


@dataclass(frozen=True)
class Budget:
    """Length of a run."""

    steps: int
    seconds: float | None
    """Of one step's forward and backward; None when it could not be measured."""
    logging: int
    """Losses are noted every so many steps, and checkpoints are made there."""


def settle(
    lesson: Lesson, measure: Callable[[], tuple[float | None, int]], ledger: Ledger | None, processes: Processes,
    reporter: Reporter,
) -> Budget:  # fmt: skip
    """Decide the length of a run in the first process, for all of them, and say what it will cost.

    A resumed run has the length that it had: it must not measure itself another one.

    Args:
        measure: seconds of a step, or None, and the number of parameters that are trained.
        ledger: that of the run, in the first process.

    Raises:
        UsageError: for a budget in minutes that allows no step.
    """

    def decide() -> list[float | None]:
        assert ledger is not None
        seconds, trained = measure()
        noted = next((entry for entry in ledger.steps if "steps" in entry), None)
        if noted is None:
            steps = lesson.steps
            if steps is None:
                assert lesson.settings.minutes is not None
                assert seconds is not None
                steps = steps_in(lesson.settings.minutes, seconds)
            noted = {"steps": steps, "logging_steps": logging_steps(steps, seconds, _save_minutes(lesson))}
            ledger.append(noted)
        steps = noted["steps"]
        reporter.note(_told(lesson, steps, seconds, trained))
        _tell_late_checkpoints(lesson, steps, seconds, reporter)
        return [steps, seconds, noted.get("logging_steps", max(1, steps // 20))]

    steps, seconds, logging = processes.on_first(decide)
    return Budget(steps, seconds, logging)


def _save_minutes(lesson: Lesson) -> float:
    return lesson.settings.save_minutes or SAVE_MINUTES


def logging_steps(steps: int, seconds: float | None, save_minutes: float) -> int:
    """A twentieth of the run, but never longer than the time between two checkpoints."""
    often = steps // 20 if seconds is None else min(steps // 20, int(60 * save_minutes / max(seconds, 1e-9)))
    return max(1, often)


def steps_in(minutes: float, seconds: float) -> int:
    """Steps that a budget in minutes allows.

    Raises:
        UsageError: when it allows none.
    """
    steps = int(60 * minutes / seconds)
    if steps < 1:
        raise UsageError(
            f"--minutes {minutes:g} allows no step: one takes {seconds:.1f} s",
            hint="give more minutes, or a smaller --batch-size or --sequence-length",
        )
    return steps


def _tell_late_checkpoints(lesson: Lesson, steps: int, seconds: float | None, reporter: Reporter) -> None:
    """Warn where the user's own logging makes checkpoints rarer than asked."""
    given = {key.replace("-", "_"): value for key, value in lesson.settings.trainer.items()}.get("logging_steps")
    if given is None or seconds is None:
        return
    every = float(given)
    every = math.ceil(every * steps) if every < 1 else every
    if every * seconds > 60 * _save_minutes(lesson):
        reporter.warn(
            f"--trainer logging_steps={given}: checkpoints are made where losses are noted, so about every "
            f"{duration(every * seconds)}, not every {_save_minutes(lesson):g} min"
        )


def _told(lesson: Lesson, steps: int, seconds: float | None, trained: int) -> str:
    tokens = lesson.tokens_per_step
    told = f"{steps} steps of {tokens:,} tokens"
    if lesson.processes > 1:
        told += f" in {lesson.processes} processes"
    if seconds is not None:
        each = 1000 * seconds / tokens
        rate = f"{each:.1f}" if each >= 1 else f"{each:.2g}"
        told += f": {rate} s per 1,000 tokens, about {duration(steps * seconds)} in all"
        told += ", without the exchange between processes" if lesson.processes > 1 else ""
    if lesson.settings.minutes is not None:
        asked = "asking the teacher, " if lesson.teacher is not None and lesson.loss in CACHED else ""
        told += f"; --minutes counts these steps only: {asked}loading, verifying and measuring come on top"
    return (
        f"{told}; {trained:,} parameters are trained, whose gradients and optimiser take {12 * trained / 1e6:,.0f} MB"
    )


class StandIn:
    """Answers of no teacher in particular, of the size that a real one's have: enough to time a step with them.

    Args:
        shape: tokens of a window, answers kept for each.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        length, k = shape
        self._ids = torch.arange(k).expand(length, k)
        self._logs = torch.full((length, k), -math.log(k + 1.0))

    def __getitem__(self, window: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As `TeacherLogits` has it: classes (tokens, k) and log-probabilities (tokens, k)."""
        return self._ids, self._logs
