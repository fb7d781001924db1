"""The dense model with hidden channels and heads at zero, holding the weights of a model that has them no more.

Which rows belong to which unit is not asked of the product. A tensor with fewer rows is put back by the few orders in
which rows are stored, until one makes both models answer alike; with the columns of all units that went, and everything
of the channels that went, at zero, no wrong order could.

Norms over the channels, and embeddings that multiply by their width, are run on the channels that stay: that is what a
narrower model is. The channels that went must be zero wherever such a module gets them; a norm over the numbers of all
heads gets zeros for the heads that went instead. What a class multiplies its answer by for its width is the one factor
that both may differ by.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.blocks import MatrixSpec, find_structure
from secateur.result import PruneResult
from tests.coverage.tiny import answer


class NotAtZeroError(Exception):
    """Something is left of what went."""


class NotPlacedError(Exception):
    """It is not known where a tensor's slices were."""


def answers(dense: nn.Module, small: nn.Module, result: PruneResult, inputs: dict[str, Tensor]) -> Iterator[Tensor]:
    """What the dense model answers so changed, for each order in which rows may be stored.

    Raises:
        NotAtZeroError: when a removed channel comes to a norm with another value.
        NotPlacedError: when no order fits a tensor.
    """
    places = _Places(dense, small, result)
    last = answer(small, inputs).shape[-1]
    problem: NotPlacedError | None = None
    fits = False
    for order in range(2 * _ORDERS if places.vectors else _ORDERS):
        try:
            made = {name: places.back(name, order) for name in places.before}
        except NotPlacedError as error:
            problem = problem or error
            continue
        fits = True
        dense.load_state_dict(made, strict=True)
        with _on_what_stays(dense, small, places, order):
            found = answer(dense, inputs)
        found = found[..., places.keep] if found.shape[-1] == places.width and last == len(places.keep) else found
        root = (places.width / len(places.keep)) ** 0.5
        # A class may divide its answer by its width, or by the root of it.
        for factor in (1.0, root, 1 / root, root**2, root**-2):
            yield found * factor
    if problem is not None and not fits:
        raise problem


_ORDERS = 6
"""Unit by unit; two or three parts with all units each; queries, keys, values of groups; queries, then the rest; four
parts with queries, values and keys of some units each."""


