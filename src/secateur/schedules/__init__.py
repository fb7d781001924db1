"""Schedules that prune while a model is trained; one file each, named after the schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.plugins import build, load_class
from secateur.schedules._base import Matrix, Pruner, Schedule, Training

__all__ = ["Matrix", "Pruner", "Schedule", "Training", "make_schedule"]


def make_schedule(name: str, options: Mapping[str, Any] | None = None) -> Schedule:
    """Build a schedule from its name and plain options.

    Raises:
        UnknownNameError: for an unknown schedule or option.
        UsageError: for an option with a value it refuses.
    """
    schedule: Schedule = build(load_class("schedules", name, "schedule"), options or {}, f"schedule {name}")
    return schedule
