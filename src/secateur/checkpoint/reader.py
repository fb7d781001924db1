"""Reads safetensors checkpoints one tensor at a time, each into memory of its own.

The header is parsed and checked here rather than through a file mapping: mapped pages would count as resident memory of
the process, and a fault in the file would surface in the middle of a run instead of before it.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

import torch

from secateur.checkpoint.dtypes import SAFETENSORS_DTYPES
from secateur.errors import CheckpointError, UnsafeCheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; the limit of the format itself
CHUNK = 1 << 24  # bytes read at once where a whole tensor is not needed


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint: where it is and what it looks like. ``offset`` counts bytes from the file's start."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    shard: str
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its keys in file order and its own metadata."""

    name: str
    path: Path
    keys: tuple[str, ...]
    metadata: dict[str, str]


class CheckpointReader:
    """The weights of a Hugging Face folder, read lazily. Opening it reads and checks the headers only.

    Raises:
        CheckpointError: when a file is missing, truncated or corrupt, the index does not agree with the shards, or
            names a file outside the folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.shards: list[Shard] = []
        self._infos: dict[str, TensorInfo] = {}
        self._files: dict[str, FileIO] = {}
        self._lock = threading.Lock()
        listed = shard_names(self.folder)
        for name in sorted(set(listed.values())) or [WEIGHTS]:
            infos, metadata = read_header(self.folder / name, name)
            for info in infos:
                if info.key in self._infos:
                    raise CheckpointError(
                        f"{self.folder}: tensor {info.key} is both in {self._infos[info.key].shard} and in {name}",
                        hint="download the model again, or remove the file that does not belong to it",
                    )
                self._infos[info.key] = info
            self.shards.append(Shard(name, self.folder / name, tuple(info.key for info in infos), metadata))
        for key, name in listed.items():
            if key not in self._infos or self._infos[key].shard != name:
                raise CheckpointError(
                    f"{self.folder / INDEX} lists tensor {key} in {name}, but it is not there",
                    hint="the index and the shards are of different models; download the model again",
                )

    @property
    def keys(self) -> list[str]:
        """Names of all tensors, in file order, shard after shard."""
        return list(self._infos)

    def __contains__(self, key: object) -> bool:
        return key in self._infos

    def info(self, key: str) -> TensorInfo:
        """Shape, number format and place of a tensor.

        Raises:
            CheckpointError: when there is no such tensor.
        """
        try:
            return self._infos[key]
        except KeyError:
            raise CheckpointError(
                f"{self.folder} has no tensor {key}", hint="its config.json and its weights are of different models"
            ) from None

    def tensor(self, key: str) -> torch.Tensor:
        """The whole tensor, in newly allocated memory that the caller owns.

        Raises:
            CheckpointError: when there is no such tensor or the file cannot be read.
        """
        info = self.info(key)
        buffer = torch.empty(info.nbytes, dtype=torch.uint8)
        self._read_into(info, 0, buffer)
        return buffer.view(info.dtype).reshape(info.shape)

    def chunks(self, key: str, nbytes: int = CHUNK) -> Iterator[torch.Tensor]:
        """The tensor in flat pieces of at most ``nbytes`` bytes, for work that never needs all of it.

        Raises:
            CheckpointError: when there is no such tensor or the file cannot be read.
        """
        info = self.info(key)
        step = max(nbytes - nbytes % info.dtype.itemsize, info.dtype.itemsize)
        for start in range(0, info.nbytes, step):
            buffer = torch.empty(min(step, info.nbytes - start), dtype=torch.uint8)
            self._read_into(info, start, buffer)
            yield buffer.view(info.dtype)

    def zeros(self, key: str) -> int:
        """How many of the tensor's numbers are zero.

        Raises:
            CheckpointError: as ``tensor``.
        """
        return sum(int((chunk == 0).sum()) for chunk in self.chunks(key))

    def close(self) -> None:
        """Close the shards; a later read opens them again."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_into(self, info: TensorInfo, start: int, buffer: torch.Tensor) -> None:
        path = self.folder / info.shard
        with self._lock:  # the file position is shared, and an engine may read ahead in a thread
            if info.shard not in self._files:
                try:
                    self._files[info.shard] = path.open("rb", buffering=0)
                except OSError as error:
                    raise unreadable(path, error) from error
            read_into(path, info.offset + start, buffer, self._files[info.shard])


def read_into(path: Path, offset: int, buffer: torch.Tensor, file: FileIO | None = None) -> None:
    """Fill a uint8 tensor (n,) with the bytes of a file from ``offset`` on; ``file`` is that file when it is open.

    Raises:
        CheckpointError: when the file cannot be read or is too short.
    """
    view = buffer.numpy().data
    try:
        with contextlib.nullcontext(file) if file is not None else path.open("rb", buffering=0) as source:
            source.seek(offset)
            while view:
                got = source.readinto(view)
                if not got:
                    raise CheckpointError(
                        f"{path} ends before byte {offset + buffer.numel()}",
                        hint="the file became shorter while it was read; get the model again",
                    )
                view = view[got:]
    except OSError as error:
        raise unreadable(path, error) from error


