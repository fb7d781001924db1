"""The output folder: a result appears whole or not at all. Work happens in a folder beside it, renamed at the end."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from secateur.checkpoint.ledger import LEDGER
from secateur.checkpoint.locks import take_lock
from secateur.errors import DiskSpaceError, OutputError

LOCK = ".lock"
WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data"})
WEIGHT_SUFFIXES |= {".ot", ".tflite", ".gguf", ".ggml", ".npz", ".npy", ".mlmodel"}
CODE_SUFFIXES = frozenset(
    {".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".sh", ".ipynb", ".pkl", ".pickle", ".joblib"}
)
OTHER_SUFFIXES = frozenset({".partial", ".lock", ".tmp"})
OWN_FILES = frozenset({"config.json", "secateur.json", "readme.md", LEDGER})
ENCODER_PART = re.compile(r"\d+_[a-z]+")
FOREIGN_FOLDERS = frozenset({"original", "onnx", "openvino", "coreml", "metal", "runs", "__pycache__"})


class OutputFolder:
    """The place of a result. Creating the object checks everything and writes nothing; ``prepare`` starts the work.

    Args:
        out: where the result shall stand.
        overwrite: an existing result may be replaced and, unless ``resume``, a left-over partial folder discarded.
        resume: go on in the partial folder of an earlier run.
        sources: files and folders that are read, as the user named them and where they lie; OUT must not touch one.

    Raises:
        OutputError: when OUT exists, is a file, overlaps the model or cannot be written; when there is a partial folder
            and neither flag was given, or none to resume.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        overwrite: bool = False,
        resume: bool = False,
        sources: Iterable[str | Path] = (),
    ) -> None:
        self.out = Path(out).expanduser().resolve()
        self.partial = self.out.with_name(self.out.name + ".partial") if self.out.name else self.out
        self.overwrite = overwrite
        self.resuming = resume
        self._aside = self.out.parent / f".{self.out.name}.replaced"
        self._lock: int | None = None
        self._check_place()
        for source in sources:
            self._check_apart(Path(source).expanduser().resolve())
        self._check_existing()
        self._check_partial()

    def _check_apart(self, source: Path) -> None:
        if self.out == source:
            raise OutputError(
                f"output folder {self.out} is a model that is read, or that one which is read was made from",
                hint="choose another output folder",
            )
        if source in self.out.parents:
            raise OutputError(
                f"output folder {self.out} is inside the model {source}", hint="choose a folder beside the model"
            )
        if self.out in source.parents:
            raise OutputError(
                f"the model {source} is inside the output folder {self.out}", hint="choose a folder beside the model"
            )

    def _check_place(self) -> None:
        if not self.out.name:
            raise OutputError(f"{self.out} cannot be the output folder", hint="name a folder that does not exist yet")
        parent = self._parent()
        if not parent.is_dir():
            raise OutputError(f"{parent} is a file, so {self.out} cannot be made", hint="choose another output folder")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(
                f"{parent} is not writable, so {self.out} cannot be made", hint="choose another output folder"
            )

    def _check_existing(self) -> None:
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise OutputError(f"output folder {self.out} is a file", hint="choose another output folder")
        if not self.overwrite:
            raise OutputError(
                f"output folder {self.out} exists", hint="choose another name, or replace it with --overwrite"
            )
        names = {path.name for path in self.out.iterdir()}
        if names and "config.json" not in names and "secateur.json" not in names:
            raise OutputError(
                f"output folder {self.out} holds something that is not a model",
                hint="--overwrite replaces model folders only; choose another name, or empty it yourself",
            )
        if self.out in (cwd := Path.cwd(), *cwd.parents):
            raise OutputError(f"output folder {self.out} holds the current folder", hint="choose another name")

    def _check_partial(self) -> None:
        if self.partial.exists() and not self.partial.is_dir():
            raise OutputError(f"{self.partial} is a file and in the way", hint="remove it, or choose another name")
        if self.resuming and not self.partial.exists():
            raise OutputError(f"nothing to resume: there is no {self.partial}", hint="run the command without --resume")
        if not self.resuming and not self.overwrite and self.partial.exists():
            raise OutputError(
                f"{self.partial} is left over from a run that did not end",
                hint="go on with --resume, or start again with --overwrite",
            )

    def require_space(self, nbytes: int) -> None:
        """Refuse when the result does not fit on the disk. What a resumed run already holds counts as available.

        Raises:
            DiskSpaceError: with both numbers.
        """
        held = 0
        if self.resuming and self.partial.is_dir():
            held = sum(_allocated(path) for path in self.partial.rglob("*") if path.is_file())
        free = shutil.disk_usage(self._parent()).free + held
        if nbytes > free:
            raise DiskSpaceError(
                f"the result needs {nbytes:,} bytes, {self._parent()} has {free:,} left",
                hint="free some space, or choose an output folder on another disk",
            )

    def prepare(self) -> Path:
        """Make the partial folder (or keep it when resuming), lock it against a second run, and return it.

        Raises:
            OutputError: when another run is at work in it, or it cannot be made.
        """
        try:
            if self._aside.exists() and not self.resuming and not self.out.exists():
                self._aside.rename(self.out)  # a run was killed in the moment in which it replaced OUT
            self.partial.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if not self.resuming:
                for path in self.partial.iterdir():
                    if path.name != LOCK:
                        _remove(path)
        except OSError as error:
            raise OutputError(
                f"{self.partial} cannot be made: {error.strerror}", hint="choose another place"
            ) from error
        return self.partial

    def commit(self) -> Path:
        """Give the finished folder its name and return it. A replaced folder is restored when that fails.

        Raises:
            OutputError: when the folder cannot be renamed; the partial folder stays and can be resumed.
        """
        try:
            if self.out.exists():
                if not self.overwrite:
                    raise OutputError(
                        f"output folder {self.out} appeared during the run; the result is in {self.partial}",
                        hint="move it away and go on with --resume, or replace it with --resume --overwrite",
                    )
                if self._aside.exists():
                    _remove(self._aside)
                self.out.rename(self._aside)
            self._drop_lock()
            self.partial.rename(self.out)
        except OSError as error:
            if self._aside.exists() and not self.out.exists():
                self._aside.rename(self.out)
            raise OutputError(
                f"{self.partial} cannot be renamed to {self.out.name}: {error.strerror}", hint="go on with --resume"
            ) from error
        # Only now: a run killed before the rename still has its ledger.
        (self.out / LEDGER).unlink(missing_ok=True)
        if self._aside.exists():
            _remove(self._aside)
        _sync_folder(self.out.parent)
        return self.out

    def discard(self) -> None:
        """Remove the partial folder and all work in it."""
        self._drop_lock()
        if self.partial.is_dir():
            _remove(self.partial)

    def release(self) -> None:
        """Let go of the partial folder but keep it, so that another run can resume it."""
        self._drop_lock()

    def __enter__(self) -> Self:
        self.prepare()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _parent(self) -> Path:
        """The nearest folder above OUT that is there already."""
        return next(parent for parent in self.out.parents if parent.exists())

    def _take_lock(self) -> None:
        self._lock = take_lock(self.partial / LOCK)
        if self._lock is None:
            raise OutputError(
                f"another run is at work in {self.partial}", hint="wait for it, or choose another output folder"
            )

    def _drop_lock(self) -> None:
        if self._lock is not None:
            # Removed while still held, so that nobody can lock a file that is about to go; Windows must close it first.
            if sys.platform == "win32":
                os.close(self._lock)
                (self.partial / LOCK).unlink(missing_ok=True)
            else:
                (self.partial / LOCK).unlink(missing_ok=True)
                os.close(self._lock)
            self._lock = None


