"""The config of a model with fewer units: found by trying which entries give tensors of the wanted shapes.

Nothing is known about families here. An entry of the config is a candidate because its value is the number of units
now; it is the right one when the stock class, built from the changed config, has exactly the shapes that the cut
tensors will have, in every block, and all other tensors as before. Tensors inside a block whose length goes along with
the number of units (a sink or a bias for every head) are cut as well; the proof decides whether that is right.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from secateur.engine.blocks import find_structure
from secateur.engine.entries import Entries, changed
from secateur.engine.skeleton import model_class, skeleton_of
from secateur.errors import SparsityError, UnsupportedModelError
from secateur.structured.couplings import Coupling, Cut, Kind
from secateur.structured.width_entries import attention_entries, neuron_entries

Shapes = dict[str, tuple[int, ...]]
ANOTHER_STRUCTURE = "choose another --structure, such as ffn"
HEADS_GO_WITH_CHANNELS = (
    "where the size of a head is the hidden size by the number of heads, use --structure heads,hidden (or "
    "kv-groups,hidden for whole groups): heads then go together with hidden channels, and keep their size"
)


@dataclass(frozen=True)
class Shrunk:
    """A model without weights in its new shapes, and the config entries that make it: key path -> value."""

    skeleton: transformers.PreTrainedModel
    changes: Entries
    couplings: list[Coupling] = field(default_factory=list)
    """Those that were asked for, with the cuts of tensors that go along."""
    kept: dict[str, int] = field(default_factory=dict)
    """By group: units that stay."""
    unsaid: list[str] = field(default_factory=list)
    """Groups whose number no entry says, while one says that of others: all of their units stay."""


def shapes_of(model: transformers.PreTrainedModel) -> Shapes:
    """Shape of every parameter and persistent buffer by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}


def cut_shapes(shapes: Shapes, couplings: Sequence[Coupling], kept: Mapping[Any, int]) -> Shapes:
    """Shapes after the cut: of each coupling ``kept[group]`` units stay."""
    made = dict(shapes)
    for coupling in couplings:
        gone = coupling.units - kept[coupling.group]
        for cut in coupling.cuts:
            shape = list(made[cut.name])
            shape[cut.dim] -= gone * cut.indices.shape[1]
            made[cut.name] = tuple(shape)
    return made


def shrink(config: transformers.PreTrainedConfig, couplings: Sequence[Coupling], kept: Mapping[Any, int]) -> Shrunk:
    """Find the config of the smaller model.

    Args:
        config: of the whole model, as it was read.
        couplings: of all blocks, only of the groups in ``kept``.
        kept: units that stay, by group.

    Raises:
        UnsupportedModelError: when no entries of the config give the wanted shapes for any group of a kind.
        SparsityError: when they would for other numbers of units; the nearest are named.
    """
    found = Shrunk(skeleton_of(copy.deepcopy(config)), {})
    refused: dict[str, UnsupportedModelError] = {}
    for group, count in kept.items():
        if group in found.kept:
            continue
        own = [coupling for coupling in couplings if coupling.group == group]
        more = _more_shrunk(config, found, own, [c for c in couplings if c.group not in found.kept], kept)
        if more is None and (legal := _legal_near(config, found, own, count)):
            raise SparsityError(
                f"{count} of {own[0].units} {noun(own[0].kind)} are not legal in a {type(config).__name__}",
                hint=f"the nearest numbers that are: {', '.join(map(str, legal))}; choose another --sparsity",
            )
        if more is None:
            refused[group] = UnsupportedModelError(
                f"the config of {model_class(config).__name__} has no entries for {count} of {own[0].units} "
                f"{noun(own[0].kind)} in every block",
                hint="this structure is bound to other sizes there; another --structure may be free"
                if own[0].heads is None else HEADS_GO_WITH_CHANNELS,
            )  # fmt: skip
        else:
            found = more
    unsaid = [group for group in refused if group not in found.kept]
    said = {coupling.kind for coupling in couplings if coupling.group in found.kept}
    for coupling in couplings:
        if coupling.group in unsaid and coupling.kind not in said:
            raise refused[coupling.group]
    return dataclasses.replace(found, unsaid=unsaid)


