"""What a structured pruning will remove: which units there are, how many stay, and the config that says so."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import transformers
from torch import Tensor, nn

from secateur.checkpoint.reader import CheckpointReader
from secateur.engine.binding import Binding
from secateur.engine.blocks import Block, Structure, signature
from secateur.engine.capture import copied_call
from secateur.errors import SparsityError, UnsupportedModelError
from secateur.structured.configure import HEADS_GO_WITH_CHANNELS, Shrunk, noun, shapes_of, shrink
from secateur.structured.couplings import Coupling, Kind, find_couplings
from secateur.structured.expert_neurons import find_expert_neurons
from secateur.structured.explore import Call, visit_blocks
from secateur.structured.proof import prove, spread_units
from secateur.structured.stream import Job


@dataclass
class WidthPlan:
    """Units to remove from every block that has them, proved on random weights."""

    jobs: dict[int, list[Job]]
    shrunk: Shrunk
    units: dict[str, tuple[int, int]]
    """By kind, and where blocks differ by kind and number: units of a block before and after."""
    couplings: list[Coupling]
    """All that are cut, in all blocks."""
    removed: int
    """Prunable weights that go, in all blocks together."""
    unsaid: list[str] = field(default_factory=list)
    """Groups of units that stay whole, because the config does not name their number."""
    differences: dict[str, float] = field(default_factory=dict)
    """By block that was tried: difference between units at zero and units removed."""

    def lines(self) -> list[str]:
        """The plan in words."""
        lines = []
        for group, (before, after) in self.units.items():
            own = [coupling for coupling in self.couplings if coupling.group == group]
            blocks = sum(any(job.coupling.group == group for job in jobs) for jobs in self.jobs.values())
            lines.append(f"{noun(own[0].kind)}: {before:,} -> {after:,} in each of {blocks} blocks")
        return lines + [f"{group} stay: the config has no entry for their number" for group in self.unsaid]


def couplings_of_blocks(
    model: transformers.PreTrainedModel, structure: Structure, binding: Binding, reader: CheckpointReader
) -> dict[int, list[Coupling]]:
    """The couplings of every block; blocks that are built alike are looked at once.

    Raises:
        UnsupportedModelError: when the model cannot be run block by block.
    """
    seen: dict[object, tuple[Block, list[Coupling]]] = {}

    def visit(block: Block, module: nn.Module, call: Call, tensors: dict[str, Tensor]) -> None:
        def run() -> Any:
            args, kwargs = copied_call(*call)
            return module(*args, **kwargs)

        found = find_couplings(block, module, run, tensors, model.config)
        found += find_expert_neurons(block, module, run, tensors)
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

    def shrunk_without(unsaid: Sequence[str]) -> Shrunk:
        kept: dict[str, int] = {}
        chosen: list[Coupling] = []
        for name in kinds:
            own = [c for c in _of_kind(every, cast(Kind, name), structure) if c.group not in unsaid]
            # Of every coupling the same share goes, also where they have different numbers of units.
            share = sparsity * total / len(kinds) / sum(c.units * weights_of_unit(c, shapes) for c in own)
            for coupling in own:
                if coupling.group not in kept:
                    kept[coupling.group] = _stay(coupling, coupling.units * (1 - share), round_to)
            chosen += own
        return shrink(config, chosen, kept)

    shrunk = shrunk_without([])
    unsaid = list(shrunk.unsaid)
    if unsaid:  # the others give what these do not
        shrunk = shrunk_without(unsaid)
    return _proved(model, structure, binding, reader, shrunk, unsaid)


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
    chosen = [coupling for kind in kept for coupling in of_kind(every, kind, structure)]
    return _proved(model, structure, binding, reader, shrink(config, chosen, dict(kept)), [])


def _proved(
    model: transformers.PreTrainedModel, structure: Structure, binding: Binding, reader: CheckpointReader,
    shrunk: Shrunk, unsaid: list[str],
) -> WidthPlan:  # fmt: skip
    """The plan for a config that was found, tried on random weights."""
    shapes = shapes_of(model)
    units = {coupling.group: (coupling.units, shrunk.kept[coupling.group]) for coupling in shrunk.couplings}
    jobs: dict[int, list[Job]] = {
        block.index: [
            Job(coupling, shrunk.kept[coupling.group]) for coupling in shrunk.couplings
            if coupling.consumer.startswith(block.name + ".")
        ]
        for block in structure.blocks
    }  # fmt: skip
    removed = sum((c.units - shrunk.kept[c.group]) * weights_of_unit(c, shapes) for c in shrunk.couplings)
    plan = WidthPlan(jobs, shrunk, units, shrunk.couplings, removed, unsaid)

    def visit(block: Block, module: nn.Module, call: Call, tensors: dict[str, Tensor]) -> None:
        if not jobs[block.index]:
            return
        choices = [(job.coupling, spread_units(job.coupling, job.stay)) for job in jobs[block.index]]
        plan.differences[block.name] = prove(block, model, shrunk.skeleton, call, tensors, choices)

    visit_blocks(model, structure, binding, reader, visit)
    return plan


def of_kind(every: Mapping[int, Sequence[Coupling]], kind: Kind, structure: Structure) -> list[Coupling]:
    """The couplings of one kind, which all blocks must have, and alike.

    Raises:
        UnsupportedModelError: when they do not.
    """
    found = _of_kind(every, kind, structure)
    without = [block.name for block in structure.blocks if all(c.kind != kind for c in every[block.index])]
    if without or len({coupling.group for coupling in found}) > 1 or any(coupling.experts for coupling in found):
        raise UnsupportedModelError(
            f"a budget is not split over {noun(kind)} that blocks do not have alike, or that are in experts",
            hint="use --structure with --sparsity",
        )
    return found


def _of_kind(every: Mapping[int, Sequence[Coupling]], kind: Kind, structure: Structure) -> list[Coupling]:
    """The couplings of one kind in all blocks that have them; those with other numbers of units make other groups."""
    found = [coupling for block in structure.blocks for coupling in every[block.index] if coupling.kind == kind]
    if not found:
        experts = kind == "ffn" and any(matrix.experts for matrix in structure.matrices)
        raise UnsupportedModelError(
            f"no block has {noun(kind)} that can be removed"
            + (": the feed-forward networks are made of experts" if experts else ""),
            hint=_where_heads_are(every) if kind == "heads" else _ANOTHER,
        )
    if over := next((norm for coupling in found for norm in coupling.norms), None):
        # While a model is pruned its norms see all heads; those of the smaller model would answer otherwise.
        raise UnsupportedModelError(
            f"{over.module} is a norm over all {noun(kind)}: they cannot go alone",
            hint=f"with hidden channels they may go: --structure {kind},hidden",
        )
    if len({coupling.units for coupling in found}) == 1:
        return found
    return [dataclasses.replace(coupling, group=f"{kind} of {coupling.units}") for coupling in found]


_ANOTHER = "choose another --structure; without one, single weights are pruned"


def _where_heads_are(every: Mapping[int, Sequence[Coupling]]) -> str:
    """What to ask for where no group has several query heads."""
    if not any(c.heads is not None and c.heads.each == 1 for couplings in every.values() for c in couplings):
        return _ANOTHER
    return f"each query head has keys and values of its own: use --structure kv-groups; {HEADS_GO_WITH_CHANNELS}"


def _stay(coupling: Coupling, wanted: float, round_to: int) -> int:
    """The nearest number of units that is legal."""
    kind = coupling.kind
    step = round_to if kind == "ffn" else coupling.parts
    units = coupling.units
    after = min(round(wanted / step) * step, units)
    lowest = step if units > step else 1
    if after == units or wanted < lowest / 2:
        near = [count for count in (units - step, lowest) if 0 < count < units]
        raise (
            SparsityError(
                f"{wanted:,.1f} of {units:,} {noun(kind)} cannot stay in each block: they go in steps of {step}"
                if wanted >= 0
                else f"more than all {units:,} {noun(kind)} of each block would have to go: they are too few weights",
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
        if "bias" not in cut.name.rpartition(".")[2] and len(shape) in (2, 3):
            total += math.prod(shape) // shape[cut.dim] * cut.indices.shape[1]
    return total


def _renamed(coupling: Coupling, old: str, new: str) -> Coupling:
    def name(full: str) -> str:
        return new + full.removeprefix(old)

    cuts = tuple(dataclasses.replace(cut, name=name(cut.name)) for cut in coupling.cuts)
    norms = tuple(norm.renamed(name) for norm in coupling.norms)
    return dataclasses.replace(coupling, consumer=name(coupling.consumer), cuts=cuts, norms=norms)
