"""Which inputs of a matrix may change places: the order of neurons, and that of the values within a head.

The rows that feed an input go with it, so the block computes the same. Which rows these are is found as for units that
are removed (`secateur.structured.couplings`): the output of a candidate is disturbed, the consumer's input is watched.

- Neurons of a feed-forward network: all of a consumer's inputs are one set.
- Values within a head: channel j of a group's values feeds input j of every query head that reads the group, so these
  go together. A set is what one group has.

What was found is tried: with its channels in a random order a block on random weights must give what it gave before, to
the blocks behind it as well (`secateur.engine.permute`). That leaves out what a disturbance does not show: a scale or
another matrix that reads the same rows, heads of another size than was thought. Whatever reads the residual stream
shares its inputs with all else that does, and keeps their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from secateur.checkpoint.reader import CheckpointReader
from secateur.engine.binding import Binding
from secateur.engine.blocks import Block, MatrixSpec, Structure, signature
from secateur.engine.capture import copied_call
from secateur.engine.permute import FreeChannels, Slices, agree, outcome, permuted
from secateur.engine.skeleton import set_tensor, tied_names
from secateur.patterns import Pattern
from secateur.structured.couplings import Cut, Heads, consumer_cut, cuts_of, feeds, heads_of, neurons_of
from secateur.structured.explore import Call, visit_blocks
from secateur.structured.observer import Observer

NO_OTHER = "no other order of their inputs is exact"
NOT_REACHED = "no token of the trial came to them"


@dataclass
class Found:
    """What may change places, by block, and what keeps its order."""

    free: dict[int, list[FreeChannels]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    """Name of a matrix within its block -> why the order of its inputs stays, in some block at least."""

    @property
    def consumers(self) -> list[str]:
        return [one.consumer for ones in self.free.values() for one in ones]

    def lines(self) -> list[str]:
        """What is put in another order, and what is not, in words."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        left = [f"--permute leaves {', '.join(names)} as they are: {reason}" for reason, names in reasons.items()]
        if not self.consumers:
            return left
        return [f"--permute: the inputs of {len(self.consumers)} matrices are free to change places", *left]


def find_free_channels(
    model: transformers.PreTrainedModel, structure: Structure, binding: Binding, reader: CheckpointReader,
    names: Sequence[str], pattern: Pattern,
) -> Found:  # fmt: skip
    """What may change places in the matrices that an N:M pattern prunes; blocks built alike are looked at once.

    Args:
        names: of the matrices.

    Raises:
        UnsupportedModelError: when the model cannot be run block by block.
    """
    seen: dict[object, Tried] = {}

    def visit(block: Block, module: nn.Module, call: Call, tensors: dict[str, Tensor]) -> None:
        seen[signature(block, model)] = try_block(block, module, model, call, tensors)

    visit_blocks(model, structure, binding, reader, visit)
    found, wanted, ties = Found(), set(names), tied_names(model)
    tied = {*ties, *ties.values()}
    for block in structure.blocks:
        tried = seen.get(signature(block, model), Tried(block, set(), []))
        mine = {one.consumer: one for one in (_renamed(free, tried.block.name, block.name) for free in tried.free)}
        for matrix in block.matrices:
            if matrix.name not in wanted:
                continue
            free, inside = mine.get(matrix.name), matrix.name.removeprefix(f"{block.name}.")
            reason = _obstacle(matrix, free, block, binding, tied, pattern)
            if reason:
                unseen = reason == NO_OTHER and f"{tried.block.name}.{inside}" not in tried.reached
                found.left[inside.removesuffix(".weight")] = NOT_REACHED if unseen else reason
            elif free is not None:
                found.free.setdefault(block.index, []).append(free)
    return found


def _obstacle(
    matrix: MatrixSpec, free: FreeChannels | None, block: Block, binding: Binding, tied: set[str], pattern: Pattern
) -> str:
    """Why the inputs of a matrix keep their order; empty when they need not."""
    if matrix.experts:
        return "stacked experts are not put in another order yet"
    if free is None:
        return NO_OTHER
    channels = free.inputs.shape[1]
    if channels % pattern.group:
        return f"heads of {channels} values do not divide into groups of {pattern.group}"
    for slices in free.slices:
        if slices.name not in block.tensors or slices.name in tied or not binding.bound(slices.name):
            return "they share tensors with others"
        unit = binding.unit_of(slices.name)
        if unit.converter is not None or unit.names != [slices.name] or len(unit.keys) > 1:
            return "they are stored in one tensor with others"
    return ""


@dataclass(frozen=True)
class Tried:
    """What was found in a block."""

    block: Block
    reached: set[str]
    """Names of the matrices that got tokens."""
    free: list[FreeChannels]