def shard_names(folder: Path) -> dict[str, str]:
    """Which tensor is in which file, by the index; empty when the folder holds one single weights file.

    Raises:
        CheckpointError: when there are no weights, the index cannot be read, or it names a missing or foreign file.
        UnsafeCheckpointError: when the only weights are pickled.
    """
    if (folder / WEIGHTS).exists():
        return {}
    index = folder / INDEX
    if not index.exists():
        refuse_missing_weights(folder)
    hint = "download the model again"
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} cannot be read: {error!r}", hint=hint) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} lists no weights", hint=hint)
    for key, name in weight_map.items():
        if not isinstance(name, str) or PurePosixPath(name).name != name or "\\" in name or name in ("", ".", ".."):
            raise CheckpointError(
                f"{index} places tensor {key} in {name!r}, outside the model's folder",
                hint="do not trust this model: a valid index names files beside it only",
            )
        if not name.endswith(".safetensors"):
            raise UnsafeCheckpointError(
                f"{index} places tensor {key} in {name!r}, which is not a safetensors file",
                hint="only safetensors files are opened; get the model in that format",
            )
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise CheckpointError(f"{index} names {name}, which is not in {folder}", hint=hint)
    return dict(weight_map)


def refuse_missing_weights(folder: Path) -> None:
    """Say which kind of weights a folder has instead of safetensors.

    Raises:
        UnsafeCheckpointError: when there are pickled weights.
        CheckpointError: otherwise.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    pickled = [name for name in names if Path(name).suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")]
    if pickled:
        raise UnsafeCheckpointError(
            f"{folder} has only pickled weights ({pickled[0]}), and opening those runs code",
            hint="convert them where you trust them: model.save_pretrained(FOLDER) writes safetensors",
        )
    if "adapter_model.safetensors" in names:
        raise CheckpointError(
            f"{folder} holds an adapter, not a model",
            hint="merge it first: PeftModel.merge_and_unload(), save_pretrained",
        )
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        raise CheckpointError(
            f"{folder} has {shards[0]} but neither {WEIGHTS} nor {INDEX}",
            hint="download the missing index of the shards",
        )
    raise CheckpointError(f"{folder} holds no weights", hint=f"a model folder has {WEIGHTS}, or shards and {INDEX}")


def read_header(path: Path, shard: str) -> tuple[list[TensorInfo], dict[str, str]]:
    """Tensors of a safetensors file in file order, and its metadata, checked against the file's length.

    Raises:
        CheckpointError: when the file is truncated, has bytes too many, or its header makes no sense.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise corrupt(path, f"its header would need {length} bytes, the file has {size}")
            header = json.loads(file.read(length), object_pairs_hook=_once)
    except OSError as error:
        raise unreadable(path, error) from None
    except _TwiceError as error:
        raise corrupt(path, f"its header has {error.args[0]!r:.80} twice") from None
    except (ValueError, RecursionError):
        raise corrupt(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise corrupt(path, "its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise corrupt(path, "its metadata is not a table of texts")
    infos = sorted((parse_entry(path, shard, key, entry, 8 + length) for key, entry in header.items()), key=_by_place)
    expected = 8 + length
    for info in infos:
        if info.offset != expected:
            raise corrupt(path, f"tensor {info.key} starts at byte {info.offset} instead of {expected}")
        expected += info.nbytes
    if expected != size:
        raise corrupt(path, f"its tensors need {expected} bytes, the file has {size}")
    return infos, metadata


class _TwiceError(Exception):
    """A key that occurs twice in an object of JSON."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON in which a key twice is an error: readers differ in which of the two they take."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _TwiceError(name)
        found[name] = value
    return found


def _by_place(info: TensorInfo) -> tuple[int, int]:
    return info.offset, info.nbytes


def parse_entry(path: Path, shard: str, key: str, entry: Any, start: int) -> TensorInfo:
    """One line of a header, checked by itself.

    Raises:
        CheckpointError: when it makes no sense, or its number format is not known.
    """
    try:
        name, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
    except (KeyError, TypeError, ValueError):
        raise corrupt(path, f"the entry of tensor {key} is incomplete") from None
    if not all(type(number) is int and number >= 0 for number in numbers) or not isinstance(name, str):
        raise corrupt(path, f"the entry of tensor {key} makes no sense")
    if name not in SAFETENSORS_DTYPES:
        raise CheckpointError(
            f"{path}: tensor {key} has number format {name}, which cannot be read",
            hint=f"known formats: {', '.join(SAFETENSORS_DTYPES)}",
        )
    dtype = SAFETENSORS_DTYPES[name]
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise corrupt(path, f"tensor {key} of shape {list(shape)} in {name} needs {nbytes} bytes, not {end - begin}")
    return TensorInfo(key, dtype, shape, nbytes, shard, start + begin)


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error of a file that the system does not let us read."""
    return CheckpointError(
        f"{path} cannot be read: {error.strerror}", hint="check the file, its permissions and its disk"
    )


def corrupt(path: Path, why: str) -> CheckpointError:
    """The error of a file that is damaged or was cut short."""
    return CheckpointError(f"{path} is truncated or corrupt: {why}", hint="download or copy it again")
