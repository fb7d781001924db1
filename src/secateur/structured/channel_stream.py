"""The loop of hidden-channel removal: dense and pruned forwards side by side, readers refitted group by group.

The pruned forwards run through the smaller model. At each group of readers the input Z~ that arrives there is compared
with the dense model's Z at the same place: T minimises |Z~ T - Z|^2, and every reader W becomes W T^T, the best matrix
for what really arrives to give what the dense one gave. A bias takes in the constant part. Writers lose rows. Where
the head shares its tensor with the embedding only the weight of the norm before it can be refitted: the factors s of
its channels minimise |(Z~ ∘ s) E~^T - Z E^T|^2, outputs taken from their mean over the vocabulary, which no
probability depends on.

Where heads or neurons go along, what reads them is refitted in the same way: Z~ is then narrower by their columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor

from secateur.engine.binding import Binding, Unit
from secateur.engine.blocks import Block, Structure
from secateur.engine.capture import AtBlock, AtMatrix, Capture, Lane
from secateur.engine.forward import NoSink, Source
from secateur.engine.skeleton import buffers_to, declare_dtype, drop_tensor
from secateur.engine.stream import BlockStream, Inputs, StreamResult
from secateur.errors import CalibrationError, RunError
from secateur.least_squares import Quadratic, quadratic
from secateur.plugins import make_method
from secateur.result import PrunedMatrix
from secateur.statistics import InputStatistics
from secateur.structured.channels import Channels, CutBinding, Group, Reader
from secateur.structured.points import PointLane, Points


@dataclass
class Whole:
    """The model before the cut."""

    model: transformers.PreTrainedModel
    structure: Structure
    binding: Binding
    source: Source


class _Dense(BlockStream):
    """The dense forwards: each stands where its pruned twin stands."""

    def lane(self, inputs: Inputs) -> Lane:
        """A forward that pauses at blocks and at points."""
        return _point_lane(self, inputs)

    def enter(self, block: Block, lanes: Sequence[Lane]) -> dict[str, Tensor]:
        """Load a block for the forwards that stand before it; its tensors."""
        for lane in lanes:
            if lane.event is None:  # from the start of the model to its first block
                self._advance(lane)
        self._release_outside()
        names = [name for name in block.tensors if self.binding.bound(name)]
        tensors = self.binding.load(names, self.source)
        if any(lane.event == AtBlock(block.index) for lane in lanes):
            self._install(block, tensors, self.compute_dtype, frozen=True)
        return tensors

    def leave(self, block: Block) -> None:
        """Free what `enter` has loaded."""
        for name in block.tensors:
            if self.binding.bound(name):
                drop_tensor(self.model, name)
        self._release_outside()


@dataclass(kw_only=True)
class ChannelStream(BlockStream):
    """A stream through the smaller model. ``binding`` is a `CutBinding`, ``source`` the dense checkpoint."""

    channels: Channels
    whole: Whole
    keep: Tensor
    units: Mapping[str, Tensor] = field(default_factory=dict)
    """Consumer -> units that stay, where some go along."""
    update: bool = True
    damping: float = 0.01

    def run(self, batches: Sequence[Inputs], probe: Inputs | None = None) -> StreamResult:
        """As `BlockStream.run`; what lies outside the blocks is written as well."""
        self._twins: dict[Lane, Lane] = {}
        self._lanes: list[Lane] = []
        self._head_done = False
        whole = self.whole
        self._dense = _Dense(
            whole.model, whole.structure, whole.binding, whole.source, NoSink(whole.source), make_method("magnitude"),
            self.plan, self.store, self.device, self.compute_dtype,
        )  # fmt: skip
        paths = [group.module for groups in self.channels.groups.values() for group in groups]
        last = [self.channels.head.module] if self.channels.head is not None else []
        with Points(self.model, paths, last), Points(whole.model, paths, last):
            if not self.update:
                result = super().run([], probe)
            else:
                with Capture(whole.model, whole.structure.blocks, self._dense._load_outside):
                    declare_dtype(whole.model, self.compute_dtype)
                    self._dense._load_buffers()
                    buffers_to(whole.model, self.device)
                    try:
                        result = super().run(batches, probe)
                    finally:
                        for twin in self._twins.values():
                            twin.stop()
                        self._dense._release_outside()
        self._write_outside()
        return result

    @property
    def _cut_binding(self) -> CutBinding:
        assert isinstance(self.binding, CutBinding)
        return self.binding

    def _lane(self, inputs: Inputs, *, observed: bool) -> Lane:
        if not observed:
            return super()._lane(inputs, observed=False)
        lane = _point_lane(self, inputs)
        self._twins[lane] = self._dense.lane(inputs)
        return lane

    # --- one block -----------------------------------------------------------------------------------------------

    def _block(self, block: Block, lanes: list[Lane], prober: Lane | None) -> list[PrunedMatrix]:
        self._lanes = lanes
        dense = self.whole.structure.blocks[block.index]
        self._whole_tensors: dict[str, Tensor] = {}
        if lanes:
            self._whole_tensors = self._dense.enter(dense, [self._twins[lane] for lane in lanes])
        try:
            matrices = super()._block(block, lanes, prober)
        finally:
            self._whole_tensors = {}
            if lanes:
                self._dense.leave(dense)
        self._solve_head()
        return matrices

    def _prune_block(self, block: Block, lanes: list[Lane], final: dict[str, Tensor]) -> list[PrunedMatrix]:
        groups = {group.module: group for group in self.channels.groups.get(block.index, ())}
        notes: dict[str, list[str]] = {}
        if lanes:
            self._install(block, final, self.compute_dtype)
        for lane in lanes:
            self._both(lane)
        while at := {
            lane.event.name for lane in lanes if isinstance(lane.event, AtMatrix) and lane.event.name in groups
        }:
            group = next(group for path, group in groups.items() if path in at)
            here = [lane for lane in lanes if _place(lane) == group.module]
            fit = self._fit(here, group)
            for reader in group.readers:
                if fit is None:
                    notes[reader.name] = ["not refitted: other tokens come to it than in the dense model"]
                    continue
                made = self._refit(reader, fit, self._whole_tensors)
                final.update(made)
                self._renew(made)
                notes[reader.name] = fit.notes
            for lane in here:
                self._both(lane)
        reports = []
        for matrix in block.matrices:
            zeros = int((final[matrix.name] == 0).sum())
            notes_here = list(notes.get(matrix.name, ()))
            stayed = self.units[matrix.name].tolist() if matrix.name in self.units else None
            reports.append(
                PrunedMatrix(matrix.name, matrix.shape, zeros, zeros / matrix.size, None, notes_here, stayed)
            )
        return reports

    def _renew(self, tensors: Mapping[str, Tensor]) -> None:
        """Change tensors of a running block, in the number format that its class has brought them to by now."""
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            running = self.model.get_submodule(owner)._parameters[leaf]
            assert running is not None
            with torch._C.DisableTorchFunction():  # stacked experts are a tensor of their own kind
                running.data.copy_(self._placed(name, tensor, self.compute_dtype))

    def _both(self, lane: Lane) -> None:
        """Let a forward and its dense twin go on to the next point or block."""
        twin = self._twins[lane]
        self._advance(lane)
        self._dense._advance(twin)
        if _place(lane) != _place(twin):
            raise RunError(f"the pruned forward is at {_place(lane)}, the dense one at {_place(twin)}")

    def _pass(self, lane: Lane) -> None:
        self._both(lane)
        while isinstance(lane.event, AtMatrix) and not self._at_head(lane):
            self._both(lane)

    def _written_block(self, block: Block, names: Sequence[str], done: list[PrunedMatrix]) -> dict[str, Tensor]:
        return self._cut_binding.load_written(names, self.sink.reader())

    def _changed(self, block: Block, matrices: Sequence[PrunedMatrix]) -> set[str]:
        groups = self.channels.groups.get(block.index, ()) if self.update else ()
        biases = {one.bias for group in groups for one in group.readers if one.bias is not None}
        return biases.union(self.channels.cuts, self.channels.unit_cuts()).intersection(block.tensors)

    # --- least squares -------------------------------------------------------------------------------------------

    def _fit(self, lanes: Sequence[Lane], group: Group) -> _Fit | None:
        """T and the constant part for the inputs with which forwards have arrived.

        None where dense and pruned forward brought different numbers of tokens: a router sent them here.
        """
        keep, before = self._stays(group)
        width = len(keep)
        seen = InputStatistics(width + 1, "gram", device=self.device)
        cross = torch.zeros(width + 1, before, device=self.device)
        for lane in lanes:
            rows, wanted = (self._rows(one) for one in (lane, self._twins[lane]))
            if len(rows) != len(wanted):
                return None
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
            try:
                seen.update(rows)
            except CalibrationError as error:
                raise CalibrationError(f"{error.message} at the input of {group.module}", hint=error.hint) from None
            cross.addmm_(rows.t(), wanted)
        gram = seen.gram
        assert gram is not None
        start = torch.zeros(before, width + 1, device=self.device)
        start[keep.to(self.device), torch.arange(width, device=self.device)] = 1
        return _Fit(gram, cross, start, self.damping)

    def _stays(self, group: Group) -> tuple[Tensor, int]:
        """The inputs of a group that stay, and how many there are in the dense model."""
        if group.job is None:
            return self.keep, self.channels.before
        coupling = group.job.coupling
        size = coupling.columns.numel()
        return coupling.cuts[0].keep(self.units[coupling.consumer], size), size

    def _rows(self, lane: Lane) -> Tensor:
        self.store.unpark(lane.watcher)
        assert isinstance(lane.event, AtMatrix)
        with torch._C.DisableTorchFunction():
            states = lane.event.input.detach()
            rows = states.reshape(-1, states.shape[-1]).to(self.device, torch.float32)
            rows = rows.clone() if rows.data_ptr() == states.data_ptr() else rows
        self.store.park(lane.watcher)
        return rows

    def _refit(self, reader: Reader, fit: _Fit, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A reader for the channels that stay, and its bias."""
        matrix, constant = fit.solution(with_bias=reader.bias is not None)
        weight = dense[reader.name].to(self.device, torch.float32).movedim(reader.dim, -1)
        made = (weight @ matrix.t()).movedim(-1, reader.dim)
        result = {reader.name: self._rounded(reader.name, self._narrower(reader.name, made, but=reader.dim))}
        if reader.bias is not None:
            bias = dense[reader.bias].to(self.device, torch.float32) + weight @ constant
            result[reader.bias] = self._rounded(reader.bias, self._narrower(reader.bias, bias))
        return result

    def _narrower(self, name: str, made: Tensor, *, but: int | None = None) -> Tensor:
        """A tensor cut along everything that goes, but for one dimension."""
        for dim in self.channels.cuts.get(name, ()):
            if dim != but:
                made = made.index_select(dim, self.keep.to(self.device))
        return self._cut_binding.without_units(name, made, but=but)

    def _rounded(self, name: str, made: Tensor) -> Tensor:
        rounded = made.to(self.output_dtype(name)).cpu().contiguous()
        if not torch.isfinite(rounded).all():
            raise RunError(f"{name} does not fit {rounded.dtype} any more", hint="use --dtype bfloat16 or float32")
        return rounded

    # --- outside the blocks --------------------------------------------------------------------------------------

    def _at_head(self, lane: Lane) -> bool:
        return self.channels.head is not None and _place(lane) == self.channels.head.module

    def _advance_probe(self, prober: Lane) -> None:
        self._solve_head()
        super()._advance_probe(prober)

    def _solve_head(self) -> None:
        """Once all forwards have come to the head: refit it, or the norm before it, and end them."""
        here = [lane for lane in self._lanes if self._at_head(lane)]
        if not here or self._head_done or self.channels.head is None:
            return
        head, whole = self.channels.head, self.whole
        fit = self._fit(here, head)
        assert fit is not None  # no router is before the head
        for reader in head.readers:
            names = [reader.name] if reader.bias is None else [reader.name, reader.bias]
            self._cut_binding.solved.update(self._refit(reader, fit, whole.binding.load(names, whole.source)))
        inside = any(self.channels.final in block.tensors for block in self.structure.blocks)
        if not head.readers and self.channels.final is not None and not inside:  # a block is written by now
            self._refit_norm(head, self.channels.final, fit)
        for lane in here:
            for one in (lane, self._twins[lane]):
                one.stop()
                self.store.forget(one.watcher)
        self._head_done = True

    def _refit_norm(self, head: Group, final: str, fit: _Fit) -> None:
        name = f"{head.module}.weight"
        weight = self.whole.binding.load([name], self.whole.source)[name]
        mean = weight.float().mean(dim=0).to(self.device)
        squares = torch.zeros(len(self.keep), weight.shape[1], device=self.device)
        keep = self.keep.to(self.device)
        for part in weight.split(8192):
            rows = part.to(self.device, torch.float32) - mean
            squares.addmm_(rows[:, keep].t(), rows)
        scale = self.channels.embeddings.get(self._cut_binding.own_name(name), 1.0)
        gram = squares[:, keep] * fit.gram[:-1, :-1] * scale**2
        cross = (squares * fit.cross[:-1]).sum(dim=1, keepdim=True) * scale
        ones = torch.ones(1, len(self.keep), device=self.device)
        solved = quadratic(gram, cross, ones, self.damping).best(torch.arange(len(self.keep), device=self.device))[:, 0]
        gain = self.channels.gains[final]
        for part, offset in ((final, gain.offset), (gain.bias, 0.0)):
            if part is not None:
                now = self.binding.load([part], self.source)[part].to(self.device, torch.float32)
                self._cut_binding.solved[part] = self._rounded(part, (now + offset) * solved - offset)

    def _write_outside(self) -> None:
        """Cut tensors that belong to no block."""
        inside = {name for block in self.structure.blocks for name in block.tensors}
        changed = {*self.channels.cuts, *self.channels.unit_cuts(), *self._cut_binding.solved}
        units: dict[int, Unit] = {id(unit): unit for unit in self.binding.units}
        for unit in units.values():
            if changed.intersection(unit.names) and not inside.intersection(unit.names):
                tensors = self.binding.load(unit.names, self.source)
                for key, tensor in self.binding.unload(unit, tensors).items():
                    self.sink.write(key, tensor.to(self.sink.dtype(key)))


class _Fit:
    """Statistics of one place, with a column of ones behind the inputs, and what is solved from them."""

    def __init__(self, gram: Tensor, cross: Tensor, start: Tensor, damping: float) -> None:
        self.gram, self.cross = gram, cross
        self._start, self._damping = start, damping
        self._solved: dict[bool, tuple[Tensor, Tensor]] = {}
        self.notes: list[str] = []

    def solution(self, *, with_bias: bool) -> tuple[Tensor, Tensor]:
        """T^T's transpose (kept, channels) and the constant part (channels,), which is zero without a bias."""
        if with_bias not in self._solved:
            count = len(self.gram) - (not with_bias)
            problem = _equal_scale(self.gram[:count, :count], self.cross[:count], self._start[:, :count], self._damping)
            self.notes += [note for note in problem[0].notes if note not in self.notes]
            made = (problem[0].best(torch.arange(count, device=self.gram.device)) / problem[1][:, None]).float()
            width = len(self.gram) - 1
            self._solved[with_bias] = made[:width], made[width] if with_bias else torch.zeros_like(made[0])
        return self._solved[with_bias]


def _equal_scale(gram: Tensor, cross: Tensor, start: Tensor, damping: float) -> tuple[Quadratic, Tensor]:
    """The least-squares problem with every input brought to the same size, so that damping is fair; and the sizes."""
    size = gram.diagonal().double().clamp_min(0).sqrt().clamp_min(1e-12)
    size = torch.where(size > 1e-9 * size.max(), size, size.max().clamp_min(1e-12))
    scaled = quadratic((gram.double() / size / size[:, None]), cross.double() / size[:, None], start * size, damping)
    return scaled, size


def _point_lane(stream: BlockStream, inputs: Inputs) -> PointLane:
    placed = {name: value.to(stream.device) for name, value in inputs.items()}
    if stream.compute_dtype != torch.float32:
        placed = {n: v.to(stream.compute_dtype) if v.is_floating_point() else v for n, v in placed.items()}
    return PointLane(stream.model, placed, observed=False, blocks=len(stream.structure.blocks))


def _place(lane: Lane) -> str:
    event = lane.event
    if isinstance(event, AtBlock):
        return f"block {event.index}"
    return event.name if isinstance(event, AtMatrix) else "the end"
