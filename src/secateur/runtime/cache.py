"""Keys and values in memory that the kernels write to, inside the layers of a cache of transformers.

A layer that is held gives views of that memory wherever its keys and values are looked at; code that sets them, as a
prompt in between, cropping or beams do, makes it an ordinary layer again, and the next single token takes it anew. So
whatever is done to a cache has the meaning it always had. Imported when it is first needed, for transformers imports
this package while it is imported itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from secateur.runtime.plan import Wanted

LEAST_ROOM, MOST_ROOM = 64, 1024
"""Places for tokens to come: as many as there are tokens, within these bounds. Memory moves that seldom."""


@dataclass
class Held:
    """The memory of all layers of one cache."""

    owner: object
    """Whoever wrote it: nobody else may go on."""
    tokens: int
    """How many had come in when it was made."""
    cache: Any
    """As the kernels see it."""
    keys: list[Tensor] = field(default_factory=list)
    """Of each block, (groups, places, head); ``values`` as well."""
    values: list[Tensor] = field(default_factory=list)
    filled: list[int] = field(default_factory=list)
    """Places that were filled when it was made."""


class _Layer:
    """A layer whose keys and values may be held; where they are not, they are what was set."""

    _layer_type = None  # or transformers would make such layers for every model

    @property
    def keys(self) -> Any:
        return self._of("keys")

    @keys.setter
    def keys(self, value: Any) -> None:
        _let_go(self)
        vars(self)["keys"] = value

    @property
    def values(self) -> Any:
        return self._of("values")

    @values.setter
    def values(self, value: Any) -> None:
        _let_go(self)
        vars(self)["values"] = value

    def _of(self, name: str) -> Any:
        place = vars(self).get("held")
        if place is None:
            return vars(self)[name]
        held, number = place
        filled = held.filled[number] + held.cache.steps
        window = vars(self).get("sliding_window", 0)
        first = max(0, filled - window + 1) if window else 0
        return getattr(held, name)[number][None, :, first:filled]

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        if state.pop("held", None) is not None:  # a copy has memory of its own
            state |= {name: getattr(self, name) for name in _names(self)}
        return state


class HeldLayer(_Layer, DynamicLayer):
    """Of a block whose tokens attend to all."""


class HeldWindowLayer(_Layer, DynamicSlidingWindowLayer):
    """Of a block whose tokens attend to a window."""

    @property
    def cumulative_length(self) -> int:
        place = vars(self).get("held")
        return int(vars(self)["cumulative_length"] if place is None else place[0].tokens + place[0].cache.steps)

    @cumulative_length.setter
    def cumulative_length(self, value: int) -> None:
        _let_go(self)
        self.__dict__["cumulative_length"] = value


_HELD: dict[type, type] = {DynamicLayer: HeldLayer, DynamicSlidingWindowLayer: HeldWindowLayer}


def held_by(cache: Any, owner: object) -> Held | None:
    """The memory of a cache whose layers are all held for the owner."""
    layers = cache.layers if type(cache) is DynamicCache else []
    place = vars(layers[0]).get("held") if layers else None
    if place is None or place[0].owner is not owner or len(layers) != len(place[0].keys):
        return None
    held: Held = place[0]
    for layer in layers:
        place = vars(layer).get("held")
        if place is None or place[0] is not held or vars(layer).get("record_past"):
            return None
    return held


def tokens_in(cache: Any, wanted: Sequence[Wanted], dtype: torch.dtype) -> int:
    """How many tokens an ordinary cache has seen, all of its layers being as they must be; 0: none, or it is not."""
    if type(cache) is not DynamicCache or cache.offloading or len(cache.layers) != len(wanted):
        return 0
    seen = int(cache.layers[0].get_seq_length())
    for layer, one in zip(cache.layers, wanted, strict=True):
        kind = DynamicSlidingWindowLayer if one.window else DynamicLayer
        if type(layer) not in (kind, _HELD[kind]) or not layer.is_initialized or layer.get_seq_length() != seen:
            return 0
        if one.window and (layer.sliding_window != one.window or layer.record_past):
            return 0
        shape = (1, one.groups, min(seen, one.window - 1) if one.window else seen, one.head)
        for tensor in (layer.keys, layer.values):
            if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu":
                return 0
    return seen


def room_for(tokens: int) -> int:
    """Places to have for tokens to come."""
    return min(max(tokens, LEAST_ROOM), MOST_ROOM)


def hold(
    cache: Any, owner: object, wanted: Sequence[Wanted], tokens: int, cosines: Tensor, sines: Tensor, kernels: Any
) -> Held:
    """Move the keys and values of a cache to memory with room, one block after the other.

    Args:
        cache: of which `tokens_in` said ``tokens``.
        cosines: (room, rotated), of the places to come; ``sines`` as well.
    """
    room = len(cosines)
    made = Held(owner, tokens, None)
    for number, layer in enumerate(cache.layers):
        if type(layer) in _HELD:
            kind: Any = _HELD[type(layer)]
            other = kind.__new__(kind)
            vars(other).update(vars(layer))
            layer = cache.layers[number] = other
        place = vars(layer).get("held")
        _let_go(layer)
        made.filled.append(layer.keys.shape[2])
        for name, of_all in (("keys", made.keys), ("values", made.values)):
            old = vars(layer)[name]
            new = torch.empty(old.shape[1], old.shape[2] + room, old.shape[3], dtype=old.dtype)
            new[:, : old.shape[2]] = old[0]
            of_all.append(new)
            # What it was is let go at once, so that no more than one block is in memory twice.
            vars(layer)[name] = new[None, :, : old.shape[2]]
            if place is not None:
                getattr(place[0], name)[number] = new[:, :0]
    given = zip(made.keys, made.values, made.filled, (one.window for one in wanted), strict=True)
    made.cache = kernels.Cache(list(given), cosines, sines, hold=False)
    for number, layer in enumerate(cache.layers):
        vars(layer).update(keys=None, values=None, held=(made, number))
    return made


def _names(layer: Any) -> tuple[str, ...]:
    return ("keys", "values", "cumulative_length") if isinstance(layer, HeldWindowLayer) else ("keys", "values")


def _let_go(layer: Any) -> None:
    """Make it an ordinary layer, with what it has."""
    if vars(layer).get("held") is not None:
        found = {name: getattr(layer, name) for name in _names(layer)}
        vars(layer).update(found, held=None)