class _Places:
    """Where the slices of each tensor of the smaller model were in the dense one."""

    def __init__(self, dense: nn.Module, small: nn.Module, result: PruneResult) -> None:
        self.before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
        self.after = small.state_dict()
        if self.before.keys() != self.after.keys():
            raise NotPlacedError("the smaller model has other tensors")
        self.blocks = [block.name for block in find_structure(dense).blocks]
        self.specs: dict[str, MatrixSpec] = {spec.name: spec for spec in find_structure(dense).matrices}
        self.modules = {spec.module: spec for spec in self.specs.values()}
        self.vectors = {
            f"{path}.{leaf}" for path, module in dense.named_modules() if list(module.children())
            for leaf, tensor in module.named_parameters(recurse=False) if tensor.ndim == 1
        }  # fmt: skip
        """Of larger modules: in half of the orders they lie along units, not channels, where both fit."""
        self.keep = torch.tensor(result.channels_kept)
        self.units = {one.name: torch.tensor(one.units) for one in result.matrices if one.units is not None}
        if len(result.recipe["structure"]) > 1 and not self.units:
            raise NotAtZeroError("no units went along")
        writers = self.units or [spec.name for spec in self.specs.values() if not spec.experts]
        counts = {self.specs[name].out_features for name in writers
                  if self.specs[name].out_features != self._rows(name, self.after) == len(self.keep)}  # fmt: skip
        if len(counts) != 1:
            raise NotPlacedError("the hidden size is not one number")
        self.width = counts.pop()
        for path, module in dense.named_modules():
            if isinstance(module, nn.Embedding) and self.hidden_columns(f"{path}.weight"):
                self._check_table(f"{path}.weight")

        for name, spec in self.specs.items():
            was, now, dim = self.before[name], self.after[name], 1 if spec.transposed else 0
            changed = [a != b for a, b in zip(was.shape, now.shape, strict=True)]
            whole = (was.shape[dim], now.shape[dim]) == (self.width, len(self.keep))
            if whole and changed == [dim == 0, dim == 1] and not torch.equal(now, was.index_select(dim, self.keep)):
                raise NotAtZeroError(f"{name} only writes, and holds other numbers than before")

    def _check_table(self, name: str) -> None:
        """An embedding is what it was in the channels that stay, up to one factor."""
        was, now = self.before[name][:, self.keep].double(), self.after[name].double()
        factor = (was * now).sum() / was.square().sum().clamp_min(1e-30)
        if not factor > 0 or float((now - factor * was).abs().max()) > 1e-5 * float(now.abs().max()):
            raise NotAtZeroError(f"{name} holds other numbers than before")

    def _rows(self, name: str, state: dict[str, Tensor]) -> int:
        return state[name].shape[1 if self.specs[name].transposed else 0]

    def columns(self, name: str) -> tuple[int, int]:
        """Units of a consumer in the dense model, and columns of each."""
        dim = 0 if self.specs[name].transposed else 1
        each, rest = divmod(self.after[name].shape[dim], len(self.units[name]))
        total, other = divmod(self.before[name].shape[dim], max(each, 1))
        if rest or other or not len(self.units[name]) < total:
            raise NotPlacedError(f"{name} has other columns than {len(self.units[name])} units")
        return total, each

    def hidden(self, name: str) -> bool:
        """Whether a vector lies along the hidden channels."""
        was, now = self.before[name].shape, self.after[name].shape
        owner = name.rpartition(".")[0]
        spec = self.modules.get(owner)
        both = spec is not None and self._both(spec.name) and spec.name not in self.units
        return (*was, *now) == (self.width, len(self.keep)) and not both

    def along(self, names: list[str], order: int) -> list[Tensor]:
        """What the vectors of a norm may lie along: the channels that stay, and the numbers of the units that stay."""
        shapes = {(*self.before[name].shape, *self.after[name].shape) for name in names}
        if len(shapes) != 1 or len(shape := shapes.pop()) != 2 or shape[0] == shape[1]:
            return []
        found = [self.keep] if all(self.hidden(name) for name in names) else []
        with suppress(NotPlacedError):
            found.append(self._of_units(names[0], shape[0], shape[1], order % _ORDERS))
        return found

    def hidden_columns(self, name: str) -> bool:
        """Whether the rows of a table lie along the hidden channels."""
        return (self.before[name].shape[-1], self.after[name].shape[-1]) == (self.width, len(self.keep))

    def _both(self, name: str) -> bool:
        was, now = self.before[name].shape, self.after[name].shape
        return all(a != b for a, b in zip(was, now, strict=True))

    def back(self, name: str, order: int) -> Tensor:
        """A tensor of the smaller model in the dense one's shape, zero where something went."""
        made = self.after[name]
        for dim in range(made.ndim):
            size = self.before[name].shape[dim]
            if size == made.shape[dim]:
                continue
            index = self._index(name, dim, size, made.shape[dim], order)
            if len(index) != made.shape[dim]:
                raise NotPlacedError(f"{name}: {made.shape[dim]} of {size} along {dim}")
            grown = made.new_zeros((*made.shape[:dim], size, *made.shape[dim + 1 :]))
            made = grown.index_copy_(dim, index, made)
        return made

    def _index(self, name: str, dim: int, size: int, now: int, order: int) -> Tensor:
        spec = self.specs.get(name) or self.modules.get(name.rpartition(".")[0])
        whole = (size, now) == (self.width, len(self.keep)) and not (order >= _ORDERS and name in self.vectors)
        order %= _ORDERS
        if name in self.units:
            reads = dim == (0 if self.specs[name].transposed else 1)
            if not reads:
                return self.keep
            total, each = self.columns(name)
            return torch.arange(total * each).reshape(total, each)[self.units[name]].reshape(-1)
        if name in self.specs and self._both(name):
            if dim == (0 if self.specs[name].transposed else 1):
                return self.keep
        elif whole and (spec is None or spec.name == name or spec.name in self.units or not self._both(spec.name)):
            return self.keep
        return self._of_units(name, size, now, order)

    def _of_units(self, name: str, size: int, now: int, order: int) -> Tensor:
        """Rows of the units that stay, for the consumer that is nearest by its path; of several, the one with most."""
        block = next((one for one in self.blocks if name.startswith(f"{one}.")), "")
        best: tuple[int, int, str] | None = None
        found = torch.zeros(0)
        for consumer in (one for one in self.units if one.startswith(block)):
            total, each = self.columns(consumer)
            index = _rows_of_units(size, total, each, self.units[consumer], order)
            ours, theirs = name.split("."), consumer.split(".")
            shared = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
            if index is not None and len(index) == now and (best is None or (shared, total, consumer) > best):
                best, found = (shared, total, consumer), index
        if best is None:
            raise NotPlacedError(f"{name}: {now} of {size} are no number of units")
        return found


