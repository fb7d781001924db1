"""The ledger of a run: which steps are done, so that a killed run can go on. One JSON line each, forced to disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.errors import OutputError, RunError

LEDGER = "ledger.jsonl"


class Ledger:
    """An append-only file: a header with the fingerprint of the run, then one line per finished step.

    A line counts when it is complete; a line that a kill tore is dropped, and its step is done again.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], steps: list[dict[str, Any]]) -> None:
        self.path = path
        self.fingerprint = dict(fingerprint)
        self.steps = steps

    @classmethod
    def begin(cls, path: Path, fingerprint: Mapping[str, Any], *, resume: bool) -> Ledger:
        """Open the ledger that is there when resuming, otherwise (or when a kill came before it was made) a new one.

        Raises:
            OutputError: as ``open`` and ``create``.
        """
        return cls.open(path, fingerprint) if resume and path.exists() else cls.create(path, fingerprint)

    @classmethod
    def create(cls, path: Path, fingerprint: Mapping[str, Any]) -> Ledger:
        """A new ledger; an old one at the same place is replaced. ``fingerprint`` must be JSON.

        Raises:
            OutputError: when it cannot be written.
        """
        # Written beside and renamed, so that a ledger never exists without a complete header.
        new = path.with_name(path.name + ".new")
        try:
            with new.open("w", encoding="utf-8") as file:
                file.write(_line(dict(fingerprint)))
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written: {error.strerror}", hint="choose another output folder"
            ) from error
        return cls(path, fingerprint, [])

    @classmethod
    def open(cls, path: Path, fingerprint: Mapping[str, Any]) -> Ledger:
        """The ledger of an earlier run with the same fingerprint; a torn last line is cut off the file.

        Raises:
            OutputError: when there is none, it is damaged, or the runs differ (the differing keys are named).
        """
        again = "start again with --overwrite"
        try:
            data = path.read_bytes()
        except OSError as error:
            raise OutputError(f"{path} cannot be read: {error.strerror}", hint=again) from None
        whole = data[: data.rfind(b"\n") + 1]
        lines: list[dict[str, Any]] = []
        for number, text in enumerate(whole.splitlines(), start=1):
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            if not isinstance(line, dict):
                raise OutputError(f"{path}: line {number} is damaged, the run cannot be resumed", hint=again)
            lines.append(line)
        if not lines:
            raise OutputError(f"{path} has no header, the run cannot be resumed", hint=again)
        old, new = lines[0], json.loads(_line(dict(fingerprint)))
        differing = sorted(key for key in {*old, *new} if key not in old or key not in new or old[key] != new[key])
        if differing:
            raise OutputError(
                f"{path.parent} is of another run: {', '.join(_change(key, old, new) for key in differing)}",
                hint=f"give the same settings as before, or {again}",
            )
        if len(whole) < len(data):
            try:
                os.truncate(path, len(whole))
            except OSError as error:
                raise OutputError(f"{path} cannot be written: {error.strerror}", hint=again) from error
        return cls(path, fingerprint, lines[1:])

    @staticmethod
    def header(path: Path) -> dict[str, Any] | None:
        """The fingerprint of an earlier run; None when there is none that can be read."""
        try:
            with path.open(encoding="utf-8") as file:
                found = json.loads(file.readline())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    @staticmethod
    def any_step(path: Path) -> bool:
        """Whether a ledger notes at least one finished step."""
        try:
            return path.read_bytes().count(b"\n") > 1
        except OSError:
            return False

    def append(self, step: Mapping[str, Any]) -> None:
        """Note a finished step. When this returns, the line is on the disk.

        Raises:
            RunError: when the disk refuses.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(dict(step)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be written: {error.strerror}", hint="free some space and go on with --resume"
            ) from error
        self.steps.append(dict(step))


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, allow_nan=False) + "\n"


def _change(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    def shown(side: Mapping[str, Any]) -> str:
        text = json.dumps(side.get(key))
        return text if len(text) <= 60 else text[:57] + "..."

    return f"{key} was {shown(old)}, now {shown(new)}"
