"""What formats that are model folders share: the config, the files beside the weights, the size of the shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoint.folder import copy_side_files
from secateur.checkpoint.reader import CheckpointReader
from secateur.errors import OutputError, VerificationError


def write_beside(source: Path, out: Path, config: dict[str, Any]) -> None:
    """Copy tokenizer and the like, and write config.json.

    Raises:
        OutputError: when the disk does not take them.
    """
    copy_side_files(source, out)
    try:
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"{out / 'config.json'} cannot be written: {error.strerror}", hint="check the disk"
        ) from error


def largest_shard(reader: CheckpointReader) -> float:
    """Bytes of tensors in one file at most: what the source has, where it has several files."""
    if len(reader.shards) == 1:
        return float("inf")
    return max(sum(reader.info(key).nbytes for key in shard.keys) for shard in reader.shards)


def compare_tensor(made: CheckpointReader, key: str, source: CheckpointReader, origin: str) -> None:
    """See that a tensor has the numbers of its source, rounded where its number format is narrower.

    Raises:
        VerificationError: when one differs.
    """
    dtype, count = made.info(key).dtype, 1 << 20
    if made.info(key).shape != source.info(origin).shape:
        raise VerificationError(f"{made.folder}: {key} has another shape than {origin} of the source")
    pairs = zip(_pieces(made, key, count), _pieces(source, origin, count), strict=True)
    if not all(torch.equal(ours, theirs.to(dtype)) for ours, theirs in pairs):
        raise VerificationError(
            f"{made.folder}: {key} differs from the source", hint="the file was changed or damaged; make it again"
        )


def _pieces(reader: CheckpointReader, key: str, count: int) -> Any:
    """A tensor in flat pieces of ``count`` numbers, whatever pieces its reader makes."""
    waiting: list[torch.Tensor] = []
    held = 0
    for chunk in reader.chunks(key, count * reader.info(key).dtype.itemsize):
        waiting.append(chunk)
        held += chunk.numel()
        while held >= count:
            whole = torch.cat(waiting)
            yield whole[:count]
            waiting, held = [whole[count:]], held - count
    if held:
        yield torch.cat(waiting)
