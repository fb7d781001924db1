"""A checkpoint seen without some of its tensors and with other names for the rest; nothing is copied."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from secateur.checkpoint.reader import CheckpointReader, Shard


class CheckpointView(CheckpointReader):
    """Reads a folder under other keys.

    Args:
        folder: of the checkpoint.
        origin: key of the view -> key in the folder. What is not named is not there.
    """

    def __init__(self, folder: str | Path, origin: Mapping[str, str]) -> None:
        super().__init__(folder)
        self.origin = dict(origin)
        self._infos = {key: dataclasses.replace(self._infos[old], key=key) for key, old in origin.items()}
        new = {old: key for key, old in origin.items()}
        kept = [(shard, tuple(new[key] for key in shard.keys if key in new)) for shard in self.shards]
        self.shards = [Shard(shard.name, shard.path, keys, shard.metadata) for shard, keys in kept if keys]
        self._infos = {key: self._infos[key] for shard in self.shards for key in shard.keys}  # in file order
