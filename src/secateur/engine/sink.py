"""Finished blocks go into the shards of the result and into the ledger; a resumed run finds them there."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping

import torch

from secateur.checkpoint.ledger import Ledger
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.writer import CheckpointWriter
from secateur.errors import OutputError
from secateur.result import PrunedMatrix


def tensor_digest(tensor: torch.Tensor) -> str:
    """Hex sha256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


class CheckpointSink:
    """Writes blocks of a checkpoint. ``keys_of`` gives the checkpoint keys of every block, by its index."""

    def __init__(
        self,
        source: CheckpointReader,
        writer: CheckpointWriter,
        ledger: Ledger,
        keys_of: Mapping[int, Iterable[str]],
    ) -> None:
        self._source = source
        self._writer = writer
        self._ledger = ledger
        self._dtypes = {entry.key: entry.dtype for shard in writer.layout.shards for entry in shard.entries}
        self._done: dict[int, list[PrunedMatrix]] = {}
        self._keys_of = keys_of
        self.zeros: dict[str, int] = {}
        """Number of zeros of every tensor that was written rather than copied, by its key."""
        for step in ledger.steps:
            self._done[step["block"]] = [PrunedMatrix(**matrix) for matrix in step["matrices"]]
            self.zeros.update(step["zeros"])
            writer.mark_written(keys_of[step["block"]])
            for key, digest in step["sha256"].items():
                if tensor_digest(writer.tensor(key)) != digest:
                    raise OutputError(
                        f"{writer.folder}: tensor {key} is not what the earlier run wrote",
                        hint="start again with --overwrite",
                    )

    @property
    def blocks_done(self) -> int:
        return len(self._done)

    def done(self, index: int) -> list[PrunedMatrix] | None:
        """Results of a block that an earlier run finished."""
        return self._done.get(index)

    def reader(self) -> CheckpointWriter:
        """What was written can be read back from the writer."""
        return self._writer

    def dtype(self, key: str) -> torch.dtype:
        """Number format in which a key is written."""
        return self._dtypes[key]

    def write(self, key: str, tensor: torch.Tensor) -> None:
        """Put one tensor in its place."""
        self._writer.write(key, tensor)
        self.zeros[key] = int((tensor == 0).sum())

    def copy(self, key: str) -> None:
        """Put one tensor of the source in its place: byte for byte, unless the result has another number format."""
        self._writer.copy(self._source, key)

    def move(self, key: str, tensor: torch.Tensor) -> None:
        """Put one tensor in its place that is the source's in another order: it counts as not pruned."""
        self._writer.write(key, tensor)

    def finish(self, index: int, matrices: list[PrunedMatrix]) -> None:
        """Note a block as done, once its tensors are safe on the disk."""
        self._writer.sync()
        zeros = {key: self.zeros[key] for key in self._keys_of[index] if key in self.zeros}
        rows = [dataclasses.asdict(matrix) for matrix in matrices]
        digests = {key: tensor_digest(self._writer.tensor(key)) for key in self._keys_of[index]}
        self._ledger.append({"block": index, "zeros": zeros, "sha256": digests, "matrices": rows})

    def copy_rest(self) -> None:
        """Copy every tensor that belongs to no block and was not written."""
        inside = {key for keys in self._keys_of.values() for key in keys}
        for key in self._source.keys:
            if key not in inside and key not in self.zeros:
                self.copy(key)
