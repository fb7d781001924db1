"""What can go wrong by the user's doing, one class per cause.

Every error carries one line saying what was wrong and where, and a ``hint`` saying what to do about it. Only this tree
becomes a one-line message with an exit status; any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SecateurError(Exception):
    """Root of every error meant for the user. ``exit_code`` is the status of the command line."""

    exit_code = 2
    told = False
    """Whether another process of the same run has said it already."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(SecateurError):
    """A flag, argument or recipe line that makes no sense."""


class RecipeError(UsageError):
    """The recipe file cannot be read, or has a key or value that is not known."""


class StudyError(UsageError):
    """A study that cannot be read, that asks for what cannot be, or whose storage belongs to another one."""


class UnknownNameError(UsageError):
    """A name (method, allocation, pattern ...) that is not in the list of known ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
        nearest = f"did you mean '{close[0]}'? " if close else ""
        super().__init__(f"unknown {kind} '{name}'", hint=f"{nearest}known: {', '.join(names)}")
        self.nearest = close[0] if close else None


class SparsityError(UsageError):
    """A sparsity outside [0, 1), or one that contradicts the pattern."""


class AllocationError(UsageError):
    """An allocation file that cannot be read, or that was made for another model."""


class BudgetError(UsageError):
    """A budget that cannot be read, that keeps everything, or that nothing meets."""


class PatternError(UsageError):
    """A pattern that cannot be read, or does not divide the columns of a matrix."""


class TargetError(UsageError):
    """A target, ignore or override pattern that matches nothing, or matches what cannot be pruned."""


class CalibrationError(UsageError):
    """Calibration or evaluation data that is missing, empty, too short, or of the wrong kind."""


class SourceError(SecateurError):
    """The model cannot be found or opened."""


class CheckpointError(SourceError):
    """A weights file is missing, truncated, corrupt, or names a file it must not."""


class UnsafeCheckpointError(SourceError):
    """Opening the model would run code: pickled weights, or a config that asks for remote code."""


class WeightValueError(SecateurError):
    """A weight holds NaN or infinity."""


class UnsupportedModelError(SecateurError):
    """The model has a structure that cannot be pruned; the message names it and the reason."""


class OutputError(SecateurError):
    """The output folder exists, lies inside the model, or cannot be written."""


class DiskSpaceError(OutputError):
    """Less free space than the result needs."""


class MissingExtraError(SecateurError):
    """An optional dependency is not installed; the hint is the command that installs it."""


class RunError(SecateurError):
    """Work failed part-way. What was done is kept and the run can be resumed."""

    exit_code = 1


class Interrupted(RunError):
    """Ctrl-C. What was done is kept and the run can be resumed."""

    exit_code = 130


class VerificationError(SecateurError):
    """What was written is not what was made."""

    exit_code = 3
