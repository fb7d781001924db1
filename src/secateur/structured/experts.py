"""Leaves experts out of every mixture: how many stay, the config and the checkpoint that say so, and the proof.

Mask, then remove: that a block whose router never chooses some experts and the block without them agree is tried on
random weights before anything is written. Where they do not, experts are removed evenly from equal parts: routers that
first choose groups of experts need that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.view import CheckpointView
from secateur.engine.binding import Binding
from secateur.engine.blocks import Block, Structure, find_structure
from secateur.engine.capture import copied_call
from secateur.engine.inputs import output_tensor
from secateur.engine.skeleton import set_tensor
from secateur.errors import SparsityError, UnsupportedModelError
from secateur.structured.configure import Shrunk, shapes_of
from secateur.structured.explore import Call, visit_blocks
from secateur.structured.pools import Found, Pool, find_experts
from secateur.structured.proof import TOLERANCE
from secateur.structured.routing import NEVER, WithoutExperts, difference_of_sum, read_call, watched

TOKENS = 64
"""Tokens of the proof: enough for every expert of a part to be chosen."""
NEAR = 32
"""How many numbers of experts are tried, in each direction, to name the nearest legal ones."""


@dataclass
class ExpertPlan:
    """Experts to remove from every mixture, proved on random weights."""

    experts: int
    stay: int
    parts: int
    """As many go from each of this many equal, consecutive parts."""
    pools: dict[int, Pool]
    blocks: int
    shrunk: Shrunk
    structure: Structure
    """Of the smaller model."""
    reader: CheckpointView
    """The source under the keys of the result; what stands there of experts is not yet what will."""
    binding: Binding
    """Of the smaller model and these keys."""
    shapes: dict[str, tuple[int, ...]]
    """Checkpoint key -> new shape, of tensors that hold something of every expert."""
    differences: dict[str, float] = field(default_factory=dict)
    """By block that was tried: difference between experts masked and experts removed."""

    def line(self) -> str:
        """The plan in words."""
        without = [str(index) for index in range(self.blocks) if index not in self.pools]
        evenly = f", as many from each of {self.parts} groups" if self.parts > 1 else ""
        return f"experts: {self.experts} -> {self.stay} in each of {len(self.pools)} blocks{evenly}" + (
            f"; without experts, and left as they are: blocks {', '.join(without)}" if without else ""
        )


def plan_experts(
    config: transformers.PreTrainedConfig, model: transformers.PreTrainedModel, structure: Structure, binding: Binding,
    reader: CheckpointReader, sparsity: float,
) -> ExpertPlan:  # fmt: skip
    """Decide how many experts stay, find the config for it, and prove that the others can be removed.

    Args:
        config: as it was read, unchanged.
        model: without weights, of that config.
        sparsity: share of all prunable weights that go, above 0.

    Raises:
        UnsupportedModelError: when there are no experts, or they cannot be removed.
        SparsityError: when the request comes to none or all of them, or to a number that the router cannot work with.
    """
    found = find_experts(config, model, structure)
    own = {name for pool in found.pools.values() for name in pool.names}
    total = sum(matrix.size for matrix in structure.matrices)
    each = sum(matrix.size for matrix in structure.matrices if matrix.name in own) / found.experts
    wanted = found.experts - sparsity * total / each
    if not 0.5 < wanted < found.experts - 0.5:
        raise SparsityError(
            f"{sparsity * total / each:,.1f} of {found.experts} experts cannot be removed from each block",
            hint=f"one expert of each block is {each / total:.1%} of the weights, and 1 to {found.experts - 1} can "
            "stay; choose another --sparsity",
        )
    search = _Search(config, model, found, wanted)
    visit_blocks(model, structure, binding, reader, search.visit, TOKENS)
    if search.chosen is None:
        raise UnsupportedModelError(
            f"no forward of {type(model).__name__} comes to its experts", hint="choose another --structure"
        )
    stay, parts = search.chosen
    shrunk = search.smaller(stay)
    view = _view(reader, _keys_kept(binding, found, stay, reader))
    small = Binding(shrunk.skeleton, view.keys)
    if len(small.missing) > len(binding.missing) or len(small.unbound) > len(binding.unbound):
        raise UnsupportedModelError(
            f"the checkpoint of {type(model).__name__} does not say which of its tensors belong to which expert",
            hint="choose another --structure",
        )
    cut = dict.fromkeys(cut.name for pool in found.pools.values() for cut in pool.cuts)
    return ExpertPlan(
        found.experts, stay, parts, found.pools, len(structure.blocks), shrunk, find_structure(shrunk.skeleton), view,
        small, _shapes(small, shrunk.skeleton, view, cut), search.differences,
    )  # fmt: skip


class _Search:
    """Visits blocks: at the first mixture it finds out how many experts can stay, at others it proves the same."""

    def __init__(
        self, config: transformers.PreTrainedConfig, model: transformers.PreTrainedModel, found: Found, wanted: float
    ) -> None:
        self._config, self._model, self._found = config, model, found
        self._wanted = wanted
        self._smaller: tuple[int, Shrunk] | None = None
        self.chosen: tuple[int, int] | None = None
        self.differences: dict[str, float] = {}

    def smaller(self, count: int) -> Shrunk:
        """The model with that many experts; the latest one is kept."""
        if self._smaller is None or self._smaller[0] != count:
            self._smaller = count, self._found.shrunk(self._config, count)
        return self._smaller[1]

    def visit(self, block: Block, module: nn.Module, call: Call, tensors: dict[str, Tensor]) -> None:
        pool = self._found.pools.get(block.index)
        if pool is None:
            return
        understand(block, self._model, pool, call)
        tensors = _with_mild_biases(pool, tensors)
        if self.chosen is not None:
            self.differences[block.name] = self._prove(block, pool, call, tensors, *self.chosen)
            return
        reason: UnsupportedModelError | None = None
        for count, parts in self._trials():
            try:
                difference = self._prove(block, pool, call, tensors, count, parts)
            except UnsupportedModelError as error:
                reason = reason or error
                continue
            # Another number is taken only where groups ask for it, not where too few would stay.
            if count == round(self._wanted) or not self._can(block, pool, call, tensors, count, 1):
                self.chosen, self.differences[block.name] = (count, parts), difference
                return
        assert reason is not None
        near = self._nearest(block, pool, call, tensors)
        raise (
            SparsityError(
                f"{round(self._wanted)} of {self._found.experts} experts cannot stay in each block: {reason.message}",
                hint=f"the nearest numbers that can: {', '.join(map(str, near))}; choose another --sparsity",
            )
            if near
            else reason
        )

    def _trials(self) -> Iterator[tuple[int, int]]:
        """Numbers of experts that stay, and parts from which as many go: those nearest to what is wanted."""
        for parts in self._steps():
            count = round(self._wanted / parts) * parts
            if 0 < count < self._found.experts:
                yield count, parts

    def _steps(self) -> list[int]:
        """Numbers of equal parts that a router may know: 1, and what stands in the config and divides."""
        numbers = set(_integers(self._config.to_dict()))
        return [n for n in range(1, self._found.experts) if n == 1 or (n in numbers and self._found.experts % n == 0)]

    def _nearest(self, block: Block, pool: Pool, call: Call, tensors: dict[str, Tensor]) -> list[int]:
        start, total = round(self._wanted), self._found.experts
        found = []
        for numbers in (range(start - 1, max(0, start - 1 - NEAR), -1), range(start + 1, min(total, start + 1 + NEAR))):
            for number in numbers:
                if any(self._can(block, pool, call, tensors, number, parts) for parts in self._steps()):
                    found.append(number)
                    break
        return found

    def _can(self, block: Block, pool: Pool, call: Call, tensors: dict[str, Tensor], count: int, parts: int) -> bool:
        if count % parts:
            return False
        try:
            self._prove(block, pool, call, tensors, count, parts)
        except UnsupportedModelError:
            return False
        return True

    def _prove(self, block: Block, pool: Pool, call: Call, tensors: dict[str, Tensor], count: int, parts: int) -> float:
        try:
            small = self.smaller(count).skeleton
        except Exception as error:  # a config may refuse values in any way
            raise UnsupportedModelError(
                f"{type(self._config).__name__} refuses {count} experts: {_first_line(error)}",
                hint="choose another --sparsity",
            ) from error
        return max(
            prove_experts(block, self._model, small, pool, call, tensors, kept)
            for kept in some_of_each(pool.experts, count, parts)
        )


def some_of_each(total: int, count: int, parts: int) -> Iterator[Tensor]:
    """``count`` of ``total`` numbers, as many of each part: the last ones, which is as uneven as can be, and any."""
    numbers, each = torch.arange(total).reshape(parts, -1), count // parts
    yield numbers[:, -each:].reshape(-1)
    random = torch.rand(numbers.shape, generator=torch.Generator().manual_seed(0)).argsort(dim=1)[:, :each]
    yield numbers.gather(1, random.sort(dim=1).values).reshape(-1)


def understand(block: Block, model: nn.Module, pool: Pool, call: Call) -> None:
    """Check that the calls of the experts are understood, with the block's weights in place.

    Raises:
        UnsupportedModelError: when it is not known what one expert adds.
    """
    args, kwargs = copied_call(*call)
    differences: list[float | None] = []
    module = model.get_submodule(pool.module)

    def see(given: tuple[Any, ...], named: dict[str, Any]) -> None:
        read = read_call(module, given, named, pool.experts)
        differences.append(None if read is None else difference_of_sum(read, pool.experts))

    handle = watched(module, see)
    try:
        with torch.no_grad():
            model.get_submodule(block.name)(*args, **kwargs)
    finally:
        handle.remove()
    wrong = [value for value in differences if value is None or not value <= TOLERANCE]
    if not differences or wrong:
        how = "is not called" if not differences else "is called in an unknown way"
        if wrong and wrong[0] is not None:
            how = f"gives something else than the sum of what its experts add, by {wrong[0]:.2g}"
        raise UnsupportedModelError(
            f"{pool.module} {how}", hint="experts of this model cannot be removed yet; choose another --structure"
        )


def prove_experts(
    block: Block, whole: nn.Module, small: nn.Module, pool: Pool, call: Call, tensors: Mapping[str, Tensor],
    kept: Tensor,
) -> float:  # fmt: skip
    """Run a block whose router never chooses some experts, and the block without them, on the same input.

    Args:
        whole, small: the models that hold the block, with the old and the new number of experts.
        call: positional and keyword arguments of the block's forward.
        tensors: the block's, by full name.
        kept: numbers of the experts that stay, ascending.

    Returns:
        The largest difference as a share of the largest output.

    Raises:
        UnsupportedModelError: when the smaller block cannot be run, or computes something else.
    """
    args, kwargs = copied_call(*call)
    gone = torch.ones(pool.experts, dtype=torch.bool)
    gone[kept] = False
    numbers = gone.nonzero().squeeze(1)
    masked = {name: tensors[name] for name in pool.routers if name in tensors}
    for cut in pool.cuts:
        if cut.name in masked and _is_bias(masked[cut.name]):
            masked[cut.name] = masked[cut.name].index_fill(cut.dim, numbers, NEVER)
    for name, tensor in {**tensors, **masked}.items():
        set_tensor(whole, name, tensor)
    routers = [tensor for tensor in masked.values() if not _is_bias(tensor)]
    made = dict(tensors)
    pool.cut(made, kept)
    for name, tensor in made.items():
        set_tensor(small, name, tensor)
    try:
        with torch.no_grad():
            with WithoutExperts(routers, numbers):
                expected = output_tensor(whole.get_submodule(block.name)(*args, **kwargs)).float()
            args, kwargs = copied_call(*call)
            found = output_tensor(small.get_submodule(block.name)(*args, **kwargs)).float()
    except (RuntimeError, ValueError, IndexError) as error:
        raise UnsupportedModelError(
            f"{block.name} cannot be run with {len(kept)} of {pool.experts} experts: {_first_line(error)}",
            hint="choose another --sparsity or --structure",
        ) from error
    finally:
        for name, tensor in tensors.items():
            set_tensor(whole, name, tensor)
        for name in made:
            set_tensor(small, name, torch.empty_like(made[name], device="meta"))
    difference = float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not difference <= TOLERANCE:
        raise UnsupportedModelError(
            f"{block.name} computes something else without some experts than when its router never chooses them, by "
            f"{difference:.2g}",
            hint="the experts hang together there; choose another --structure",
        )
    return difference


def _is_bias(tensor: Tensor) -> bool:
    """Whether it is one number for each expert, added to logits or scores."""
    return tensor.is_floating_point() and tensor.numel() == max(tensor.shape)


def _with_mild_biases(pool: Pool, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with nearly equal biases of the router: what is random in them must not decide alone."""
    mild = {name: tensors[name] for name in pool.routers if name in tensors and _is_bias(tensors[name])}
    return {**tensors, **{name: tensor.mean() + 0.1 * (tensor - tensor.mean()) for name, tensor in mild.items()}}


