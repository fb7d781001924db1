"""When and how fast a quantity grows during training: the cubic ramp between two steps."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.errors import UsageError


def cubic(initial: float, final: float, progress: float) -> float:
    """s_f + (s_i - s_f)·(1 - progress)³, fast at first and slow at the end (arXiv 1710.01878, eq. 1).

    Args:
        progress: (t - t₀) / (n·Δt), from 0 to 1.
    """
    return final + (initial - final) * (1 - progress) ** 3


@dataclass(frozen=True)
class Window:
    """The steps between which a ramp rises."""

    begin: int
    end: int

    def progress(self, step: int) -> float:
        """0 until ``begin``, 1 from ``end`` on."""
        return min(max((step - self.begin) / (self.end - self.begin), 0.0), 1.0)


def as_steps(value: float, steps: int) -> int:
    """A share of ``steps`` (a value up to 1) or a number of steps (above 1), as a number of steps."""
    return round(value * steps if value <= 1 else value)


def check_every(every: int, schedule: str) -> None:
    """Refuse fewer than one step between updates.

    Raises:
        UsageError: when it is below 1.
    """
    if every < 1:
        raise UsageError(f"every of schedule {schedule} is {every}", hint="the masks change every 1 or more steps")


def check_window(begin: float, end: float, schedule: str) -> None:
    """Refuse what no training can satisfy; a share and a number of steps can only be compared when it starts.

    Raises:
        UsageError: when ``begin`` is negative or not before ``end``.
    """
    comparable = (begin <= 1) == (end <= 1)
    if not begin >= 0 or not end > 0 or (comparable and begin >= end):
        raise UsageError(
            f"schedule {schedule} cannot begin at {begin} and end at {end}",
            hint="values up to 1 are shares of the training, larger ones are steps; begin comes before end",
        )


def window(begin: float, end: float, steps: int, schedule: str) -> Window:
    """The window in steps of a training of ``steps`` steps.

    Raises:
        UsageError: when it is empty or reaches beyond the training.
    """
    found = Window(as_steps(begin, steps), as_steps(end, steps))
    if not found.begin < found.end <= steps:
        raise UsageError(
            f"schedule {schedule} would run from step {found.begin} to step {found.end} of {steps}",
            hint="train longer, or change begin and end",
        )
    return found
