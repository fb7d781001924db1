"""The loop: for each block, load its weights, let the forwards come to each matrix, solve it, write it, free it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
import transformers

from secateur.engine.activations import ActivationStore
from secateur.engine.binding import Binding, TensorReader, Unit
from secateur.engine.blocks import Block, MatrixSpec, Structure, expert_order
from secateur.engine.capture import AtBlock, AtMatrix, BlockLane, Capture, ExpertTensor, Finished, Lane
from secateur.engine.device import trim_memory
from secateur.engine.inputs import output_tensor
from secateur.engine.plan import Plan
from secateur.engine.skeleton import buffers_to, declare_dtype, drop_tensor, real_buffers, set_tensor
from secateur.engine.solver import Solver
from secateur.errors import UnsupportedModelError
from secateur.plugins import Method, sees_dense_block
from secateur.progress import Reporter
from secateur.result import PrunedMatrix

Inputs = Mapping[str, torch.Tensor]


class Observes(Protocol):
    """Looks at the inputs of matrices."""

    def observe(self, lane: Lane, event: AtMatrix) -> None: ...


class BlockSink(Protocol):
    """Where finished blocks go, and where a resumed run finds them again."""

    def done(self, index: int) -> list[PrunedMatrix] | None:
        """Results of a block that an earlier run finished, None when there are none."""

    def reader(self) -> TensorReader:
        """Reads back what was written."""

    def dtype(self, key: str) -> torch.dtype:
        """Number format in which a key is written."""

    def write(self, key: str, tensor: torch.Tensor) -> None:
        """Put one tensor in its place."""

    def copy(self, key: str) -> None:
        """Put one tensor of the source in its place as it is."""

    def move(self, key: str, tensor: torch.Tensor) -> None:
        """Put one tensor in its place that is the source's in another order."""

    def finish(self, index: int, matrices: list[PrunedMatrix]) -> None:
        """All tensors of a block are written."""


@dataclass
class StreamResult:
    """Results of all matrices in order, and the probe's answer (batch, ..., features) in float32, if there was one."""

    matrices: list[PrunedMatrix] = field(default_factory=list)
    probe: torch.Tensor | None = None


