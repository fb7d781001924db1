"""The config of a model with fewer hidden channels and everything else as it was, found by trying its entries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from secateur.engine.blocks import Structure
from secateur.engine.entries import changed, part_of
from secateur.engine.skeleton import model_class, skeleton_of
from secateur.errors import SparsityError, UnsupportedModelError
from secateur.structured.configure import ANOTHER_STRUCTURE, HEADS_GO_WITH_CHANNELS, Shapes, Shrunk, shapes_of
from secateur.structured.couplings import heads_of


def smaller(
    config: Any, model: nn.Module, old: Shapes, before: int, wanted: float, round_to: int
) -> tuple[int, int, Shrunk, dict[str, tuple[int, ...]]]:
    """The nearest number of channels that the config can say, the step it is a multiple of, the model, and its cuts.

    Raises:
        SparsityError: when the request comes to nothing, leaves nothing, or to a number that the config refuses.
        UnsupportedModelError: when no entry says fewer channels and nothing else.
    """
    reasons: dict[str, None] = {}
    tried: set[int] = set()
    for count, step in _widths(before, wanted, round_to):
        if count not in tried:
            tried.add(count)
            found = _search(config, old, before, count, reasons)
            if found is not None:
                return count, step, *found
    name = model_class(config).__name__
    if not tried:
        raise SparsityError(
            f"{wanted:,.1f} of {before:,} hidden channels cannot stay",
            hint=f"at least one of {before:,} goes and one stays; choose another --sparsity",
        )
    near = [] if reasons else _legal_near(config, old, before, wanted, tried)
    if near:
        raise SparsityError(
            f"{wanted:,.1f} of {before:,} hidden channels are not legal in a {type(config).__name__}",
            hint=f"the nearest numbers that are: {', '.join(map(str, near))}; choose another --sparsity",
        )
    reason = next(iter(reasons), "no entry of the config sets the width of its embeddings alone")
    raise UnsupportedModelError(
        f"{name} cannot have fewer hidden channels alone: {reason}",
        hint=f"{HEADS_GO_WITH_CHANNELS}; or {ANOTHER_STRUCTURE}",
    )


def _widths(before: int, wanted: float, round_to: int) -> Iterator[tuple[int, int]]:
    """Numbers near the wanted one, with their steps: multiples of ``round_to``, then of its half, and so on."""
    step = round_to
    while step:
        reach = max(step / 2, 0.02 * before)
        first, last = int((wanted - reach) // step), int((wanted + reach) // step) + 1
        near = [number * step for number in range(first, last + 1) if abs(number * step - wanted) <= reach]
        yield from ((count, step) for count in sorted(near, key=lambda n: abs(n - wanted)) if 0 < count < before)
        step = step // 2 if step % 2 == 0 else int(step > 1)


def _legal_near(config: Any, old: Shapes, before: int, wanted: float, tried: set[int]) -> list[int]:
    """The nearest legal numbers below and above."""
    found = []
    for numbers in (range(int(wanted), 0, -1), range(int(wanted) + 1, before)):
        for number in numbers:
            if number not in tried and _search(config, old, before, number, {}) is not None:
                found.append(number)
                break
    return found


def _search(
    config: Any, old: Shapes, before: int, count: int, reasons: dict[str, None]
) -> tuple[Shrunk, dict[str, tuple[int, ...]]] | None:
    part, path = part_of(config)
    for entries in _entries(part, before, count):
        changes = {(*path, key): value for key, value in entries.items()}
        try:
            skeleton = skeleton_of(changed(config, changes))
        except Exception:  # noqa: BLE001 - a config may refuse values in any way; then it was not this entry
            continue
        cuts, reason = _cuts(old, shapes_of(skeleton), before, count)
        embedding = skeleton.get_input_embeddings()
        if embedding is None or tuple(embedding.weight.shape)[1:] != (count,):
            continue  # an entry of the same value that means something else
        if cuts:
            return Shrunk(skeleton, changes), cuts
        reasons[reason] = None
    return None


def _entries(config: Any, before: int, count: int) -> Iterator[dict[str, Any]]:
    """Entries that may set the width, the likeliest first; the size of heads is said beside where it can be."""
    known: dict[str, Any] = config.to_dict()
    real = dict(getattr(config, "attribute_map", {}))
    name, head = real.get("hidden_size", "hidden_size"), real.get("head_dim", "head_dim")
    keys = sorted((key for key, value in known.items() if type(value) is int and value == before and key != head),
                  key=lambda key: key != name)  # fmt: skip
    now = known.get(head)
    sizes = list(
        dict.fromkeys([*([now] if type(now) is int else []), *(heads.size for heads in heads_of(config, before))])
    )
    said = [{head: size} for size in sizes]
    ways = [*said, {}] if head in known or hasattr(config, head) else [{}, *said]
    for extra in ways:
        for key in keys:
            yield {key: count, **extra}
        if len(keys) > 1:
            yield {**dict.fromkeys(keys, count), **extra}


def _cuts(old: Shapes, new: Shapes, before: int, count: int) -> tuple[dict[str, tuple[int, ...]], str]:
    """Tensor -> dimensions that have fewer channels; empty, with the reason, when something else changed as well."""
    if old.keys() != new.keys():
        return {}, "other tensors hang on it"
    cuts = {}
    for name, shape in old.items():
        if new[name] == shape:
            continue
        pairs = list(zip(shape, new[name], strict=False))
        dims = tuple(dim for dim, (a, b) in enumerate(pairs) if a != b)
        if len(shape) != len(new[name]) or any(pairs[dim] != (before, count) for dim in dims):
            sizes = f"{' x '.join(map(str, shape))} would be {' x '.join(map(str, new[name]))}"
            return {}, f"other sizes hang on it in this config: {name}, {sizes}"
        cuts[name] = dims
    return cuts, "" if cuts else "it changes nothing"


def refuse_both_sides(structure: Structure, cuts: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a config with which the heads would become smaller as well.

    Raises:
        UnsupportedModelError: naming the first matrix of a block that would lose channels on both sides.
    """
    for matrix in structure.matrices:
        if len(cuts.get(matrix.name, ())) > 1:
            raise UnsupportedModelError(
                f"inputs and outputs of {matrix.name} hang on the hidden size together: with fewer hidden channels "
                "this config has smaller heads as well",
                hint=HEADS_GO_WITH_CHANNELS,
            )
