"""Config entries that may set a number of neurons or heads, the likeliest first; which of them do is tried later."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from secateur.engine.entries import Entries, entries_of
from secateur.structured.couplings import Coupling

_FFN = ("intermediate", "ffn", "inner", "mlp", "d_ff", "dff", "feed", "hidden_dim")
_NO_WIDTH = ("vocab", "position", "token", "window", "layers", "image", "label")
_RATIO = ("ratio", "expan", "mult", "factor")


def neuron_entries(config: Any, lead: Coupling, count: int) -> Iterator[Entries]:
    """Entries for ``count`` instead of ``lead.units`` neurons.

    A number that is the width, in any config inside the config, alone or in twos (encoder and decoder); a list of
    widths, one a layer; twice the width, where gate and neurons are counted together; a ratio to another width; an
    empty entry, as long as which the width is computed.
    """
    widths: Entries = {}
    doubles: list[Entries] = []
    ratios: list[Entries] = []
    for path, value in entries_of(config):
        key = path[-1]
        if any(word in key for word in _NO_WIDTH):
            continue
        if type(value) is int and value == lead.units:
            widths[path] = count
        elif isinstance(value, list) and lead.units in value and all(type(one) is int for one in value):
            widths[path] = [count if one == lead.units else one for one in value]
        elif type(value) is int and value == 2 * lead.units and any(word in key for word in _FFN):
            doubles.append({path: 2 * count})
        if any(word in key for word in _RATIO):
            ratios += [{path: scaled} for scaled in _scaled(value, count, lead.units)]
        elif value is None and "inner" in key:
            ratios.append({path: count})
    likely = sorted(widths, key=lambda path: not any(word in path[-1] for word in _FFN))
    for number in (1, 2):
        for paths in itertools.combinations(likely, number):
            yield {path: widths[path] for path in paths}
    yield from doubles
    yield from ratios


def _scaled(value: Any, count: int, units: int) -> Iterator[Any]:
    """A ratio, or a list of ratios, for another width; a little more where the code rounds the product down."""
    if isinstance(value, list) and value:
        parts = [list(_scaled(one, count, units)) for one in value]
        yield from (list(made) for made in zip(*parts, strict=False))
    elif type(value) in (int, float) and value > 0:
        exact = value * count / units
        yield from [int(exact)] if exact == int(exact) and type(value) is int else []
        yield exact
        yield value * (count + 0.5) / units


def attention_entries(config: Any, lead: Coupling, count: int) -> Iterator[Entries]:
    """Entries for ``count`` instead of ``lead.units`` groups or heads: the numbers of heads, and the size of one.

    The size is given as well: where a config does not name it, it is computed from the number of heads.
    """
    assert lead.heads is not None
    heads = lead.heads
    left = count * heads.each if lead.kind == "kv-groups" else count
    groups = count if lead.kind == "kv-groups" else left if heads.groups == heads.query else heads.groups
    query: dict[tuple[str, ...], int] = {}
    shared: dict[tuple[str, ...], int] = {}
    sizes: Entries = {}
    for path, value in entries_of(config):
        key = path[-1]
        if "head" in key and not any(word in key for word in ("dim", "size", "ratio")) and type(value) is int:
            if ("kv" in key or "key_value" in key) and value == heads.groups:
                shared[path] = groups
            elif value == heads.query and "kv" not in key and "key_value" not in key:
                query[path] = left
        elif key in ("head_dim", "d_kv", "kv_channels", "attention_head_dim"):
            sizes[path] = heads.size if value is None else value
    numbers: Mapping[tuple[str, ...], int] = query | shared
    together = [[path, *(other for other in shared if other[:-1] == path[:-1])] for path in sorted(query, key=_unusual)]
    tried: list[Entries] = []
    for chosen in [*together, list(numbers), *([path] for path in query)]:
        base: Entries = {path: numbers[path] for path in chosen}
        parts = {path[:-1] for path in chosen}
        named = {path: value for path, value in sizes.items() if path[:-1] in parts}
        missing: Entries = {(*part, "head_dim"): heads.size for part in parts}
        for size in (named, {**missing, **named}, {}):
            if (made := {**base, **size}) not in tried:
                tried.append(made)
                yield made


def _unusual(path: tuple[str, ...]) -> bool:
    return path[-1] not in ("num_attention_heads", "n_head", "n_heads", "num_heads")
