"""Matrices that get the very same input, such as those of query, key and value: one call of the kernels for all.

The activations are then rounded once, and threads are woken once. Which matrices these are is seen in the running
model, not told by names: of packed modules side by side in one module and with as many columns, those that get the
same tensor at the first token are a group from then on. The first of a group that is called computes the products of
all; the others find theirs ready, as long as they get that tensor. The numbers are those of single calls, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from secateur.runtime import ops

if TYPE_CHECKING:
    from secateur.runtime.modules import SparseLinear

_MISSES = 3
"""How often in a row products may be computed for nobody before a group is given up."""


class Siblings:
    """Packed modules side by side; which of them are a group is found out at the first token.

    While they are watched, the input is compared with what it was when the first of them got it: code that changes it
    in between, in place, does so every time. Later that is seen where PyTorch counts changes, which it does not do in
    inference mode.
    """

    def __init__(self, members: Sequence[SparseLinear]) -> None:
        self.members = list(members)
        self._groups: dict[int, tuple[int, ...]] = {}
        """Place of a member -> places of its group; an empty one where it stays alone."""
        self._watched: tuple[Tensor, Tensor, list[int]] | None = None
        """An input, what it was, and who got it."""
        self._ready: tuple[Tensor, int | None, dict[int, Tensor]] | None = None
        """An input, its version, and the products with it that nobody has asked for yet, by place."""
        self._misses = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_watched": None, "_ready": None}

    def product(self, place: int, inputs: Tensor) -> Tensor | None:
        """The product of a member, or None: it computes by itself.

        Args:
            inputs: (..., columns), what the kernels take.
        """
        ready = self._ready
        if ready is not None and ready[0] is inputs and ready[1] == _version(inputs):
            found = ready[2].pop(place, None)
            if not ready[2]:
                self._ready = None
            if found is not None:
                return found
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or type(inputs) is not Tensor:
            return None  # what is traced must not depend on what was computed before
        group = self._groups.get(place)
        if group is None:
            self._watch(place, inputs)
            return None
        return self._together(place, group, inputs) if group else None

    def _together(self, place: int, group: tuple[int, ...], inputs: Tensor) -> Tensor | None:
        self._misses = self._misses + 1 if self._ready is not None else 0
        if self._misses > _MISSES:
            self._groups = dict.fromkeys(range(len(self.members)), ())
            self._ready = None
            return None
        outputs = dict(zip(group, ops.linear_many([self.members[one] for one in group], inputs), strict=True))
        own = outputs.pop(place)
        self._ready = inputs, _version(inputs), outputs
        return own

    def _watch(self, place: int, inputs: Tensor) -> None:
        seen = self._watched
        if seen is not None and seen[0] is inputs and place not in seen[2]:
            if torch.equal(inputs, seen[1]):
                seen[2].append(place)
            return
        if seen is not None:
            group = tuple(seen[2][: ops.MOST_TOGETHER])
            self._groups |= dict.fromkeys(seen[2], ()) | dict.fromkeys(group, group if len(group) > 1 else ())
        self._watched = None if place in self._groups else (inputs, inputs.clone(), [place])


def introduce(model: nn.Module) -> None:
    """Make siblings of the packed modules of a model that lie side by side, where kernels compute them."""
    from secateur.runtime.modules import SparseLinear

    for parent in model.modules():
        by_columns: dict[int, list[SparseLinear]] = {}
        for child in parent.children():
            if isinstance(child, SparseLinear) and child.activations is not None:
                by_columns.setdefault(child.entry.columns, []).append(child)
        for members in by_columns.values():
            siblings = Siblings(members) if len(members) > 1 else None
            for place, member in enumerate(members):
                member.siblings, member.place = siblings, place


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