def copy_side_files(source_folder: str | Path, partial: str | Path) -> list[str]:
    """Copy what belongs to a model besides its weights: tokenizer, generation config, chat template, processors.

    Left out are weights and their indexes, code, pickles, hidden files, other exports, and what the caller
    writes itself (config.json, model card, result file). Safetensors of the further parts of a sentence encoder
    (``2_Dense``) are no weights of this kind: nothing prunes or writes them. Returns the names of the copied files.

    Raises:
        OutputError: when a file cannot be copied.
    """
    source, target = Path(source_folder), Path(partial)
    copied = []
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if path.is_file() and _belongs(name):
            try:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / name)
            except OSError as error:
                raise OutputError(f"{path} cannot be copied: {error.strerror}", hint="check the disk") from error
            copied.append(name.as_posix())
    return copied


def _belongs(name: Path) -> bool:
    lower = [part.lower() for part in name.parts]
    if any(part.startswith(".") for part in lower):
        return False
    if any(part in FOREIGN_FOLDERS or part.startswith("checkpoint-") for part in lower[:-1]):
        return False
    if len(lower) == 1 and lower[0] in OWN_FILES:
        return False
    suffix = Path(lower[-1]).suffix
    if suffix == ".safetensors" and len(lower) == 2 and ENCODER_PART.fullmatch(lower[0]):
        return True
    return suffix not in WEIGHT_SUFFIXES | CODE_SUFFIXES | OTHER_SUFFIXES and not lower[-1].endswith(".index.json")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _allocated(path: Path) -> int:
    status = path.stat()
    blocks = getattr(status, "st_blocks", None)
    return status.st_size if blocks is None else int(blocks) * 512


def _sync_folder(path: Path) -> None:
    """Make a rename durable, where the system lets a folder be synced."""
    if sys.platform == "win32":
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
