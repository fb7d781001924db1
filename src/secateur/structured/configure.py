"""The config of a model with fewer units: found by trying which entries give tensors of the wanted shapes.

Nothing is known about families here. An entry of the config is a candidate because its value is the number of units
now; it is the right one when the stock class, built from the changed config, has exactly the shapes that the cut
tensors will have, in every block, and all other tensors as before.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import transformers

from secateur.engine.skeleton import model_class, skeleton_of
from secateur.errors import SparsityError, UnsupportedModelError
from secateur.structured.couplings import Coupling, Kind

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Shrunk:
    """A model without weights in its new shapes, and the config entries that make it: key path -> value."""

    skeleton: transformers.PreTrainedModel
    changes: dict[tuple[str, ...], Any]


def shapes_of(model: transformers.PreTrainedModel) -> Shapes:
    """Shape of every parameter and persistent buffer by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}


def cut_shapes(shapes: Shapes, couplings: Sequence[Coupling], kept: Mapping[Kind, int]) -> Shapes:
    """Shapes after the cut: of each coupling ``kept[kind]`` units stay."""
    made = dict(shapes)
    for coupling in couplings:
        gone = coupling.units - kept[coupling.kind]
        for cut in coupling.cuts:
            shape = list(made[cut.name])
            shape[cut.dim] -= gone * cut.indices.shape[1]
            made[cut.name] = tuple(shape)
    return made


def shrink(config: transformers.PreTrainedConfig, couplings: Sequence[Coupling], kept: Mapping[Kind, int]) -> Shrunk:
    """Find the config of the smaller model.

    Args:
        config: of the whole model, as it was read.
        couplings: of all blocks, only of the kinds in ``kept``.
        kept: units that stay, by kind.

    Raises:
        UnsupportedModelError: when no entries of the config give the wanted shapes.
        SparsityError: when they would for other numbers of units; the nearest are named.
    """
    changes: dict[tuple[str, ...], Any] = {}
    current = skeleton_of(copy.deepcopy(config))
    for kind, count in kept.items():
        own = [coupling for coupling in couplings if coupling.kind == kind]
        wanted = cut_shapes(shapes_of(current), own, kept)
        shrunk = _search(changed(config, changes), own[0], count, wanted)
        if shrunk is None and (legal := _legal_near(changed(config, changes), current, own, count)):
            raise SparsityError(
                f"{count} of {own[0].units} {noun(kind)} are not legal in a {type(config).__name__}",
                hint=f"the nearest numbers that are: {', '.join(map(str, legal))}; choose another --sparsity",
            )
        if shrunk is None:
            raise UnsupportedModelError(
                f"the config of {model_class(config).__name__} has no entries for {count} of {own[0].units} "
                f"{noun(kind)} in every block",
                hint="this structure is bound to other sizes there; another --structure may be free",
            )
        changes |= shrunk.changes
        current = shrunk.skeleton
    return Shrunk(current, changes)


def _legal_near(config: Any, current: Any, own: Sequence[Coupling], count: int) -> list[int]:
    """The nearest legal numbers of units below and above one that is not; for attention, where there are few."""
    first = own[0]
    if first.heads is None:
        return []
    found = []
    for numbers in (range(count - first.parts, 0, -first.parts), range(count + first.parts, first.units, first.parts)):
        for number in numbers:
            if _search(config, first, number, cut_shapes(shapes_of(current), own, {first.kind: number})) is not None:
                found.append(number)
                break
    return found


def legal_counts(config: Any, own: Sequence[Coupling]) -> list[int]:
    """Numbers of units, less than there are, that the config can express, descending.

    Args:
        own: the couplings of one kind in all blocks.
    """
    first, shapes = own[0], shapes_of(skeleton_of(copy.deepcopy(config)))
    return [
        number
        for number in range(first.units - first.parts, 0, -first.parts)
        if _search(config, first, number, cut_shapes(shapes, own, {first.kind: number})) is not None
    ]


def noun(kind: Kind) -> str:
    """What the units of a kind are called."""
    return {"ffn": "neurons", "kv-groups": "key-value groups", "heads": "query heads"}[kind]


def changed(config: transformers.PreTrainedConfig, changes: Mapping[tuple[str, ...], Any]) -> Any:
    """A copy of a config with entries replaced, made the way a file with these entries would be read."""
    if not changes:
        return copy.deepcopy(config)
    return type(config).from_dict(apply_changes(config.to_dict(), changes))


def apply_changes(data: Mapping[str, Any], changes: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """A copy of plain config data with entries replaced or added."""
    made = copy.deepcopy(dict(data))
    for path, value in changes.items():
        place = made
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
    return made


def _search(config: Any, coupling: Coupling, count: int, wanted: Shapes) -> Shrunk | None:
    part, path = _part_of(config)
    for entries in _candidates(part, coupling, count):
        changes = {(*path, key): value for key, value in entries.items()}
        try:
            skeleton = skeleton_of(changed(config, changes))
        except Exception:  # noqa: BLE001 - a config may refuse values in any way; then it was not this entry
            continue
        if shapes_of(skeleton) == wanted:
            return Shrunk(skeleton, changes)
    return None


def _part_of(config: Any) -> tuple[Any, tuple[str, ...]]:
    """The part of the config that describes the blocks, and where it stands in the whole."""
    text = config.get_text_config()
    if text is config:
        return config, ()
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is text:
            return text, (name,)
    return config, ()


def _candidates(config: Any, coupling: Coupling, count: int) -> Iterator[dict[str, Any]]:
    """Entries that may set the number of units, the likeliest first."""
    known: dict[str, Any] = config.to_dict()
    if coupling.heads is None:
        for key, value in known.items():
            if type(value) is int and value == coupling.units:
                yield {key: count}
        # GPT-2 computes its width from another entry as long as its own one is empty.
        for key, value in known.items():
            if value is None and "inner" in key:
                yield {key: count}
        return
    heads, real = coupling.heads, dict(getattr(config, "attribute_map", {}))
    query = real.get("num_attention_heads", "num_attention_heads")
    groups = [key for key in ("num_key_value_heads", "num_kv_heads") if key in known]
    left = count * heads.each if coupling.kind == "kv-groups" else count
    base = {query: left}
    if coupling.kind == "kv-groups":
        base |= dict.fromkeys(groups, count)
    elif heads.groups == heads.query:
        base |= dict.fromkeys(groups, left)
    size = real.get("head_dim", "head_dim")
    if size in known or hasattr(config, size):
        yield {**base, size: heads.size}
    yield base
