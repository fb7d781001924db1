"""A stream that prunes a block and then trains what is left of it, until the block gives what the dense one gives.

When the matrices of a block (or of its first half, then of the other) are pruned, the weights that stay, with norms and
biases, take a few passes of Adam over the calibration batches: from the inputs that really arrive, the output of the
block shall be the dense model's. Every sixteenth batch is held out, and the state with the least error there stays, be
it the one before the training. Zeros stay zero, and no graph spans more than one block.

Source: EBFT (Guo et al. 2024, arXiv 2402.12419), with three differences: targets come from dense inputs rather than
from the pruned ones, so errors of earlier blocks are made good; the error is relative for each token; norms and biases
learn as well. Halves one after the other: arXiv 2510.14444, whose authors aim at the output of each half; here both aim
at that of the block, which needs no knowledge of where a model adds up its residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from secateur.engine.block_training import BlockTraining, Diverged, TrainingStream
from secateur.engine.blocks import Block
from secateur.engine.capture import BlockLane, Finished, Lane
from secateur.engine.correct import CorrectingStream, DenseInputs
from secateur.engine.paired import Kept, Spilled
from secateur.engine.plan import Plan
from secateur.engine.solver import Solver
from secateur.errors import UsageError
from secateur.methods._common import is_identity
from secateur.result import PrunedMatrix

HELD_OUT = 16
"""One of so many calibration batches is held out; of fewer, the last."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How what is left of a block is trained."""

    passes: int = 1
    """Passes over the calibration batches; after each the block is looked at on those held out."""
    learning_rate: float = 5e-4
    """Of Adam, at its height: it rises over a tenth of the steps and falls to zero."""
    batch: int = 1
    """Calibration batches in a step. A batch is one window, or as many short ones as have 1,024 tokens together."""

    def __post_init__(self) -> None:
        for name, value, least in (("passes", self.passes, 0), ("batch", self.batch, 1)):
            if value < least:
                raise UsageError(f"{name} of --reconstruct is {value}", hint=f"it must be at least {least}")
        if not 0 < self.learning_rate < 1:
            raise UsageError(
                f"learning_rate of --reconstruct is {self.learning_rate:g}", hint="it must be in (0, 1); 5e-4 is usual"
            )


@dataclass(frozen=True)
class Part:
    """What is pruned and then trained in one go."""

    matrices: tuple[str, ...]
    """Those that are pruned."""
    learning: tuple[str, ...]
    """Names of all tensors that learn, norms and biases among them."""