def _more_shrunk(
    config: Any, found: Shrunk, own: Sequence[Coupling], rest: Sequence[Coupling], kept: Mapping[Any, int]
) -> Shrunk | None:
    """With one group cut as well; where one entry says it for several groups, with these in proportion."""
    lead = own[0]
    count = kept[lead.group]
    alike = [coupling for coupling in rest if coupling.kind == lead.kind]
    groups = list(dict.fromkeys(coupling.group for coupling in alike if coupling.group != lead.group))
    for others in [[], *([group] for group in groups), *([groups] if len(groups) > 1 else [])]:
        together = [coupling for coupling in alike if coupling.group in {lead.group, *others}]
        if any(count * coupling.units % lead.units for coupling in together):
            continue
        stay = {coupling.group: count * coupling.units // lead.units for coupling in together}
        if (more := _search(config, found, together, stay)) is not None:
            return more
    return None


def _legal_near(config: Any, found: Shrunk, own: Sequence[Coupling], count: int) -> list[int]:
    """The nearest legal numbers of units below and above one that is not; for attention, where there are few."""
    first = own[0]
    if first.heads is None:
        return []
    legal = []
    for numbers in (range(count - first.parts, 0, -first.parts), range(count + first.parts, first.units, first.parts)):
        for number in numbers:
            if _search(config, found, own, {first.group: number}) is not None:
                legal.append(number)
                break
    return legal


def legal_counts(config: Any, own: Sequence[Coupling]) -> list[int]:
    """Numbers of units, less than there are, that the config can express, descending.

    Args:
        own: the couplings of one kind in all blocks.
    """
    first, whole = own[0], Shrunk(skeleton_of(copy.deepcopy(config)), {})
    return [
        number
        for number in range(first.units - first.parts, 0, -first.parts)
        if _search(config, whole, own, {first.group: number}) is not None
    ]


def noun(kind: Kind) -> str:
    """What the units of a kind are called."""
    return {"ffn": "neurons", "kv-groups": "key-value groups", "heads": "query heads"}[kind]


def _search(config: Any, found: Shrunk, own: Sequence[Coupling], kept: Mapping[str, int]) -> Shrunk | None:
    """The first entries that cut these couplings and nothing else."""
    before = shapes_of(found.skeleton)
    wanted = cut_shapes(before, own, kept)
    matrices = {matrix.name for matrix in find_structure(found.skeleton).matrices}
    current = changed(config, found.changes)
    for entries in _candidates(current, own, kept):
        try:
            skeleton = skeleton_of(changed(current, entries))
        except Exception:  # noqa: BLE001 - a config may refuse values in any way; then it was not this entry
            continue
        cut = _going_along(before, wanted, shapes_of(skeleton), own, kept, matrices)
        if cut is not None:
            return Shrunk(skeleton, found.changes | entries, found.couplings + cut, found.kept | dict(kept))
    return None


def _candidates(config: Any, own: Sequence[Coupling], kept: Mapping[str, int]) -> Iterator[Entries]:
    """Entries that may say the number of any of the groups."""
    for lead in {coupling.group: coupling for coupling in own}.values():
        entries = neuron_entries if lead.heads is None else attention_entries
        yield from entries(config, lead, kept[lead.group])


def _going_along(
    before: Shapes, wanted: Shapes, made: Shapes, own: Sequence[Coupling], kept: Mapping[str, int],
    matrices: Collection[str],
) -> list[Coupling] | None:  # fmt: skip
    """The couplings with cuts for tensors that became shorter with them; None when a shape cannot be explained so.

    Matrices never go along: they are couplings of their own, or else what feeds them is not known.
    """
    if wanted.keys() != made.keys():
        return None
    extra: dict[int, list[Cut]] = {}
    for name in (name for name in wanted if wanted[name] != made[name]):
        old, new = before[name], made[name]
        place = _nearest(own, name)
        if wanted[name] != old or len(old) != len(new) or place is None or name in matrices:
            return None
        coupling = own[place]
        dims = [dim for dim, (was, now) in enumerate(zip(old, new, strict=True)) if was != now]
        each, rest = divmod(old[dims[0]], coupling.units)
        if len(dims) > 1 or rest or not each or new[dims[0]] != each * kept[coupling.group]:
            return None
        indices = torch.arange(old[dims[0]]).reshape(coupling.units, each)
        extra.setdefault(place, []).append(Cut(name, dims[0], indices))
    return [
        dataclasses.replace(coupling, cuts=(*coupling.cuts, *extra.get(place, ())))
        for place, coupling in enumerate(own)
    ]


def _nearest(own: Sequence[Coupling], name: str) -> int | None:
    """Number of the coupling whose consumer has the longest common path with a tensor of the same block."""
    parts = name.split(".")
    best: tuple[int, int] | None = None
    for place, coupling in enumerate(own):
        shared = 0
        for ours, theirs in zip(parts, coupling.consumer.split("."), strict=False):
            if ours != theirs:
                break
            shared += 1
        if any(part.isdigit() for part in parts[:shared]) and (best is None or shared > best[0]):
            best = shared, place
    return None if best is None else best[1]