@dataclass
class BlockStream:
    """One run over a model's blocks. ``plan`` names the matrices to prune; all others stay as they are."""

    model: transformers.PreTrainedModel
    structure: Structure
    binding: Binding
    source: TensorReader
    sink: BlockSink
    method: Method
    plan: Plan
    store: ActivationStore
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    compute_dtype: torch.dtype = torch.float32
    seed: int = 0
    reporter: Reporter = field(default_factory=Reporter)
    stage: str = "pruning"
    """What the reporter is told that is going on."""

    def __post_init__(self) -> None:
        self._outside: dict[str, torch.Tensor | None] = {}
        """Loaded weights outside the blocks; of those that the class computes, what stood there before."""
        self._outside_dtype = self.compute_dtype
        self._written: set[str] = set()
        self._buffers: dict[str, torch.Tensor] = {}
        """Those that no file holds."""
        self.orders: dict[str, torch.Tensor] = {}
        """Matrix of the block at hand -> the order in which its inputs are, (in,), where it is not the source's."""
        self.result_binding = self.binding
        """Keys of the result and the tensors they make; another one where the result is another model."""

    def run(self, batches: Sequence[Inputs], probe: Inputs | None = None) -> StreamResult:
        """Prune all blocks, in the order in which the forward runs through them.

        Args:
            batches: forward arguments of the calibration data; empty when the method needs no statistics.
            probe: arguments of a short forward whose output through the pruned model is wanted.

        Raises:
            CalibrationError: when an activation is not finite.
            RunError: when a solver returns a value that is not finite.
            UnsupportedModelError: when the forward needs a weight that is not loaded at that moment.
        """
        result: dict[int, list[PrunedMatrix]] = {}
        count = len(self.structure.blocks)
        lanes = [self._lane(batch, observed=True) for batch in batches]
        prober = self._lane(probe, observed=False) if probe is not None else None
        answer: torch.Tensor | None = None
        self.reporter.stage(self.stage, count)
        try:
            with self._started(lanes):
                trim_memory()
                if prober is not None:
                    self._advance_probe(prober)
                while waiting := {
                    lane.event.index for lane in [*lanes, prober] if lane and isinstance(lane.event, AtBlock)
                }:
                    index = min(waiting)
                    here = [lane for lane in lanes if lane.event == AtBlock(index)]
                    result[index] = self._block(self.structure.blocks[index], here, prober)
                for block in self.structure.blocks:  # never reached by the forward
                    if block.index not in result:
                        result[block.index] = self._block(block, [], None)
                if prober is not None and isinstance(prober.event, Finished):
                    answer = output_tensor(prober.event.output).float().cpu()
                    prober.event = None
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error):
                raise
            raise UnsupportedModelError(
                f"{type(self.model).__name__} reads a weight without running the module that owns it",
                hint="this model cannot be streamed block by block yet",
            ) from error
        finally:
            if prober is not None:
                prober.stop()
        return StreamResult([matrix for index in range(count) for matrix in result[index]], answer)

    @contextmanager
    def _started(self, lanes: Sequence[Lane]) -> Iterator[None]:
        """Run every forward up to its first block; at the end stop them all, and let go of what they held."""
        try:
            with Capture(self.model, self.structure.blocks, self._load_outside), torch.no_grad():
                declare_dtype(self.model, self.compute_dtype)
                self._load_buffers()
                buffers_to(self.model, self.device)
                self._buffers = {n: b for n, b in real_buffers(self.model).items() if not self.binding.bound(n)}
                for lane in lanes:
                    self._advance(lane)
                self._release_outside()
                yield
        finally:
            for lane in lanes:
                lane.stop()
            self._release_outside(last=True)
            self._restore_buffers()
            self.store.close()

    @contextmanager
    def _loaded(self, block: Block) -> Iterator[dict[str, torch.Tensor]]:
        """While it lasts, a block has the weights of the source, which nothing may change."""
        names = [name for name in block.tensors if self.binding.bound(name)]
        tensors = self.binding.load(names, self.source)
        self._install(block, tensors, self.compute_dtype, frozen=True)
        try:
            yield tensors
        finally:
            for name in names:
                drop_tensor(self.model, name)
        self._release_outside()
        trim_memory()

    def _lane(self, inputs: Inputs, *, observed: bool) -> Lane:
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        if observed and self.compute_dtype != torch.float32:
            inputs = {n: v.to(self.compute_dtype) if v.is_floating_point() else v for n, v in inputs.items()}
        return Lane(self.model, inputs, observed=observed, blocks=len(self.structure.blocks))

    # --- one block -----------------------------------------------------------------------------------------------

    def _block(self, block: Block, lanes: list[Lane], prober: Lane | None) -> list[PrunedMatrix]:
        finished = self.sink.done(block.index)
        names = [name for name in block.tensors if self.binding.bound(name)]
        final = (
            self.binding.load(names, self.source) if finished is None else self._written_block(block, names, finished)
        )
        probing = prober is not None and prober.event == AtBlock(block.index)
        try:
            if finished is None:
                matrices = self._prune_block(block, lanes, final)
                self._write(self._changed(block, matrices), self._as_written(block, final))
                self.sink.finish(block.index, matrices)
            else:
                matrices = finished
                self._written.update(self.result_binding.keys_of(names))
                if lanes:
                    self._install(block, final, self.compute_dtype)
                for lane in lanes:
                    self._pass(lane)
            self._release_outside()
            if probing:
                assert prober is not None
                self._install(block, final, torch.float32, frozen=True)
                self._advance_probe(prober)
        finally:
            self._drop(block, names)
        trim_memory()
        self.reporter.advance(block.name)
        return matrices

    def _drop(self, block: Block, names: Sequence[str]) -> None:
        """Free the tensors of a block in the running model."""
        for name in names:
            drop_tensor(self.model, name)

    def _prune_block(self, block: Block, lanes: list[Lane], final: dict[str, torch.Tensor]) -> list[PrunedMatrix]:
        """Solve every targeted matrix of a block. ``final`` holds the source's tensors, afterwards what is written."""
        specs = {matrix.name: matrix for matrix in block.matrices}
        reports = {
            name: PrunedMatrix(name, spec.shape, 0, 0.0) for name, spec in specs.items() if name in self.plan.targets
        }
        if lanes:
            self._install(block, final, self.compute_dtype)
        solver = self._solver(lanes, specs, final, reports)
        if self._one_pass():
            self._observe_dense(block, lanes, solver)
            for name, expert in expert_order(block.matrices):
                solver.solve(name, expert, seen_only=True)
        for lane in lanes:
            self._advance(lane, solver)
        order = expert_order(block.matrices)
        while at := {(lane.event.name, lane.event.expert) for lane in lanes if isinstance(lane.event, AtMatrix)}:
            key = min(at, key=order.__getitem__)
            solver.solve(*key)
            for lane in lanes:
                if isinstance(lane.event, AtMatrix) and (lane.event.name, lane.event.expert) == key:
                    self._advance(lane, solver)
        for lane in lanes:
            lane.last_input = None
        solver.solve_rest()
        for name, spec in specs.items():
            if name in reports:
                zeros = int((final[name] == 0).sum())
                reports[name].zeros, reports[name].sparsity = zeros, zeros / spec.size
        return list(reports.values())

    def _solver(
        self, lanes: list[Lane], specs: Mapping[str, MatrixSpec], final: dict[str, torch.Tensor],
        reports: dict[str, PrunedMatrix],
    ) -> Solver:  # fmt: skip
        """What gathers statistics and works on the matrices of a block."""
        return Solver(self, specs, final, reports)

    def _one_pass(self) -> bool:
        """Whether some matrix is solved by what a block that is not pruned yet hands it."""
        return any(sees_dense_block(self.method, target.pattern) for target in self.plan.targets.values())

    def _observe_dense(self, block: Block, lanes: Sequence[Lane], solver: Observes) -> None:
        """A forward through the block as it is, for the statistics alone; the lanes stay where they are."""
        module = self.model.get_submodule(block.name)
        for lane in lanes:
            self.store.unpark(lane.watcher)
            look = BlockLane(module, lane)
            self.store.park(lane.watcher)
            while not isinstance(event := look.advance(), Finished):
                if isinstance(event, AtMatrix):
                    solver.observe(look, event)
            look.last_input = None

    def _written_block(self, block: Block, names: Sequence[str], done: list[PrunedMatrix]) -> dict[str, torch.Tensor]:
        """What an earlier run wrote, as the running model takes it."""
        return self.binding.load(names, self.sink.reader())

    def _as_written(self, block: Block, final: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is written of what the running model has."""
        return final

    def _changed(self, block: Block, matrices: Sequence[PrunedMatrix]) -> set[str]:
        """Tensors of a block that are written anew; the others are copied from the source."""
        return {matrix.name for matrix in matrices}

    def output_dtype(self, name: str) -> torch.dtype:
        """Number format in which a tensor of the model is written."""
        return self.sink.dtype(self.result_binding.unit_of(name).keys[0])

    def _write(self, pruned: set[str], final: dict[str, torch.Tensor]) -> None:
        units: dict[int, Unit] = {id(unit): unit for unit in map(self.result_binding.unit_of, final)}
        for unit in units.values():
            fresh = [key for key in unit.keys if key not in self._written]
            if not pruned.intersection(unit.names):
                for key in fresh:
                    self.sink.copy(key)
            else:
                for key, tensor in self.result_binding.unload(unit, {name: final[name] for name in unit.names}).items():
                    self.sink.write(key, tensor.to(self.sink.dtype(key)))
            self._written.update(unit.keys)

    # --- weights of the running model ----------------------------------------------------------------------------

    def _install(
        self, block: Block, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, *, frozen: bool = False
    ) -> None:
        experts = {matrix.name: matrix for matrix in block.matrices if matrix.experts}
        for name, tensor in tensors.items():
            placed = self._placed(name, tensor, dtype)
            if placed is tensor and not frozen:
                placed = tensor.clone()  # the running weights change while the source is still needed
            set_tensor(self.model, name, placed)
            if name in experts:
                owner, _, leaf = name.rpartition(".")
                self.model.get_submodule(owner)._parameters[leaf] = ExpertTensor.wrap(placed, experts[name])

    def _placed(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A tensor for the running model, rounded as it is written; the same memory where nothing changes."""
        if tensor.is_floating_point():
            tensor = tensor.to(self.output_dtype(name)).to(self.device, dtype)
        return tensor.to(self.device)

    def _load_buffers(self) -> None:
        """Buffers of the checkpoint that lie outside the blocks: small, so they are loaded once and stay."""
        inside = {name for block in self.structure.blocks for name in block.tensors}
        names = [name for name, _ in self.model.named_buffers() if name not in inside and self.binding.bound(name)]
        for name, tensor in self.binding.load(names, self.source).items():
            set_tensor(self.model, name, self._placed(name, tensor, torch.float32))
        if self.binding.resident:
            for name, _ in self.model.named_parameters(remove_duplicate=False):  # tied ones are two places to fill
                if name not in inside and self.binding.bound(name):
                    self._load_outside(name.rpartition(".")[0])

    def _restore_buffers(self) -> None:
        """Put back buffers that the model replaced: some cast a table of positions to the format that runs."""
        for name, buffer in self._buffers.items():
            set_tensor(self.model, name, buffer)

    def _load_outside(self, module_name: str) -> None:
        """A module outside the blocks is about to run: embedding, final norm, head."""
        module = self.model.get_submodule(module_name)
        names = [f"{module_name}.{leaf}".lstrip(".") for leaf, _ in module.named_parameters(recurse=False)]
        wanted = [name for name in names if name not in self._outside]
        for name in [name for name in wanted if not self.binding.bound(name)]:
            made = self.model.get_parameter(name)
            if not made.is_meta:  # the class computes it, no file holds it
                wanted.remove(name)
                self._outside[name] = made
                set_tensor(self.model, name, made.to(self.device, self._outside_dtype))
        loaded = self.binding.load(wanted, self.source)
        for name in wanted:
            tensor = loaded.pop(name)  # one copy at a time: these are the largest tensors of a model
            placed = self._placed(name, tensor, self._outside_dtype)
            set_tensor(self.model, name, placed)
            self._outside[name] = None

    def _release_outside(self, *, last: bool = False) -> None:
        if self.binding.resident and not last:
            return
        for name, made in self._outside.items():
            if made is None:
                drop_tensor(self.model, name)
            else:
                set_tensor(self.model, name, made.data)
        self._outside.clear()

    # --- forwards ------------------------------------------------------------------------------------------------

    def _advance(self, lane: Lane, solver: Solver | None = None) -> None:
        self.store.unpark(lane.watcher)
        event = lane.advance()
        if isinstance(event, Finished):
            lane.stop()
            self.store.forget(lane.watcher)
            return
        if isinstance(event, AtMatrix) and solver is not None:
            solver.observe(lane, event)
        self.store.park(lane.watcher)

    def _pass(self, lane: Lane) -> None:
        """Run a lane through a finished block, without looking at the matrices."""
        self._advance(lane)
        while isinstance(lane.event, AtMatrix):
            self._advance(lane)

    def _advance_probe(self, prober: Lane) -> None:
        self._outside_dtype = torch.float32
        self._restore_buffers()
        declare_dtype(self.model, torch.float32)
        prober.advance()
        self._release_outside()
        self._outside_dtype = self.compute_dtype
        declare_dtype(self.model, self.compute_dtype)
