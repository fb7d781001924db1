"""The experts of each block, found by trying which entry of the config makes all of them fewer.

An entry is the right one when the stock class, built with a smaller number there, differs in nothing but the experts:
tensors with one slice for each expert are shorter, or modules that stand in a list of as many lack the last ones. So
the stock class itself says which router rows, biases and corrections belong to the experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from secateur.engine.blocks import Block, Structure
from secateur.engine.entries import changed
from secateur.engine.skeleton import skeleton_of
from secateur.errors import UnsupportedModelError
from secateur.structured.configure import Shapes, Shrunk, shapes_of
from secateur.structured.couplings import Cut

Path = tuple[str, ...]


@dataclass(frozen=True)
class Pool:
    """The experts of one block."""

    module: str
    """The module that holds them all."""
    parts: tuple[str, ...]
    """Modules that are built anew for another number of experts: the whole mixture, router included."""
    experts: int
    cuts: tuple[Cut, ...]
    """Of the tensors that hold something of every expert."""
    listed: tuple[tuple[str, ...], ...] = ()
    """For each expert, the tensors of its own, in the same order; empty where all are in the tensors of ``cuts``."""

    @property
    def names(self) -> list[str]:
        """All tensors that change."""
        return [cut.name for cut in self.cuts] + [name for names in self.listed for name in names]

    @property
    def routers(self) -> list[str]:
        """Tensors outside the experts themselves: rows of the router, its biases."""
        return [cut.name for cut in self.cuts if not cut.name.startswith(f"{self.module}.")]

    def cut(self, tensors: dict[str, Tensor], kept: Tensor) -> None:
        """Leave only some experts in the tensors of a block, by full name, in place: one copy at a time.

        Args:
            kept: numbers of the experts that stay, ascending.
        """
        for cut in self.cuts:
            if cut.name in tensors:
                tensors[cut.name] = cut.apply(tensors[cut.name], kept)
        own = {name: tensors.pop(name) for names in self.listed for name in names if name in tensors}
        for place, expert in enumerate(kept.tolist()):
            for new, old in zip(self.listed[place], self.listed[expert], strict=True) if self.listed else ():
                if old in own:
                    tensors[new] = own[old]


@dataclass(frozen=True)
class Found:
    """The experts of a model, by number of the block, and the config entries that say how many there are."""

    experts: int
    pools: dict[int, Pool]
    entries: tuple[Path, ...]

    def shrunk(self, config: transformers.PreTrainedConfig, count: int) -> Shrunk:
        """The model with ``count`` experts in each block, without weights."""
        changes: dict[Path, Any] = dict.fromkeys(self.entries, count)
        return Shrunk(skeleton_of(changed(config, changes)), changes)


def find_experts(
    config: transformers.PreTrainedConfig, model: transformers.PreTrainedModel, structure: Structure
) -> Found:
    """The experts of every block that has some.

    Args:
        config: as it was read, unchanged.
        model: without weights, of that config.

    Raises:
        UnsupportedModelError: when there are none, or no entry of the config makes all of them fewer.
    """
    counts = sorted({count for block in structure.blocks for count in _counts(block, model)}, reverse=True)
    if not counts:
        raise UnsupportedModelError(
            f"the blocks of {type(model).__name__} have no experts", hint="choose another --structure, for example ffn"
        )
    before = shapes_of(model)
    for count in counts:
        for entries in _candidates(config, count):
            for fewer in dict.fromkeys((count - 1, count // 2)):
                try:
                    small = skeleton_of(changed(config, dict.fromkeys(entries, fewer)))
                except Exception:  # noqa: BLE001 - a config may refuse values in any way; then it was not this entry
                    continue
                pools = _pools(model, structure, before, shapes_of(small), count, fewer)
                if pools:
                    return Found(count, pools, entries)
    raise UnsupportedModelError(
        f"the {counts[0]} experts of {type(model).__name__} are not one module in each block, or its config has no "
        "entry that makes them fewer and changes nothing else",
        hint="choose another --structure; without one, single weights are pruned",
    )


def _counts(block: Block, model: nn.Module) -> Iterator[int]:
    """How many experts a block may have: slices of a fused tensor, or modules of one class in a list."""
    yield from (matrix.experts for matrix in block.matrices if matrix.experts > 1)
    for module in model.get_submodule(block.name).modules():
        children = list(module.children()) if isinstance(module, nn.ModuleList | nn.ModuleDict) else []
        alike = len({type(child) for child in children}) == 1
        if len(children) > 1 and alike and next(children[0].parameters(), None) is not None:
            yield len(children)


def _candidates(config: transformers.PreTrainedConfig, count: int) -> Iterator[tuple[Path, ...]]:
    """Entries that may say how many experts there are: those with that value, one by one, then all together."""
    found = list(_paths(config.to_dict(), count))
    yield from ((path,) for path in found)
    if len(found) > 1:
        # The likeliest mixture of two names for the same thing.
        named = tuple(path for path in found if "expert" in path[-1])
        yield from dict.fromkeys(paths for paths in (named, tuple(found)) if len(paths) > 1)


def _paths(data: Mapping[str, Any], value: int) -> Iterator[Path]:
    for key, entry in data.items():
        if type(entry) is int and entry == value:
            yield (key,)
        elif isinstance(entry, Mapping):
            yield from ((key, *path) for path in _paths(entry, value))


def _pools(
    model: nn.Module, structure: Structure, before: Shapes, after: Shapes, count: int, fewer: int
) -> dict[int, Pool] | None:
    """The pools of all blocks, None when something else than their experts has become less, or not all of them."""
    if not set(after) <= set(before):
        return None
    cuts: dict[str, Cut] = {}
    for name, shape in after.items():
        if shape != before[name]:
            cut = _cut(name, before[name], shape, count, fewer)
            if cut is None:
                return None
            cuts[name] = cut
    gone = [name for name in before if name not in after]
    inside = {name: block for block in structure.blocks for name in block.tensors}
    if any(name not in inside for name in (*cuts, *gone)):
        return None
    fused = [matrix.name for matrix in structure.matrices if matrix.experts == count]
    if any(name not in cuts for name in fused) or not (fused or gone):
        return None
    pools = {}
    for block in structure.blocks:
        own = [cut for name, cut in cuts.items() if inside[name] is block]
        lost = [name for name in gone if inside[name] is block]
        if own or lost:
            pool = _pool(model, block, own, lost, before, count, fewer)
            if pool is None:
                return None
            pools[block.index] = pool
    return pools


def _cut(name: str, old: Sequence[int], new: Sequence[int], count: int, fewer: int) -> Cut | None:
    """The slices of each expert in a tensor that has become shorter along one dimension."""
    dims = [dim for dim, (a, b) in enumerate(zip(old, new, strict=False)) if a != b]
    if len(old) != len(new) or len(dims) != 1:
        return None
    a, b = old[dims[0]], new[dims[0]]
    if a % count or b % fewer or a // count != b // fewer:
        return None
    return Cut(name, dims[0], torch.arange(a).reshape(count, -1))


def _pool(
    model: nn.Module, block: Block, cuts: Sequence[Cut], lost: Sequence[str], before: Shapes, count: int, fewer: int
) -> Pool | None:
    listed: tuple[tuple[str, ...], ...] = ()
    module = _common([cut.name for cut in cuts if len(before[cut.name]) > 2])
    if lost:
        module = _common(lost)
        while not _is_list(model.get_submodule(module), count):
            if module in ("", block.name):
                return None
            module = module.rpartition(".")[0]
        children = [name for name, _ in model.get_submodule(module).named_children()]
        rows = [
            tuple(sorted(name for name in block.tensors if name.startswith(f"{module}.{child}."))) for child in children
        ]
        if sorted(lost) != sorted(name for row in rows[fewer:] for name in row) or len({len(row) for row in rows}) > 1:
            return None
        listed = tuple(rows)
    if not module.startswith(f"{block.name}."):
        return None
    names = [*lost, *(cut.name for cut in cuts)]
    mixture = _common(names) if len(names) > 1 else module
    parts: tuple[str, ...] = (mixture,)
    if mixture == block.name:
        depth = mixture.count(".") + 2
        parts = tuple(dict.fromkeys(".".join(name.split(".")[:depth]) for name in names))
        if set(parts) & set(names):  # a tensor of the block itself: no module to build anew
            return None
    return Pool(module, parts, count, tuple(cuts), listed)


def _is_list(module: nn.Module, count: int) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict) and len(list(module.children())) == count


def _common(names: Sequence[str]) -> str:
    """The innermost module that holds all these tensors."""
    paths = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