def _keys_kept(binding: Binding, found: Found, stay: int, reader: CheckpointReader) -> list[str]:
    """Keys of the source that the result has too: those of one expert stand for those of the first that stay."""
    gone: set[str] = set()
    for pool in found.pools.values():
        for names in pool.listed[stay:]:
            gone.update(binding.keys_of(names))
        for cut in pool.cuts:
            if not binding.bound(cut.name):
                continue
            unit = binding.unit_of(cut.name)
            for pattern in set(unit.patterns) if unit.converter is not None else ():
                keys = [key for key, own in zip(unit.keys, unit.patterns, strict=True) if own == pattern]
                if len(keys) == found.experts:  # in the order of their numbers
                    gone.update(keys[stay:])
    return [key for key in reader.keys if key not in gone]


def _view(reader: CheckpointReader, keys: Sequence[str]) -> CheckpointView:
    origin = reader.origin if isinstance(reader, CheckpointView) else {}
    return CheckpointView(reader.folder, {key: origin.get(key, key) for key in keys})


def _shapes(
    binding: Binding, skeleton: transformers.PreTrainedModel, reader: CheckpointReader, names: Iterable[str]
) -> dict[str, tuple[int, ...]]:
    """Keys, of the tensors with these names, whose shape is not that of the source any more."""
    made: dict[str, tuple[int, ...]] = {}
    state = shapes_of(skeleton)
    units = {id(unit): unit for unit in map(binding.unit_of, filter(binding.bound, names))}
    for unit in units.values():
        empty = {name: torch.empty(state[name], device="meta") for name in unit.names}
        for key, tensor in binding.unload(unit, empty).items():
            if tuple(tensor.shape) != reader.info(key).shape:
                made[key] = tuple(tensor.shape)
    return made


def _integers(data: Mapping[str, Any]) -> Iterator[int]:
    for entry in data.values():
        if type(entry) is int:
            yield entry
        elif isinstance(entry, Mapping):
            yield from _integers(entry)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
