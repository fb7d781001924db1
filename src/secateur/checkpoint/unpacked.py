"""A checkpoint in the sparse format seen as the plain one that it packs: matrices are unpacked as they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from secateur.checkpoint.check import read_config
from secateur.checkpoint.dtypes import NAMES, PLAIN_FLOATS
from secateur.checkpoint.reader import CHUNK, CheckpointReader, Shard, TensorInfo
from secateur.errors import CheckpointError
from secateur.packing.check import check
from secateur.packing.header import Header, check_places, header_of
from secateur.packing.layout import Entry
from secateur.packing.unpack import count_nonzero, row_blocks, unpack, unpack_rows


class UnpackedReader(CheckpointReader):
    """Reads a packed folder under the keys ``MODULE.weight``. Every matrix is checked when it is first read.

    Numbers of 16 bits come out bit for bit; those of 8 and 4 bits in the number format that config.json names.

    Raises:
        CheckpointError: when the files do not hold what the header says.
    """

    def __init__(self, folder: str | Path, header: Header, dtype: torch.dtype) -> None:
        super().__init__(folder)
        self.header = header
        check_places(
            header, {key: (info.dtype, info.shape, info.offset) for key, info in self._infos.items()}, self.folder
        )
        self._packed: dict[str, tuple[str, Entry]] = {}
        self._parts: dict[str, TensorInfo] = {}
        hidden = {f"{name}.{part}" for name, entry in header.matrices.items() for part in entry.parts()}
        names = {f"{name}.values": name for name in header.matrices}
        infos: dict[str, TensorInfo] = {}
        for shard in self.shards:
            for key in shard.keys:
                if key in hidden:
                    self._parts[key] = self._infos[key]
                if key not in hidden:
                    infos[key] = self._infos[key]
                elif key in names:
                    info = self._describe(names[key], dtype, shard.name)
                    infos[info.key] = info
        self._infos = infos
        keys = {shard.name: [key for key, info in infos.items() if info.shard == shard.name] for shard in self.shards}
        self.shards = [Shard(shard.name, shard.path, tuple(keys[shard.name]), shard.metadata) for shard in self.shards]

    def _describe(self, name: str, dtype: torch.dtype, shard: str) -> TensorInfo:
        entry, key = self.header.matrices[name], f"{name}.weight"
        if key in self._infos:
            raise CheckpointError(
                f"{self.folder} holds {key} both packed and plain", hint="export the model again"
            )  # fmt: skip
        kept = entry.value_dtype if entry.bits == 16 else dtype
        self._packed[key] = name, entry
        return TensorInfo(key, kept, entry.shape, entry.numel * kept.itemsize, shard, 0)

    @property
    def packed(self) -> list[str]:
        """The keys that are unpacked."""
        return list(self._packed)

    def rounds(self, key: str) -> bool:
        """Whether the number format in which a matrix comes out may not hold its numbers exactly."""
        _, entry = self._packed[key]
        return entry.bits < 16 and self.info(key).dtype.itemsize < 4

    def tensor(self, key: str) -> torch.Tensor:
        """The whole tensor, unpacked where it is packed.

        Raises:
            CheckpointError: when there is no such tensor, it cannot be read, or what was packed makes no sense.
        """
        if key not in self._packed:
            return super().tensor(key)
        entry, parts, starts = self._open(key)
        whole = unpack(entry, parts, self.info(key).dtype, starts)
        return whole.T.contiguous() if entry.transposed else whole

    def chunks(self, key: str, nbytes: int = CHUNK) -> Iterator[torch.Tensor]:
        """The tensor in flat pieces of about ``nbytes`` bytes, unpacked where it is packed.

        Raises:
            CheckpointError: as ``tensor``.
        """
        if key not in self._packed:
            yield from super().chunks(key, nbytes)
            return
        entry, parts, starts = self._open(key)
        dtype = self.info(key).dtype
        if entry.transposed:
            yield from self.tensor(key).reshape(-1).split(max(1, nbytes // dtype.itemsize))
            return
        for first, last in row_blocks(entry, max(1, nbytes // dtype.itemsize)):
            yield unpack_rows(entry, parts, starts, first, last, dtype).reshape(-1)

    def zeros(self, key: str) -> int:
        """How many of the tensor's numbers are zero; of a packed matrix without unpacking it.

        Raises:
            CheckpointError: as ``tensor``.
        """
        if key not in self._packed:
            return super().zeros(key)
        entry, parts, _ = self._open(key)
        return entry.numel - count_nonzero(entry, parts)

    def _open(self, key: str) -> tuple[Entry, Mapping[str, torch.Tensor], torch.Tensor]:
        name, entry = self._packed[key]
        parts = {}
        for part in entry.parts():
            info = self._parts[f"{name}.{part}"]
            buffer = torch.empty(info.nbytes, dtype=torch.uint8)
            self._read_into(info, 0, buffer)
            parts[part] = buffer.view(info.dtype).reshape(info.shape)
        return entry, parts, check(name, entry, parts)


def open_reader(folder: Path) -> CheckpointReader:
    """A reader of a plain or packed folder.

    Raises:
        CheckpointError: when its weights, or the header of what is packed, make no sense.
        UnsupportedModelError: for a version of the sparse format that is not known.
    """
    config = read_config(folder)
    header = header_of(config)
    if header is None:
        return CheckpointReader(folder)
    return UnpackedReader(folder, header, dtype_of(config))


def dtype_of(config: Mapping[str, object]) -> torch.dtype:
    """The number format that a config names; bfloat16 when it names none that is plain."""
    text = str(config.get("dtype") or config.get("torch_dtype") or "")
    return next(
        (dtype for dtype in PLAIN_FLOATS if str(dtype) == f"torch.{text}" or NAMES[dtype] == text), torch.bfloat16
    )
