"""A result that is one file: it appears whole or not at all. Work happens in a file beside it, renamed at the end."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from secateur.checkpoint.locks import take_lock
from secateur.errors import DiskSpaceError, OutputError


class OutputFile:
    """The place of a result. Creating the object checks everything and writes nothing; use it in a ``with`` statement.

    Args:
        out: where the result shall stand.
        suffix: how its name must end.
        overwrite: an existing file may be replaced.
        sources: files and folders that are read, as the user named them and where they lie; OUT must not be one, or
            lie in one.

    Raises:
        OutputError: when OUT exists, is a folder, has another suffix, lies in the model or cannot be written.
    """

    def __init__(
        self, out: str | Path, *, suffix: str, overwrite: bool = False, sources: Iterable[str | Path] = ()
    ) -> None:
        self.out = Path(out).expanduser().resolve()
        self.partial = self.out.with_name(self.out.name + ".partial") if self.out.name else self.out
        self.overwrite = overwrite
        self._lock: int | None = None
        self._lock_path = self.out.with_name(f".{self.out.name}.lock") if self.out.name else self.out
        if self.out.is_dir():
            raise OutputError(f"output file {self.out} is a folder", hint=f"name a file that ends in {suffix}")
        if self.out.suffix != suffix:
            raise OutputError(f"output file {self.out.name} does not end in {suffix}", hint="choose such a name")
        if self.out.exists() and not overwrite:
            raise OutputError(
                f"output file {self.out} exists", hint="choose another name, or replace it with --overwrite"
            )
        if self.partial.is_dir():
            raise OutputError(f"{self.partial} is a folder and in the way", hint="remove it, or choose another name")
        for source in (Path(one).expanduser().resolve() for one in sources):
            if source in (self.out, *self.out.parents):
                where = "the model itself" if source == self.out else f"inside the model {source}"
                raise OutputError(
                    f"output file {self.out} is {where}",
                    hint="choose another name, or a place beside the model",
                )
        parent = self._parent()
        if not parent.is_dir():
            raise OutputError(f"{parent} is a file, so {self.out} cannot be made", hint="choose another place")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"{parent} is not writable, so {self.out} cannot be made", hint="choose another place")

    def require_space(self, nbytes: int) -> None:
        """Refuse when the result does not fit on the disk.

        Raises:
            DiskSpaceError: with both numbers.
        """
        free = shutil.disk_usage(self._parent()).free
        if nbytes > free:
            raise DiskSpaceError(
                f"the result needs {nbytes:,} bytes, {self._parent()} has {free:,} left",
                hint="free some space, or choose a place on another disk",
            )

    def commit(self) -> Path:
        """Give the finished file its name and return it.

        Raises:
            OutputError: when OUT appeared meanwhile, or the file cannot be renamed.
        """
        if self.out.exists() and not self.overwrite:
            raise OutputError(f"output file {self.out} appeared during the run", hint="replace it with --overwrite")
        try:
            with self.partial.open("rb") as file:
                os.fsync(file.fileno())
            self.partial.replace(self.out)
        except OSError as error:
            raise OutputError(
                f"{self.partial} cannot be renamed to {self.out.name}: {error.strerror}", hint="choose another place"
            ) from error
        return self.out

    def __enter__(self) -> Self:
        try:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self._lock = take_lock(self._lock_path)
            if self._lock is not None:
                self.partial.unlink(missing_ok=True)  # of a run that was killed
        except OSError as error:
            raise OutputError(
                f"{self.partial} cannot be made: {error.strerror}", hint="choose another place"
            ) from error
        if self._lock is None:
            raise OutputError(f"another run writes {self.out}", hint="wait for it, or choose another name")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.partial.unlink(missing_ok=True)  # it is there only when the run did not come to its end
        if self._lock is not None:
            if sys.platform == "win32":  # must be closed first there
                os.close(self._lock)
                self._lock_path.unlink(missing_ok=True)
            else:
                self._lock_path.unlink(missing_ok=True)
                os.close(self._lock)
            self._lock = None

    def _parent(self) -> Path:
        """The nearest folder above OUT that is there already."""
        return next(parent for parent in self.out.parents if parent.exists())