def try_block(
    block: Block, module: nn.Module, model: nn.Module, call: Call, tensors: Mapping[str, Tensor]
) -> Tried:  # fmt: skip
    """The free channels of one block, each seen to be so; its weights are random."""

    def run() -> Any:
        args, kwargs = copied_call(*call)
        return module(*args, **kwargs)

    observer = Observer(block, module, run)
    whole = outcome(module, *call)
    found = []
    for consumer in observer.reached:
        for free in _candidates(observer, consumer, tensors, getattr(model, "config", None)):
            if _exact(free, module, model, call, tensors, whole):
                found.append(free)
                break
    return Tried(block, {matrix.name for matrix in observer.reached}, found)


def _exact(
    free: FreeChannels, module: nn.Module, model: nn.Module, call: Call, tensors: Mapping[str, Tensor],
    whole: Sequence[Tensor],
) -> bool:  # fmt: skip
    """Whether a block gives the same with the channels in a random order."""
    sets, channels, _ = free.inputs.shape
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(channels, generator=generator) for _ in range(sets)])
    made = permuted(tensors, [(free, order)])
    try:
        for name, tensor in made.items():
            set_tensor(model, name, tensor)
        return agree(whole, outcome(module, *call))
    finally:
        for name in made:
            set_tensor(model, name, tensors[name])


def _candidates(
    observer: Observer, consumer: MatrixSpec, tensors: Mapping[str, Tensor], config: Any
) -> Iterator[FreeChannels]:
    """What may be free in the inputs of a consumer, the likeliest first."""
    neurons = neurons_of(observer, consumer, tensors)
    if neurons is not None:
        yield _free(consumer, neurons.columns[None], neurons.cuts, 1)
    elif observer.mixing(consumer):
        for heads in heads_of(config, consumer.in_features):
            values = _values(observer, consumer, heads, tensors)
            if values is not None:
                yield values


def _values(
    observer: Observer, consumer: MatrixSpec, heads: Heads, tensors: Mapping[str, Tensor]
) -> FreeChannels | None:
    """The values within each head, when some matrix gives them: its rows reach these inputs alone, at other tokens."""
    groups, size = heads.groups, heads.size
    inputs = torch.arange(consumer.in_features).reshape(groups, heads.each, size).transpose(1, 2)
    columns = inputs.reshape(groups * size, -1)
    cuts: list[Cut] = []
    mixed = False
    for producer in observer.reaching(consumer):
        for rows in _value_rows(producer.out_features, heads):
            spreads = feeds(observer, producer, rows, consumer, columns, spreads=True)
            if spreads is not None:
                mixed |= spreads
                cuts += cuts_of(producer, rows, tensors)
                break
    return _free(consumer, inputs, (consumer_cut(consumer, columns), *cuts), groups) if mixed else None


def _value_rows(out_features: int, heads: Heads) -> Iterator[Tensor]:
    """Rows that may feed each channel of each group, (groups·size, n): a part of a matrix, mostly the last.

    Parts are one after the other, beside each other in every group, or both: parts of which each has all three. A gate
    has a row for every query head.
    """
    groups, size, each = heads.groups, heads.size, heads.each
    number = torch.arange(out_features)
    if out_features % (groups * size) == 0:
        count = out_features // (groups * size)
        for part in reversed(number.reshape(count, -1)):
            yield part[:, None]
        for part in reversed(number.reshape(groups, count, size).unbind(1)):
            yield part.reshape(-1, 1)
        for outer in (2, 4, 8):
            if count == 3 and each == 1 and groups % outer == 0 and groups > outer:
                for part in reversed(number.reshape(outer, 3, -1).unbind(1)):
                    yield part.reshape(-1, 1)
    elif out_features % groups == 0 and out_features // groups > size:  # values of another size than keys
        yield number.reshape(groups, -1)[:, -size:].reshape(-1, 1)
    if each > 1 and out_features % (heads.query * size) == 0:
        gates = number.reshape(groups, each, -1, size)[:, :, -1]
        yield gates.transpose(1, 2).reshape(groups * size, each)


def _free(consumer: MatrixSpec, inputs: Tensor, cuts: Sequence[Cut], sets: int) -> FreeChannels:
    slices = (Slices(cut.name, cut.dim, cut.indices.reshape(sets, inputs.shape[1], -1)) for cut in cuts)
    return FreeChannels(consumer.name, inputs, tuple(slices))


def _renamed(free: FreeChannels, old: str, new: str) -> FreeChannels:
    def name(full: str) -> str:
        return new + full.removeprefix(old)

    slices = tuple(replace(one, name=name(one.name)) for one in free.slices)
    return replace(free, consumer=name(free.consumer), slices=slices)
