"""What a structured pruning will remove: which units there are, how many stay, and the config that says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import transformers
from torch import Tensor, nn

from secateur.checkpoint.reader import CheckpointReader
from secateur.engine.binding import Binding
from secateur.engine.blocks import Block, Structure
from secateur.errors import SparsityError, UnsupportedModelError
from secateur.structured.configure import Shrunk, noun, shapes_of, shrink
from secateur.structured.couplings import Coupling, Kind, find_couplings
from secateur.structured.explore import Call, signature, visit_blocks
from secateur.structured.proof import prove, spread_units
from secateur.structured.stream import Job


@dataclass
class WidthPlan:
    """Units to remove from every block, proved on random weights."""

    jobs: dict[int, list[Job]]
    shrunk: Shrunk
    units: dict[Kind, tuple[int, int]]
    """By kind: units of a block before and after."""
    couplings: list[Coupling]
    """All that are cut, in all blocks."""
    removed: int
    """Prunable weights that go, in all blocks together."""
    differences: dict[str, float] = field(default_factory=dict)
    """By block that was tried: difference between units at zero and units removed."""

    def lines(self) -> list[str]:
        """The plan in words."""
        blocks = len(self.jobs)
        return [f"{noun(kind)}: {before:,} -> {after:,} in each of {blocks} blocks" for kind, (before, after) in
                self.units.items()]  # fmt: skip


def couplings_of_blocks(
    model: transformers.PreTrainedModel, structure: Structure, binding: Binding, reader: CheckpointReader
) -> dict[int, list[Coupling]]:
    """The couplings of every block; blocks that are built alike are looked at once.

    Raises:
        UnsupportedModelError: when the model cannot be run block by block.
    """
    seen: dict[object, tuple[Block, list[Coupling]]] = {}
    config = model.config.get_text_config()

    def visit(block: Block, module: nn.Module, call: Call, tensors: dict[str, Tensor]) -> None:
        args, kwargs = call
        found = find_couplings(block, module, lambda: module(*args, **kwargs), tensors, config)
        seen[signature(block, model)] = block, found

    visit_blocks(model, structure, binding, reader, visit)
    made: dict[int, list[Coupling]] = {}
    for block in structure.blocks:
        first, found = seen.get(signature(block, model), (block, []))
        made[block.index] = [_renamed(coupling, first.name, block.name) for coupling in found]
    return made


def plan_widths(
    config: transformers.PreTrainedConfig, model: transformers.PreTrainedModel, structure: Structure, binding: Binding,
    reader: CheckpointReader, kinds: Sequence[str], sparsity: float, round_to: int,
) -> WidthPlan:  # fmt: skip
    """Decide how many units of each kind stay, find the config for it, and prove that they can be removed.

    Args:
        config: as it was read, unchanged.
        sparsity: share of all prunable weights that go; the kinds share it equally. At 0 the plan is empty.
        round_to: neurons that stay are a multiple of this.

    Raises:
        UnsupportedModelError: when blocks have no such units, differ in their number, or cannot be cut.
        SparsityError: when the request comes to nothing, or leaves nothing.
    """
    if not sparsity:
        return WidthPlan({}, Shrunk(model, {}), {}, [], 0)
    every = couplings_of_blocks(model, structure, binding, reader)
    total = sum(matrix.size for matrix in structure.matrices)
    shapes = shapes_of(model)
    kept: dict[Kind, int] = {}
    for name in kinds:
        kind = cast(Kind, name)
        own = of_kind(every, kind, structure)
        each = sum(weights_of_unit(coupling, shapes) for coupling in own)
        kept[kind] = _stay(kind, own[0], own[0].units - sparsity * total / len(kinds) / each, round_to)
    return plan_counts(config, model, structure, binding, reader, every, kept)


def plan_counts(
    config: transformers.PreTrainedConfig, model: transformers.PreTrainedModel, structure: Structure, binding: Binding,
    reader: CheckpointReader, every: Mapping[int, Sequence[Coupling]], kept: Mapping[Kind, int],
) -> WidthPlan:  # fmt: skip
    """Find the config for given numbers of units, and prove that the others can be removed.

    Args:
        every: `couplings_of_blocks`.
        kept: by kind, units that stay in each block; less than there are.

    Raises:
        UnsupportedModelError: when blocks have no such units, differ in their number, or cannot be cut.
        SparsityError: when the config refuses a number.
    """
    shapes = shapes_of(model)
    units: dict[Kind, tuple[int, int]] = {}
    jobs: dict[int, list[Job]] = {block.index: [] for block in structure.blocks}
    chosen: list[Coupling] = []
    removed = 0
    for kind, after in kept.items():
        own = of_kind(every, kind, structure)
        units[kind] = own[0].units, after
        removed += (own[0].units - after) * sum(weights_of_unit(coupling, shapes) for coupling in own)
        for index, couplings in every.items():
            jobs[index] += [Job(coupling, after) for coupling in couplings if coupling.kind == kind]
        chosen += own
    shrunk = shrink(config, chosen, kept)
    plan = WidthPlan(jobs, shrunk, units, chosen, removed)

    def visit(block: Block, module: nn.Module, call: Call, tensors: dict[str, Tensor]) -> None:
        choices = [(job.coupling, spread_units(job.coupling, job.stay)) for job in jobs[block.index]]
        plan.differences[block.name] = prove(block, model, shrunk.skeleton, call, tensors, choices)

    visit_blocks(model, structure, binding, reader, visit)
    return plan


def of_kind(every: Mapping[int, Sequence[Coupling]], kind: Kind, structure: Structure) -> list[Coupling]:
    """The couplings of one kind in all blocks, which must be alike."""
    found = []
    for block in structure.blocks:
        here = [coupling for coupling in every[block.index] if coupling.kind == kind]
        if not here:
            experts = any(matrix.experts for matrix in block.matrices)
            raise UnsupportedModelError(
                f"{block.name} has no {noun(kind)} that can be removed"
                + (": its feed-forward network is made of experts" if experts and kind == "ffn" else ""),
                hint="choose another --structure; without one, single weights are pruned",
            )
        found += here
    counts = sorted({coupling.units for coupling in found})
    if len(counts) > 1:
        raise UnsupportedModelError(
            f"blocks have different numbers of {noun(kind)}: {', '.join(map(str, counts))}",
            hint="a config has one number for all of them; choose another --structure",
        )
    return found


def _stay(kind: Kind, coupling: Coupling, wanted: float, round_to: int) -> int:
    """The nearest number of units that is legal."""
    step = round_to if kind == "ffn" else coupling.parts
    units = coupling.units
    after = min(round(wanted / step) * step, units)
    lowest = step if units > step else 1
    if after == units or wanted < lowest / 2:
        near = [count for count in (units - step, lowest) if 0 < count < units]
        raise (
            SparsityError(
                f"{wanted:,.1f} of {units:,} {noun(kind)} cannot stay in each block: they go in steps of {step}",
                hint=f"the {noun(kind)} that can stay are {near[-1]:,} to {near[0]:,}; choose another --sparsity"
                + (", or a smaller --round-to" if kind == "ffn" else ""),
            )
            if near
            else UnsupportedModelError(
                f"a block has {units} {noun(kind)}: none can go", hint="choose another --structure"
            )
        )
    return max(after, lowest)


def weights_of_unit(coupling: Coupling, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Weights of matrices that go with one unit."""
    total = 0
    for cut in coupling.cuts:
        shape = shapes[cut.name]
        if len(shape) == 2:
            total += shape[1 - cut.dim] * cut.indices.shape[1]
    return total


def _renamed(coupling: Coupling, old: str, new: str) -> Coupling:
    def name(full: str) -> str:
        return new + full.removeprefix(old)

    cuts = tuple(dataclasses.replace(cut, name=name(cut.name)) for cut in coupling.cuts)
    return dataclasses.replace(coupling, consumer=name(coupling.consumer), cuts=cuts)