def _rows_of_units(size: int, total: int, each: int, stay: Tensor, order: int) -> Tensor | None:
    """The rows of units that stay: unit by unit, or in one of the usual orders where it fits; None where none does."""
    number = torch.arange(size)
    shared = (size - total * each) // 2  # keys or values of groups, where the queries come first
    if order in (1, 2) and size % ((order + 1) * total) == 0:
        return number.reshape(order + 1, total, -1)[:, stay].reshape(-1)
    if order == 3 and shared > 0 and shared % total == 0:
        parts = number.split([total * each, shared, size - total * each - shared])
        return torch.cat([part.reshape(total, -1)[stay].reshape(-1) for part in parts])
    if order == 4 and size > total * each:  # query heads, then keys and values that stay
        return torch.cat([number[: total * each].reshape(total, each)[stay].reshape(-1), number[total * each :]])
    if order == 5 and size == 3 * total * each and total % 4 == 0:
        return number.reshape(4, 3, total // 4, each).transpose(1, 2).reshape(total, -1)[stay].reshape(-1).sort().values
    if size % total == 0:
        return number.reshape(total, -1)[stay].reshape(-1)
    return None


@contextmanager
def _on_what_stays(dense: nn.Module, small: nn.Module, places: _Places, order: int) -> Iterator[None]:
    """While it lasts, norms and embeddings run as those of the smaller model, and give zero where something went."""

    def grown(made: Tensor, index: Tensor, width: int) -> Tensor:
        return made.new_zeros((*made.shape[:-1], width)).index_copy_(-1, index, made)

    def norm(whole: Any, narrow: nn.Module, path: str, width: int, indices: list[Tensor]) -> Any:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if x.shape[-1] != width:
                return whole(x, *args, **kwargs)
            for index in indices:
                gone = torch.ones(width, dtype=torch.bool)
                gone[index] = False
                if not bool((x[..., gone] != 0).any()):
                    return grown(narrow(x[..., index], *args, **kwargs), index, width)
            raise NotAtZeroError(f"channels that went are not zero at {path}")

        return forward

    def embedding(narrow: nn.Module) -> Any:
        return lambda *args, **kwargs: grown(narrow(*args, **kwargs), places.keep, places.width)

    changed = []
    for path, module in dense.named_modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        names = [f"{path}.{name}" for name in own]
        if not own or path in places.modules:
            continue
        leaf = not list(module.children()) and all(name in places.before for name in names)
        if leaf and (indices := places.along(names, order)):
            narrow, width = small.get_submodule(path), len(places.before[names[0]])
            module.forward = norm(module.forward, narrow, path, width, indices)
            changed.append(module)
        elif isinstance(module, nn.Embedding) and places.hidden_columns(names[0]):
            module.forward = embedding(small.get_submodule(path))
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward
