"""Puts inputs of matrices in the order in which an N:M pattern keeps most, where that changes nothing else.

Which channels may change places is found beforehand (`secateur.structured.free_channels`). When the stream comes to a
block, the saliency |W_ij|·a_j of its consumers is taken from the inputs that really arrive, a_j their root mean square
(|W_ij| where the method sees no data), the order is searched (`secateur.permutation`), and the tensors of the block are
put in it. The permuted block must then give what the block gave, on the probe and the weights that are there; else it
stays as it is. All that follows works on a dense block like any other, and writes it as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from secateur.checkpoint.reader import CheckpointReader
from secateur.engine.binding import Binding
from secateur.engine.blocks import Block
from secateur.engine.capture import AtBlock, AtMatrix, Lane, copied_call
from secateur.engine.stream import BlockStream
from secateur.errors import CalibrationError
from secateur.patterns import Pattern
from secateur.permutation import best_order, kept_share
from secateur.result import PrunedMatrix
from secateur.statistics import InputStatistics

TOLERANCE = 1e-4
"""Largest difference at a token, as a share of its largest number."""


@dataclass(frozen=True)
class Slices:
    """Where channels lie in one tensor: ``indices`` (sets, channels, n) along ``dim`` are those of each channel."""

    name: str
    dim: int
    indices: Tensor

    def index(self, order: Tensor, size: int) -> Tensor:
        """For each place along ``dim`` what comes there, (size,) int64.

        Args:
            order: for each place in a set the channel that comes there, (sets, channels) int64.
        """
        made = torch.arange(size)
        made[self.indices.reshape(-1)] = self.indices.gather(1, order[:, :, None].expand_as(self.indices)).reshape(-1)
        return made


@dataclass(frozen=True)
class FreeChannels:
    """Inputs of a consumer that may change places: those of one set among themselves, ``inputs`` (sets, channels, n).

    The n inputs of a channel, of all query heads that read one value, go together. ``slices`` are what else goes.
    """

    consumer: str
    inputs: Tensor
    slices: tuple[Slices, ...]
    """Of the consumer itself, of the matrices that feed it, and of their biases."""

    def order_of_inputs(self, order: Tensor, width: int) -> Tensor:
        """The order of the channels, (sets, channels), as one of all inputs of the consumer, (width,)."""
        return Slices(self.consumer, 1, self.inputs).index(order, width)

    def order_of_channels(self, order: Tensor) -> Tensor:
        """The inverse: from an order of the inputs, (width,), to (sets, channels)."""
        first = self.inputs[:, :, 0]
        number = torch.empty(len(order), dtype=torch.int64)
        number[first] = torch.arange(first.shape[1]).expand_as(first)
        return number[order[first]]

    def best(self, saliency: Tensor, pattern: Pattern) -> Tensor:
        """The order of the channels in which a pattern keeps most, (sets, channels).

        Args:
            saliency: of the consumer's weights, (in, out).
        """
        inputs = self.inputs.to(saliency.device)
        return torch.stack([best_order(saliency[one].flatten(1), pattern) for one in inputs])


def permuted(tensors: Mapping[str, Tensor], orders: Sequence[tuple[FreeChannels, Tensor]]) -> dict[str, Tensor]:
    """The tensors that are no longer the same when channels are put in another order."""
    made: dict[str, Tensor] = {}
    for free, order in orders:
        for slices in free.slices:
            tensor = made.get(slices.name, tensors[slices.name])
            index = slices.index(order, tensor.shape[slices.dim])
            made[slices.name] = tensor.index_select(slices.dim, index.to(tensor.device))
    return made


def moved_keys(
    free: Mapping[int, Sequence[FreeChannels]], matrices: Sequence[PrunedMatrix], binding: Binding,
    reader: CheckpointReader,
) -> dict[str, list[tuple[int, Tensor]]]:  # fmt: skip
    """Checkpoint key -> dimensions along which the result has another order than the source, and the order."""
    orders = {matrix.name: torch.tensor(matrix.order) for matrix in matrices if matrix.order is not None}
    made: dict[str, list[tuple[int, Tensor]]] = {}
    for one in (one for ones in free.values() for one in ones if one.consumer in orders):
        order = one.order_of_channels(orders[one.consumer])
        for slices in one.slices:
            key = binding.unit_of(slices.name).keys[0]
            index = slices.index(order, reader.info(key).shape[slices.dim])
            made.setdefault(key, []).append((slices.dim, index))
    return made


@dataclass
class Permuting(BlockStream):
    """What a pruning stream does to put inputs in another order first; its results have the order."""

    free: Mapping[int, Sequence[FreeChannels]] = field(default_factory=dict)
    """By block: what may change places, of matrices that the plan names."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._prober: Lane | None = None
        self._moved: set[str] = set()
        """Tensors of the block at hand that are in another order."""

    def _block(self, block: Block, lanes: list[Lane], prober: Lane | None) -> list[PrunedMatrix]:
        self._prober, self._moved, self.orders = prober, set(), {}
        return super()._block(block, lanes, prober)

    def _prune_block(self, block: Block, lanes: list[Lane], final: dict[str, Tensor]) -> list[PrunedMatrix]:
        kept, note = self._permute(block, lanes, final)
        matrices = super()._prune_block(block, lanes, final)
        for matrix in matrices:
            if matrix.name in kept:
                matrix.saliency_kept = kept[matrix.name]
                matrix.notes += [note] if note else []
            if matrix.name in self.orders:
                matrix.order = self.orders[matrix.name].tolist()
        return matrices

    def _permute(
        self, block: Block, lanes: Sequence[Lane], final: dict[str, Tensor]
    ) -> tuple[dict[str, list[float]], str]:
        """Put the tensors of a block in another order, if it still gives the same then.

        Returns:
            By consumer the share of the saliency that the pattern keeps, in the old order and the new, and what must be
            told.
        """
        norms = self._norms(block, lanes, final)
        specs = {matrix.name: matrix for matrix in block.matrices}
        kept: dict[str, list[float]] = {}
        chosen: list[tuple[FreeChannels, Tensor]] = []
        orders: dict[str, Tensor] = {}
        for free in self.free.get(block.index, ()):
            spec, pattern = specs[free.consumer], self.plan.targets[free.consumer].pattern
            weight = spec.slices(final[spec.name])[0].to(self.device, torch.float32)
            saliency = (weight.abs() * norms[spec.name] if spec.name in norms else weight.abs()).t().contiguous()
            same, order = torch.arange(spec.in_features), free.best(saliency, pattern)
            inputs = free.order_of_inputs(order, spec.in_features)
            kept[spec.name] = [kept_share(saliency, one, pattern) for one in (same, inputs)]
            if not torch.equal(inputs, same):
                chosen.append((free, order))
                orders[spec.name] = inputs
        if not chosen:
            return kept, ""
        made = permuted(final, chosen)
        if not self._same(block, final, {**final, **made}):
            note = "its inputs stay in their order: the block was not seen to compute the same in another"
            return {name: [before, before] for name, (before, _) in kept.items()}, note
        final.update(made)
        self.orders, self._moved = orders, set(made)
        return kept, ""

    def _norms(self, block: Block, lanes: Sequence[Lane], final: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Root mean square of the inputs of consumers, (in,), where tokens arrive and the method looks at them."""
        consumers = {free.consumer for free in self.free.get(block.index, ())}
        if not consumers or not lanes or self.method.statistics == "none":
            return {}
        widths = {matrix.name: matrix.in_features for matrix in block.matrices if matrix.name in consumers}
        seen = _Norms({name: InputStatistics(width, "norms", self.device) for name, width in widths.items()})
        self._install(block, final, self.compute_dtype)
        self._observe_dense(block, lanes, seen)
        norms = {name: statistics.column_norms() for name, statistics in seen.statistics.items()}
        return {name: norm.to(self.device) for name, norm in norms.items() if bool(norm.any())}

    def _same(self, block: Block, *choices: Mapping[str, Tensor]) -> bool:
        """Whether a block gives the same with each of these tensors, in float32 where the probe has come to."""
        prober = self._prober
        if prober is None or prober.event != AtBlock(block.index) or prober.call is None:
            return False
        module = self.model.get_submodule(block.name)
        self._restore_buffers()
        given = []
        for tensors in choices:
            self._install(block, tensors, torch.float32, frozen=True)
            given.append(outcome(module, *prober.call))
        return all(agree(given[0], other) for other in given[1:])

    def _write(self, pruned: set[str], final: dict[str, Tensor]) -> None:
        for name in sorted(self._moved - pruned):
            key = self.result_binding.unit_of(name).keys[0]
            self.sink.move(key, final[name].to(self.sink.dtype(key)))
            self._written.add(key)
        super()._write(pruned, final)


@dataclass
class _Norms:
    statistics: dict[str, InputStatistics]

    def observe(self, lane: Lane, event: AtMatrix) -> None:
        if event.name not in self.statistics:
            return
        try:
            self.statistics[event.name].update(event.input)
        except CalibrationError as error:
            raise CalibrationError(f"{error.message} at the input of {event.name}", hint=error.hint) from None


def outcome(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """All floating tensors that a block gives, or leaves in its arguments for other blocks to read."""
    args, kwargs = copied_call(args, kwargs)
    with torch.no_grad():
        output = module(*args, **kwargs)
    return list(_floating((output, args, kwargs)))


def agree(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Whether two outcomes are the same but for rounding, at every token."""
    return len(expected) == len(found) and all(map(_close, expected, found))


def _close(expected: Tensor, found: Tensor) -> bool:
    if expected.shape != found.shape:
        return False
    if not expected.numel():
        return True
    # Token by token: a few have numbers beside which nothing else would count.
    rows, others = (one.float().reshape(-1, one.shape[-1] if one.ndim else 1) for one in (expected, found))
    if not bool(torch.equal(rows.isfinite(), others.isfinite())):
        return False
    rows, others = rows.nan_to_num(0.0, 0.0, 0.0), others.nan_to_num(0.0, 0.0, 0.0)  # masks hold infinities
    scale = rows.abs().amax(dim=1).clamp_min(1e-6 * float(rows.abs().max()))
    return bool(((rows - others).abs().amax(dim=1) <= TOLERANCE * scale).all())


def _floating(value: Any) -> Iterator[Tensor]:
    """The floating tensors in the results of a block, its containers and caches."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _floating(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _floating(item)
    elif isinstance(value, Cache):
        for layer in value.layers:
            yield from _floating(vars(layer))
