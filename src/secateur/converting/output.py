"""Where the tensors of a converted model go: keys and shapes of the result, and the sink that fills them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoint.ledger import Ledger
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.writer import CheckpointWriter, Entry, Layout, layout_for
from secateur.converting.opened import Opened
from secateur.engine.sink import CheckpointSink
from secateur.layers.spec import Spec, converted_config
from secateur.result import PrunedMatrix


@dataclass
class Replaced:
    """A matrix of the source, and the tensors of the layer that takes its place."""

    name: str
    key: str
    entry: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    """Name in the layer -> key and shape, of what is stored for this layer."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Key in the source -> key in the result, of what is copied: a bias."""
    owner: Replaced | None = None
    """The layer in whose place a shared tensor is stored."""

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def parameters(self) -> int:
        """Numbers stored for the layer, without what is copied."""
        return sum(prod(shape) for _, shape in self.tensors.values())


def replaced(
    opened: Opened, name: str, entry: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], bias: str,
    owner: Replaced | None = None, shared: str | None = None,
) -> Replaced:  # fmt: skip
    """Name the tensors of a layer as the checkpoint names the matrix.

    Args:
        shapes: name in the layer -> shape.
        bias: where the bias goes in the layer.
        shared: name in the layer of the tensor that ``owner`` has.
    """
    key = opened.key_of(name)
    stem = key.removesuffix(".weight")
    tensors = {leaf: (f"{stem}.{leaf}", shape) for leaf, shape in shapes.items() if owner is None or leaf != shared}
    named = name.removesuffix(".weight") + ".bias"
    renamed = {}
    if opened.binding.bound(named):
        renamed[opened.binding.unit_of(named).keys[0]] = f"{stem}.{bias}"
    return Replaced(name, key, entry, tensors, renamed, owner)


def result_keys(opened: Opened, changed: Mapping[str, Replaced], names: Iterable[str]) -> list[str]:
    """Keys of the result that come of these tensors of the model."""
    renames = {old: new for one in changed.values() for old, new in one.renamed.items()}
    found = []
    for key in opened.binding.keys_of(names):
        found += [new for new, _ in changed[key].tensors.values()] if key in changed else [renames.get(key, key)]
    return found


def layout_of(opened: Opened, changed: Mapping[str, Replaced]) -> Layout:
    """Files of the result. ``changed`` has the replaced matrices by their keys."""
    renames = {old: new for one in changed.values() for old, new in one.renamed.items()}
    entries = []
    for key in opened.reader.keys:
        info = opened.reader.info(key)
        dtype = opened.dtype if opened.dtype is not None and info.dtype.is_floating_point else info.dtype
        if key in changed:
            entries += [Entry(new, dtype, shape) for new, shape in changed[key].tensors.values()]
        else:
            entries.append(Entry(renames.get(key, key), dtype, info.shape))
    return layout_for(entries)


class ConvertSink(CheckpointSink):
    """Takes the matrices as the engine gives them, and writes the tensors of the layers in their places.

    Args:
        make: the tensors of a layer by their names in it.
        dense: the matrix (out, in) that the tensors of a layer stand for.
    """

    def __init__(
        self, opened: Opened, writer: CheckpointWriter, ledger: Ledger, changed: Mapping[str, Replaced],
        make: Callable[[Replaced], Mapping[str, torch.Tensor]],
        dense: Callable[[Mapping[str, torch.Tensor], Mapping[str, Any]], torch.Tensor],
    ) -> None:  # fmt: skip
        keys_of = {block.index: result_keys(opened, changed, block.tensors) for block in opened.structure.blocks}
        self._opened, self._changed, self._make, self._dense = opened, changed, make, dense
        self._renames = {old: new for one in changed.values() for old, new in one.renamed.items()}
        super().__init__(opened.reader, writer, ledger, keys_of)

    def dtype(self, key: str) -> torch.dtype:
        """Of a converted matrix, as the running model holds it, float32: its tensors are rounded already."""
        return torch.float32 if key in self._changed else self._dtypes[self._renames.get(key, key)]

    def stored_dtype(self, one: Replaced) -> torch.dtype:
        """Number format in which the tensors of a layer are stored."""
        return self._dtypes[next(iter(one.tensors.values()))[0]]

    def tensor(self, one: Replaced, leaf: str) -> torch.Tensor:
        """A tensor of a layer that was written, be it with the layer that shares it."""
        where = one if leaf in one.tensors or one.owner is None else one.owner
        return self._writer.tensor(where.tensors[leaf][0])

    def write(self, key: str, tensor: torch.Tensor) -> None:
        """Put the tensors that take the place of a matrix in their places."""
        if key not in self._changed:
            super().write(self._renames.get(key, key), tensor)
            return
        one = self._changed[key]
        made = self._make(one)
        for leaf, (new, _) in one.tensors.items():
            super().write(new, made[leaf].to(self.stored_dtype(one)))

    def copy(self, key: str) -> None:
        """Put one tensor of the source in its place, which may have another name."""
        if key in self._renames:
            new = self._renames[key]
            self._writer.write(new, self._source.tensor(key).to(self._dtypes[new]))
        else:
            super().copy(key)

    def copy_rest(self) -> None:
        """Copy every tensor that belongs to no block."""
        inside = {key for keys in self._keys_of.values() for key in keys}
        for key in self._source.keys:
            if key not in self._changed and self._renames.get(key, key) not in inside:
                self.copy(key)

    def reader(self) -> Any:
        """Reads matrices back as the engine gave them."""
        return _Rebuilt(self)

    def rebuilt(self, key: str) -> torch.Tensor:
        """A tensor of the source as it is in the result."""
        one = self._changed.get(key)
        if one is None:
            return self._writer.tensor(self._renames.get(key, key))
        shared = one.owner.tensors if one.owner is not None else {}
        whole = self._dense({leaf: self.tensor(one, leaf) for leaf in {**shared, **one.tensors}}, one.entry)
        return whole.t().contiguous() if self._opened.specs[one.name].transposed else whole


class _Rebuilt:
    def __init__(self, sink: ConvertSink) -> None:
        self._sink = sink

    def tensor(self, key: str) -> torch.Tensor:
        return self._sink.rebuilt(key)


class Nowhere:
    """A sink for a run that only looks."""

    def __init__(self, source: CheckpointReader) -> None:
        self._source = source

    def done(self, index: int) -> None:
        return None

    def reader(self) -> CheckpointReader:
        return self._source

    def dtype(self, key: str) -> torch.dtype:
        return self._source.info(key).dtype

    def write(self, key: str, tensor: torch.Tensor) -> None:
        pass

    def copy(self, key: str) -> None:
        pass

    def move(self, key: str, tensor: torch.Tensor) -> None:
        pass

    def finish(self, index: int, matrices: list[PrunedMatrix]) -> None:
        pass


def write_config(folder: Path, opened: Opened, spec: Spec | None, config: Mapping[str, Any] | None = None) -> None:
    """The config of the source, or another one, with the layers of the result and its number format."""
    config = dict(opened.config if config is None else config)
    if opened.dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(opened.dtype).removeprefix("torch.")
    if spec is not None:
        config = converted_config(config, spec)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copied_keys(opened: Opened, changed: Sequence[Replaced]) -> dict[str, str]:
    """Key in the result -> key in the source of every tensor that no conversion touched."""
    renames = {old: new for one in changed for old, new in one.renamed.items()}
    gone = {one.key for one in changed}
    return {renames.get(key, key): key for key in opened.reader.keys if key not in gone}