@dataclass
class Reconstructing(TrainingStream[Kept]):
    """What a pruning stream does to reconstruct its blocks."""

    reconstruction: Reconstruction = field(default_factory=Reconstruction)
    halves: bool = False
    """Whether the first half of a block is trained before the other is pruned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._learned: set[str] = set()
        """Tensors of the block at hand that are no longer those of the source."""

    def _prune_block(self, block: Block, lanes: list[Lane], final: dict[str, torch.Tensor]) -> list[PrunedMatrix]:
        self._learned = set()
        parts = self._parts(block, final)
        if not lanes or not parts:
            return super()._prune_block(block, lanes, final)
        reports: dict[str, PrunedMatrix] = {}
        for part in parts:
            with self._only(block, part):
                made = {matrix.name: matrix for matrix in self._walked(block, lanes, final)}
            if part.learning and self.reconstruction.passes:
                self._reconstruct(block, lanes, final, part, made)
            reports |= made
        self._install(block, final, self.compute_dtype)
        for lane in lanes:
            self._pass(lane)
        return [reports[matrix.name] for matrix in block.matrices if matrix.name in reports]

    def _changed(self, block: Block, matrices: Sequence[PrunedMatrix]) -> set[str]:
        return super()._changed(block, matrices) | self._learned

    def _parts(self, block: Block, final: Mapping[str, torch.Tensor]) -> list[Part]:
        """The block in one part or two; none when nothing in it is pruned."""
        names = [matrix.name for matrix in block.matrices if matrix.name in self.plan.targets]
        pruned = {name for name in names if _is_pruned(self.plan, block, name)}
        if not pruned:
            return []
        vectors = self._vectors(block, final)
        later = second_half(block) if self.halves else ()
        parts = []
        for second in (False, True):
            matrices = tuple(name for name in names if name.startswith(later) == second)
            learning = [name for name in matrices if name in pruned]
            if learning:
                learning += [name for name in vectors if name.startswith(later) == second]
            if matrices:
                parts.append(Part(matrices, tuple(learning)))
        return parts

    def _vectors(self, block: Block, final: Mapping[str, torch.Tensor]) -> list[str]:
        """Names of the norms and biases of a block."""
        module = self.model.get_submodule(block.name)
        buffers = {f"{block.name}.{name}" for name, _ in module.named_buffers()}
        return [n for n, t in final.items() if t.ndim < 2 and t.is_floating_point() and n not in buffers]

    @contextmanager
    def _only(self, block: Block, part: Part) -> Iterator[None]:
        """While it lasts, nothing but a part of the block is pruned."""
        whole = self.plan
        self.plan = replace(whole, targets={name: whole.targets[name] for name in part.matrices})
        try:
            yield
        finally:
            self.plan = whole

    # --- pruning, while the forwards wait at the entry of the block -----------------------------------------------

    def _walked(self, block: Block, lanes: Sequence[Lane], final: dict[str, torch.Tensor]) -> list[PrunedMatrix]:
        """Prune what the plan names by forwards of their own through the block, which end with the last matrix."""
        module = self.model.get_submodule(block.name)
        walkers: list[Lane] = []
        try:
            for lane in lanes:
                self.store.unpark(lane.watcher)
                walkers.append(BlockLane(module, lane))
                self.store.park(lane.watcher)
                self._advance(walkers[-1])
            return super()._prune_block(block, walkers, final)
        finally:
            for walker in walkers:
                walker.stop()
                self.store.forget(walker.watcher)

    def _advance(self, lane: Lane, solver: Solver | None = None) -> None:
        if isinstance(lane, BlockLane) and solver is not None and solver.finished:
            lane.stop()
            lane.event = Finished()
            self.store.forget(lane.watcher)
            return
        super()._advance(lane, solver)

    # --- training -------------------------------------------------------------------------------------------------

    def _reconstruct(
        self, block: Block, lanes: Sequence[Lane], final: dict[str, torch.Tensor], part: Part,
        reports: Mapping[str, PrunedMatrix],
    ) -> None:  # fmt: skip
        """Train a part, and put in ``final`` what does best on the batches that are held out."""
        options = self.reconstruction
        held = held_out(len(lanes))
        chosen = [index for index in range(len(lanes)) if index not in held]
        pruned = {name: final[name] == 0 for name in part.learning if name in reports}
        self._masters(final)
        before = least = self._held_out_error(block, lanes, held)
        best: dict[str, torch.Tensor] = {}

        def look() -> None:
            nonlocal least, best
            made = self._made(part.learning)
            with self._in_place(made):
                error = self._held_out_error(block, lanes, held)
            if error < least:
                least, best = error, made

        training = BlockTraining(options.passes, options.learning_rate, options.batch)
        note = ""
        try:
            self._fit(block, lanes, part.learning, pruned, training, chosen, after_epoch=look)
        except Diverged:
            note = "the reconstruction of its block went astray: a smaller learning_rate may help"
        final.update(best)
        self._learned |= set(best)
        written = self._as_written(block, final)
        for name in pruned:
            report = reports[name]
            report.zeros = int((written[name] == 0).sum())
            report.sparsity = report.zeros / written[name].numel()
            report.held_out_error = [before, least]
            report.notes += [note] if note else []

    @contextmanager
    def _in_place(self, made: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """For a while, the block has what would be written of it: a narrower number format rounds."""
        narrow = {n: self.model.get_parameter(n) for n, tensor in made.items() if tensor.dtype != torch.float32}
        kept = {name: parameter.detach().clone() for name, parameter in narrow.items()}
        for name, parameter in narrow.items():
            parameter.data.copy_(made[name])
        try:
            yield
        finally:
            for name, parameter in narrow.items():
                parameter.data.copy_(kept[name])

    def _held_out_error(self, block: Block, lanes: Sequence[Lane], held: Sequence[int]) -> float:
        """Mean relative squared error on the batches that are held out."""
        module = self.model.get_submodule(block.name)
        total = 0.0
        for index in held:
            with torch.no_grad():
                total += float(self._error(module, lanes[index], self.targets[index]))
            self._rest(index, lanes)
        return total / len(held)


@dataclass
class ReconstructingStream(Reconstructing[Spilled]):
    """A pruning stream that reconstructs its blocks."""


@dataclass
class CorrectingReconstructingStream(Reconstructing[DenseInputs], CorrectingStream):
    """A pruning stream that corrects errors matrix by matrix, and then reconstructs its blocks."""

    keeps_output = True


def held_out(batches: int) -> list[int]:
    """Numbers of the batches that are not learned from: every sixteenth, or of fewer the last."""
    return list(range(HELD_OUT - 1, batches, HELD_OUT)) or [batches - 1]


def second_half(block: Block) -> tuple[str, ...]:
    """Beginnings of the names of tensors in the second half of a block.

    The first half is the first part of the block that has matrices (attention, in all that transformers knows), with
    what belongs to none; the second is every other part that has some. One part alone has no second half.
    """
    parts = list(dict.fromkeys(_part_of(block, matrix.name) for matrix in block.matrices))
    return tuple(f"{part}." for part in parts[1:])


def _part_of(block: Block, name: str) -> str:
    """The child of a block that a tensor is in; of a list of layers the layer."""
    inside = name.removeprefix(f"{block.name}.").split(".")
    return ".".join([block.name, *inside[: 2 if inside[1:2] and inside[1].isdigit() else 1]])


def _is_pruned(plan: Plan, block: Block, name: str) -> bool:
    """Whether a matrix, or an expert of it, is to lose anything."""
    experts = next(matrix.experts for matrix in block.matrices if matrix.name == name)
    return any(not is_identity(plan.target(name, expert)) for expert in range(max(experts, 1)))
