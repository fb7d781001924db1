"""Who reads the residual stream: matrices with one and the same input, found by running blocks on random weights.

A matrix of a Linear or Conv1D reads along its inputs. Of any other module (a router, fused experts) it is tried: turn
the input and the tensor's inputs by the same reflection; where the output stays, the module reads through the tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from greenlet import getcurrent
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secateur.checkpoint.reader import CheckpointReader
from secateur.engine.binding import Binding
from secateur.engine.blocks import Block, Structure, signature
from secateur.engine.capture import Lane, copied_call, first_states
from secateur.engine.inputs import output_tensor
from secateur.engine.skeleton import tied_names
from secateur.errors import UnsupportedModelError
from secateur.structured.channels import Channels, Group, Reader
from secateur.structured.explore import Call, visit_blocks
from secateur.structured.proof import TOLERANCE


def find_readers(
    channels: Channels, model: transformers.PreTrainedModel, structure: Structure, binding: Binding,
    reader: CheckpointReader,
) -> tuple[dict[int, list[Group]], tuple[str, ...]]:  # fmt: skip
    """The groups of readers of every block, and the readers whose input was not found.

    Raises:
        UnsupportedModelError: when the model cannot be run block by block.
    """
    seen: dict[object, tuple[Block, list[Group], list[str]]] = {}

    def visit(block: Block, module: nn.Module, call: Call, tensors: dict[str, Tensor]) -> None:
        own = _readers_of(channels, model, block, tensors)
        groups = _groups(model, own, module, call, channels.before)
        found = {one.name for group in groups for one in group.readers}
        loose = [one.name for readers in own.values() for one in readers if one.name not in found]
        seen[signature(block, model)] = block, groups, loose

    visit_blocks(model, structure, binding, reader, visit)
    made: dict[int, list[Group]] = {}
    missed: list[str] = []
    for block in structure.blocks:
        first, groups, loose = seen.get(signature(block, model), (block, [], []))
        made[block.index] = [_renamed(group, first.name, block.name) for group in groups]
        missed += [block.name + name.removeprefix(first.name) for name in loose]
    return made, tuple(missed)


def _readers_of(
    channels: Channels, model: nn.Module, block: Block, tensors: Mapping[str, Tensor]
) -> dict[str, list[Reader]]:
    """Tensors of a block that may read the residual stream, by the module that owns them."""
    specs = {matrix.name: matrix for matrix in block.matrices}
    made: dict[str, list[Reader]] = {}
    for name in block.tensors:
        dims = channels.cuts.get(name, ())
        if not dims or name not in tensors or tensors[name].ndim < 2:
            continue
        owner = name.rpartition(".")[0]
        module, spec = model.get_submodule(owner), specs.get(name)
        if isinstance(module, nn.Embedding):
            continue
        dim = tensors[name].ndim - (2 if spec is not None and spec.transposed else 1)
        if dim in dims:
            bias = f"{owner}.bias"
            has_bias = isinstance(module, nn.Linear | Conv1D) and bias in tensors
            made.setdefault(owner, []).append(Reader(name, dim, bias if has_bias else None))
    return made


def _groups(
    model: nn.Module, own: Mapping[str, list[Reader]], module: nn.Module, call: Call, width: int
) -> list[Group]:
    """Readers by their input, in the order in which a forward of the block comes to them."""
    calls: dict[str, list[Call]] = {owner: [] for owner in own}

    def note(owner: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls[owner].append((args, kwargs))
            order.append(owner)

        return hook

    order: list[str] = []
    handles = [model.get_submodule(owner).register_forward_pre_hook(note(owner), with_kwargs=True) for owner in own]
    try:
        args, kwargs = copied_call(*call)  # a cache among them would grow
        module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    groups: list[tuple[Tensor, list[str]]] = []
    for owner in dict.fromkeys(order):
        if len(calls[owner]) != 1:
            continue
        try:
            states = first_states(*calls[owner][0])
        except UnsupportedModelError:
            continue
        if states.shape[-1] != width or not _reads(model.get_submodule(owner), own[owner], calls[owner][0], states):
            continue
        rows = states.reshape(-1, width)
        same = next((owners for known, owners in groups if torch.equal(known, rows)), None)
        if same is None:
            groups.append((rows, [owner]))
        else:
            same.append(owner)
    return [Group(owners[0], tuple(one for owner in owners for one in own[owner])) for _, owners in groups]


def _reads(module: nn.Module, readers: list[Reader], call: Call, states: Tensor) -> bool:
    """Whether the input acts only through these tensors, along their dimensions."""
    if isinstance(module, nn.Linear | Conv1D):
        return True
    axis = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(1))
    axis = (axis / axis.norm()).to(states)

    def reflected(tensor: Tensor, dim: int) -> Tensor:
        last = tensor.movedim(dim, -1)
        made: Tensor = (last - 2 * (last @ axis)[..., None] * axis).movedim(-1, dim)
        return made

    def replaced(value: Any) -> Any:
        return reflected(states, states.ndim - 1) if value is states else value

    leaves = {one.name.rpartition(".")[2]: one.dim for one in readers}
    plain = {leaf: value.data.as_subclass(Tensor) for leaf in leaves if (value := module._parameters[leaf]) is not None}
    turned = {leaf: reflected(plain[leaf], dim) for leaf, dim in leaves.items()}
    args, kwargs = call
    with torch.no_grad():
        first = torch.func.functional_call(module, plain, args, kwargs)
        second = torch.func.functional_call(
            module, turned, tuple(replaced(value) for value in args),
            {name: replaced(value) for name, value in kwargs.items()},
        )  # fmt: skip
    pairs = list(zip(_floats(first), _floats(second), strict=True))
    return bool(pairs) and all(
        a.shape == b.shape and float((a - b).abs().max()) <= TOLERANCE * float(a.abs().max()) for a, b in pairs
    )


def _floats(output: Any) -> list[Tensor]:
    parts = output if isinstance(output, tuple | list) else (output,)
    return [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]


def _renamed(group: Group, old: str, new: str) -> Group:
    def name(full: str) -> str:
        return new + full.removeprefix(old)

    readers = (
        dataclasses.replace(one, name=name(one.name), bias=None if one.bias is None else name(one.bias))
        for one in group.readers
    )
    return Group(name(group.module), tuple(readers))


def _proportional(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape:
        return False
    factor = (first * second).sum() / second.square().sum().clamp_min(1e-30)
    return float((first - factor * second).abs().max()) <= TOLERANCE * float(first.abs().max())


@contextmanager
def find_head(
    channels: Channels, model: transformers.PreTrainedModel, structure: Structure, binding: Binding
) -> Iterator[None]:
    """While it lasts, watch one forward of the whole model for what comes behind the blocks; then note it."""
    inside = tuple(f"{block.name}." for block in structure.blocks)
    norms = {gain.module: name for name, gain in channels.gains.items()}  # the last may be in the last block
    outer = {name.rpartition(".")[0]: 1 in dims for name, dims in channels.cuts.items() if not name.startswith(inside)}
    heads = [path for path, reads in outer.items() if reads and isinstance(model.get_submodule(path), nn.Linear)]
    normed: list[tuple[str, Tensor]] = []
    called: list[tuple[str, Tensor]] = []

    def behind() -> bool:
        lane = getcurrent()
        return isinstance(lane, Lane) and lane.saw_all_blocks

    def left(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if behind():
                normed.append((name, output_tensor(output).detach().clone()))

        return hook

    def entered(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if behind():
                called.append((name, first_states(args, kwargs).detach().clone()))

        return hook

    handles = [model.get_submodule(path).register_forward_hook(left(name)) for path, name in norms.items()]
    handles += [model.get_submodule(path).register_forward_pre_hook(entered(path), with_kwargs=True) for path in heads]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    ties = tied_names(model)
    shared = set(ties) | set(ties.values())
    if normed:
        channels.final = normed[-1][0]
    if called:
        path, states = called[0]
        if normed and not _proportional(states, normed[-1][1]):
            channels.final = None
        same = [name for name, other in called if torch.equal(states, other)]
        free = [
            Reader(f"{name}.weight", 1, f"{name}.bias" if binding.bound(f"{name}.bias") else None)
            for name in same if f"{name}.weight" not in shared
        ]  # fmt: skip
        channels.head = Group(path, tuple(free))
