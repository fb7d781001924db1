"""Writes safetensors checkpoints tensor by tensor, in any order, each at the place its header already names.

The files have their full length from the start, so a full disk shows before the work, a killed run leaves everything it
wrote, and nothing is held in memory. The bytes are those that safetensors' own ``save_file`` would have written.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch

from secateur.checkpoint.dtypes import NAMES, RANK
from secateur.checkpoint.reader import INDEX, WEIGHTS, CheckpointReader, read_into
from secateur.errors import CheckpointError, DiskSpaceError, OutputError, RunError

READ_AHEAD = 1 << 22  # bytes per read while hashing


class Entry(NamedTuple):
    """One tensor to be written."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ShardLayout:
    """One file to be written: its tensors in file order, and its metadata."""

    name: str
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})

    def header(self) -> bytes:
        """Length and header as they stand at the start of the file."""
        table: dict[str, object] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        start = 0
        for entry in self.entries:
            end = start + entry.nbytes
            table[entry.key] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
            start = end
        text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        """Length of the file in bytes."""
        return len(self.header()) + sum(entry.nbytes for entry in self.entries)


@dataclass(frozen=True)
class Layout:
    """All files of a checkpoint. Names of files and tensors are unique."""

    shards: tuple[ShardLayout, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on disk of all weights files."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def parameters(self) -> int:
        """Numbers in it that are no integers."""
        entries = [entry for shard in self.shards for entry in shard.entries]
        return sum(math.prod(entry.shape) for entry in entries if entry.dtype.is_floating_point)

    @property
    def keys(self) -> list[str]:
        return [entry.key for shard in self.shards for entry in shard.entries]


def layout_like(
    reader: CheckpointReader, dtype: torch.dtype | None = None, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> Layout:
    """The same shards, order and metadata as an existing checkpoint.

    Args:
        dtype: replaces that of floating tensors.
        shapes: new shapes by key, of the tensors that change theirs.
    """
    shapes = shapes or {}
    shards = []
    for shard in reader.shards:
        infos = [reader.info(key) for key in shard.keys]
        entries = [
            Entry(info.key, dtype if dtype is not None and info.dtype.is_floating_point else info.dtype,
                  shapes.get(info.key, info.shape))
            for info in infos
        ]  # fmt: skip
        if any(entry.dtype != info.dtype for entry, info in zip(entries, infos, strict=True)):
            # A changed width could put a tensor off its alignment, so wide numbers move to the front again.
            entries.sort(key=lambda entry: -entry.dtype.itemsize)
        shards.append(ShardLayout(shard.name, tuple(entries), shard.metadata))
    return Layout(tuple(shards))


def layout_for(
    entries: Iterable[Entry | tuple[str, torch.dtype, Iterable[int]]], max_shard_bytes: float = 5e9
) -> Layout:
    """Shards for new tensors, filled in the given order up to ``max_shard_bytes`` bytes of tensors each.

    Inside a file the tensors are sorted as safetensors does it: wide numbers first, then by name.
    """
    groups: list[list[Entry]] = [[]]
    filled = 0
    for key, dtype, shape in entries:
        entry = Entry(key, dtype, tuple(shape))
        if groups[-1] and filled + entry.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += entry.nbytes
    for group in groups:
        group.sort(key=lambda entry: (-RANK[entry.dtype], entry.key))
    count = len(groups)
    names = [WEIGHTS] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return Layout(tuple(ShardLayout(name, tuple(group)) for name, group in zip(names, groups, strict=True)))


class CheckpointWriter:
    """Writes the tensors of a layout into a folder.

    With ``resume`` a file that is already whole is kept as it is; the caller says with ``mark_written`` which of its
    tensors are good. Otherwise files are made anew.

    Raises:
        DiskSpaceError: when the files do not fit on the disk.
        OutputError: when they cannot be created.
    """

    def __init__(self, folder: str | Path, layout: Layout, resume: bool = False) -> None:
        self.folder = Path(folder)
        self.layout = layout
        self._entries = {entry.key: entry for shard in layout.shards for entry in shard.entries}
        self._shard_of = {entry.key: shard.name for shard in layout.shards for entry in shard.entries}
        if len(self._entries) != len(layout.keys) or len({shard.name for shard in layout.shards}) != len(layout.shards):
            raise ValueError("a layout must not name a tensor or a file twice")
        self._offsets: dict[str, int] = {}
        self._files: dict[str, int] = {}
        self._new: set[str] = set()
        self._written: set[str] = set()
        self._unsynced: set[str] = set()
        try:
            for shard in layout.shards:
                self._prepare(shard, resume)
        except BaseException:
            self.close()
            raise

    def _prepare(self, shard: ShardLayout, resume: bool) -> None:
        header = shard.header()
        offset = len(header)
        for entry in shard.entries:
            self._offsets[entry.key] = offset
            offset += entry.nbytes
        path = self.folder / shard.name
        keep = resume and _is_whole(path, header, offset)
        try:
            # O_RDWR, not append: tensors land at their own places. O_BINARY exists on Windows only.
            flags = os.O_RDWR | os.O_CREAT | (0 if keep else os.O_TRUNC) | getattr(os, "O_BINARY", 0)
            file = os.open(path, flags, 0o644)
            self._files[shard.name] = file
            if keep:
                return
            self._new.add(shard.name)
            _allocate(file, offset)
            # The header comes last: a file killed before this point is not whole and will be made again.
            _write_at(file, 0, memoryview(header))
            self._unsynced.add(shard.name)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise DiskSpaceError(
                    f"{path} needs {offset:,} bytes, more than the disk has left ({error.strerror})",
                    hint="free some space, or choose an output folder on another disk",
                ) from error
            raise OutputError(
                f"{path} cannot be created: {error.strerror}", hint="choose another output folder"
            ) from error

    def mark_written(self, keys: Iterable[str]) -> None:
        """Accept tensors that an earlier run wrote.

        Raises:
            OutputError: when their file is gone or was damaged since, so that nothing can be resumed.
        """
        for key in keys:
            if key not in self._shard_of or self._shard_of[key] in self._new:
                raise OutputError(
                    f"{self.folder} cannot be resumed: tensor {key} of the earlier run is gone",
                    hint="start again with --overwrite",
                )
            self._written.add(key)

    def write(self, key: str, tensor: torch.Tensor) -> None:
        """Put one tensor in its place. It must have the number format and shape of the layout, on any device.

        Raises:
            ValueError: when it has not, or the layout does not know the key.
            RunError: when the disk refuses.
        """
        if key not in self._entries:
            raise ValueError(f"tensor {key} is not in the layout")
        entry = self._entries[key]
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            raise ValueError(
                f"tensor {key} is {tensor.dtype} {tuple(tensor.shape)}, the layout has {entry.dtype} {entry.shape}"
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._put(key, 0, flat.numpy().data)
        self._written.add(key)

    def copy(self, reader: CheckpointReader, key: str) -> None:
        """Copy one tensor, unchanged byte for byte where the layout keeps its number format, else converted.

        Never holds more than a chunk of it.

        Raises:
            CheckpointError: when it cannot be read.
            ValueError: when its shape is not that of the layout.
            RunError: when the disk refuses.
        """
        info = reader.info(key)
        entry = self._entries.get(key)
        if entry is None or entry.shape != info.shape:
            raise ValueError(f"tensor {key} {info.shape} does not fit the layout: {entry}")
        place = 0
        for chunk in reader.chunks(key):
            data = chunk.to(entry.dtype).view(torch.uint8)
            self._put(key, place, data.numpy().data)
            place += data.numel()
        self._written.add(key)

    def tensor(self, key: str) -> torch.Tensor:
        """A tensor that was written, by this run or an earlier one, in newly allocated memory.

        Raises:
            ValueError: when it was not written yet.
            CheckpointError: when it cannot be read.
        """
        if key not in self._written:
            raise ValueError(f"tensor {key} was not written yet")
        entry = self._entries[key]
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        read_into(self.folder / self._shard_of[key], self._offsets[key], buffer)
        return buffer.view(entry.dtype).reshape(entry.shape)

    def sync(self) -> None:
        """Force what was written onto the disk: call it before noting in the ledger that a step is done.

        Raises:
            RunError: when the disk refuses.
        """
        for name in sorted(self._unsynced):
            try:
                os.fsync(self._files[name])
            except OSError as error:
                raise _failed(self.folder / name, error) from error
        self._unsynced.clear()

    def finish(self) -> dict[str, str]:
        """Close the files and write the index when there are several. Returns the sha256 of every file by its name.

        Raises:
            RunError: when a tensor was never written, or the disk refuses.
        """
        missing = [key for key in self._entries if key not in self._written]
        if missing:
            raise RunError(
                f"{len(missing)} tensors were never written, the first is {missing[0]}",
                hint="resume the run with --resume",
            )
        self.sync()
        self.close()
        if [shard.name for shard in self.layout.shards] != [WEIGHTS]:
            index = {
                "metadata": {"total_size": sum(entry.nbytes for entry in self._entries.values())},
                "weight_map": dict(sorted(self._shard_of.items())),
            }
            path = self.folder / INDEX
            try:
                path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            except OSError as error:
                raise _failed(path, error) from error
        return {shard.name: hash_file(self.folder / shard.name) for shard in self.layout.shards}

    def close(self) -> None:
        """Close the files; what was written stays."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _put(self, key: str, start: int, data: memoryview) -> None:
        name = self._shard_of[key]
        try:
            _write_at(self._files[name], self._offsets[key] + start, data)
        except OSError as error:
            raise _failed(self.folder / name, error) from error
        self._unsynced.add(name)


def hash_file(path: Path) -> str:
    """Hex sha256 of a file's content.

    Raises:
        CheckpointError: when it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            buffer = memoryview(bytearray(READ_AHEAD))
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", hint="check the file and its disk") from error
    return digest.hexdigest()


def _is_whole(path: Path, header: bytes, size: int) -> bool:
    try:
        with path.open("rb") as file:
            return path.stat().st_size == size and file.read(len(header)) == header
    except OSError:
        return False


def _allocate(file: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
    os.ftruncate(file, size)  # a file system that cannot promise the space: a full disk shows while writing


def _write_at(file: int, offset: int, data: memoryview) -> None:
    while data:
        if hasattr(os, "pwrite"):
            count = os.pwrite(file, data, offset)
        else:  # Windows
            os.lseek(file, offset, os.SEEK_SET)
            count = os.write(file, data)
        data = data[count:]
        offset += count


def _failed(path: Path, error: OSError) -> RunError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return RunError(
        f"{path} cannot be written: {error.strerror}",
        hint=("free some space" if full else "mend the disk") + " and go on with --resume: finished blocks are kept",
    )
