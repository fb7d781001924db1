"""Matrices pruned to several sparsities, kept on disk, and put into a model in memory as they are asked for."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from secateur.engine.blocks import MatrixSpec
from secateur.errors import DiskSpaceError

DTYPE = torch.bfloat16
"""In which the weights are kept."""


class LevelStore:
    """One file for each matrix and level in a folder.

    Args:
        folder: an empty folder; whoever made it removes it.
        levels: the sparsities there are, ascending.
    """

    def __init__(self, folder: Path, levels: Sequence[float]) -> None:
        self._folder = folder
        self._levels = list(levels)
        self._numbers: dict[str, int] = {}

    def require_space(self, weights: int) -> None:
        """Refuse to begin where the disk cannot hold it.

        Args:
            weights: of all matrices together.

        Raises:
            DiskSpaceError: with both sizes.
        """
        needed, free = self.nbytes(weights), shutil.disk_usage(self._folder).free
        if needed > free:
            raise DiskSpaceError(
                f"{self._folder} has {free / 1e9:.1f} GB free, and the search keeps {needed / 1e9:.1f} GB there",
                hint="set TMPDIR to a folder with more space, give a larger step, or use --allocation sensitivity",
            )

    def nbytes(self, weights: int) -> int:
        """Bytes on disk of so many weights at all levels."""
        return weights * len(self._levels) * DTYPE.itemsize

    def keep(self, name: str, sparsity: float, weight: torch.Tensor) -> None:
        """Write one matrix, (out, in), pruned to one of the levels."""
        number = self._numbers.setdefault(name, len(self._numbers))
        save_file({"weight": weight.to("cpu", DTYPE).contiguous()}, self._path(number, self._levels.index(sparsity)))

    def load(self, name: str, level: int) -> torch.Tensor:
        """One matrix at the level of that number, (out, in)."""
        weight: torch.Tensor = load_file(self._path(self._numbers[name], level))["weight"]
        return weight

    def _path(self, number: int, level: int) -> Path:
        return self._folder / f"{number}-{level}.safetensors"


class Leveled:
    """A model in memory whose matrices are brought to levels; only those that change are read.

    Args:
        model: whole, in memory; its weights are changed.
        specs: of ordinary matrices, none of stacked experts.
    """

    def __init__(self, model: Any, specs: Mapping[str, MatrixSpec], store: LevelStore) -> None:
        self.model = model
        self._specs, self._store = specs, store
        self._at: dict[str, int] = {}

    def bring(self, levels: Mapping[str, int]) -> None:
        """Put the weights of these levels in their places."""
        for name, level in levels.items():
            if self._at.get(name) != level:
                (place,) = self._specs[name].slices(self.model.get_parameter(name).data)
                place.copy_(self._store.load(name, level))
                self._at[name] = level
