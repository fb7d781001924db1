"""What a model folder holds: bytes, parameters, zeros. Read piece by piece, never as a whole.

Of a folder in the sparse format the numbers that it stands for are counted, and the bytes that they take in the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch

from secateur.checkpoint.unpacked import open_reader


@dataclass
class Size:
    """The weights files of one folder. A tensor that the model ties is stored, and counted, once."""

    bytes_disk: int
    """Bytes of the safetensors files, headers included."""
    parameters: int
    """Floating-point numbers stored."""
    nonzero: int
    zeros_of_keys: int
    """Zeros in the tensors that were asked for."""
    dtype: str
    """Number format of most of the bytes, e.g. float32."""
    elements: dict[str, int] = field(default_factory=dict)
    """Numbers stored, by their format."""
    zeros: dict[str, int] = field(default_factory=dict)
    """Zeros of each floating-point tensor, by its name in the files (of a packed one: by that of its weight)."""

    def bytes_as(self, dtype: torch.dtype) -> int:
        """Bytes of the tensors if every floating-point number was stored as ``dtype`` (without file headers)."""
        total = 0
        for name, count in self.elements.items():
            stored: torch.dtype = getattr(torch, name)
            total += count * (dtype if stored.is_floating_point else stored).itemsize
        return total


def measure_size(folder: str | Path, keys: Collection[str] = ()) -> Size:
    """Count what a folder's safetensors hold.

    Args:
        keys: tensors whose zeros are also counted apart, by their names in the files.

    Raises:
        SourceError: when there is no config.json that can be read.
        CheckpointError: when a file is missing, truncated or corrupt.
    """
    elements: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    parameters = nonzero = zeros_of_keys = 0
    counted: dict[str, int] = {}
    with open_reader(Path(folder)) as reader:
        for key in reader.keys:
            info = reader.info(key)
            name = str(info.dtype).removeprefix("torch.")
            elements[name] += info.numel
            nbytes[name] += info.nbytes
            if not info.dtype.is_floating_point and key not in keys:
                continue
            zeros = reader.zeros(key)
            if info.dtype.is_floating_point:
                counted[key] = zeros
                parameters += info.numel
                nonzero += info.numel - zeros
            if key in keys:
                zeros_of_keys += zeros
        bytes_disk = sum(shard.path.stat().st_size for shard in reader.shards)
    widest = nbytes.most_common(1)[0][0] if nbytes else "float32"
    return Size(bytes_disk, parameters, nonzero, zeros_of_keys, widest, dict(elements), counted)
