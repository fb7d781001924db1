"""The loop of structured pruning: choose units at each consumer, refit it, and write the block without the others.

While a block is worked on it keeps its full shapes, with the columns of removed units at zero; that computes the same
(`secateur.structured.proof`). The tensors are cut when they are written.

A consumer whose output is simply added to the block's output is refitted last, and so that the block as a whole gives
what the dense block gave in the dense model: with X its inputs, W0 as it was, B the dense block's output and A what the
block gives now, Y = X W0^T + (B - A) is what it should add. That corrects the errors of everything before it. Any other
consumer is refitted to its own output, Y = X W0^T.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.engine.blocks import Block, MatrixSpec, expert_order
from secateur.engine.capture import AtMatrix, Lane, LeftBlock
from secateur.engine.paired import PairedStream
from secateur.errors import CalibrationError, RunError
from secateur.least_squares import quadratic
from secateur.plugins import Criterion, Units
from secateur.result import PrunedMatrix
from secateur.statistics import InputStatistics
from secateur.structured.couplings import Coupling
from secateur.structured.proof import cut_tensors, zero_units


@dataclass(frozen=True)
class Job:
    """One coupling of a block, and how many of its units stay."""

    coupling: Coupling
    stay: int


@dataclass
class UnitStream(PairedStream):
    """A stream that removes units. ``plan`` stays empty; ``jobs`` says by block what goes."""

    jobs: Mapping[int, Sequence[Job]] = field(default_factory=dict)
    criterion: Criterion | None = None
    update: bool = True
    """Whether what stays is refitted; else it keeps its values."""
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choices: dict[int, list[tuple[Coupling, Tensor]]] = {}

    def _prune_block(self, block: Block, lanes: list[Lane], final: dict[str, Tensor]) -> list[PrunedMatrix]:
        specs = {matrix.name: matrix for matrix in block.matrices}
        order = expert_order(block.matrices)
        jobs = sorted(self.jobs.get(block.index, ()), key=lambda job: order[job.coupling.consumer, 0])
        if lanes:
            self._install(block, final, self.compute_dtype)
        whole = dict(final)
        solved: list[_Solved] = []
        last = jobs[-1] if jobs and jobs[-1].coupling.additive and self.update and lanes else None
        kept_inputs: dict[Lane, Tensor] = {}
        waiting = {job.coupling.consumer: job for job in jobs}
        for lane in lanes:
            lane.pause_at_end = last is not None
            self._to_consumer(lane, waiting)
        while at := {lane.event.name for lane in lanes if isinstance(lane.event, AtMatrix)}:
            name = min(at, key=lambda name: order[name, 0])
            here = [lane for lane in lanes if isinstance(lane.event, AtMatrix) and lane.event.name == name]
            job = waiting.pop(name)
            if job is not last:
                solved.append(self._solve(job, specs[name], whole, self._seen(here, specs[name]), None))
                self._put(specs[name], whole)
            for lane in here:
                if job is last and isinstance(lane.event, AtMatrix):
                    kept_inputs[lane] = lane.event.input
                self._to_consumer(lane, waiting)
        if last is not None:
            solved.append(self._correct(last, specs[last.coupling.consumer], whole, lanes, kept_inputs))
        for lane in lanes:
            lane.last_input = None
        rest = [job for job in waiting.values() if job is not last]  # no calibration token came, or none is needed
        solved += [self._solve(job, specs[job.coupling.consumer], whole, None, None) for job in rest]
        final.update(whole)
        self._choices[block.index] = [(one.job.coupling, one.units) for one in solved]
        made = self._as_written(block, final)
        return [self._report(one, specs, made) for one in solved]

    def _to_consumer(self, lane: Lane, waiting: Mapping[str, Job]) -> None:
        """Let a forward go on to the next matrix that is to be solved, or out of the block."""
        self._advance(lane)
        while isinstance(lane.event, AtMatrix) and lane.event.name not in waiting:
            self._advance(lane)

    def _as_written(self, block: Block, final: dict[str, Tensor]) -> dict[str, Tensor]:
        return cut_tensors(final, self._choices[block.index])

    def _changed(self, block: Block, matrices: Sequence[PrunedMatrix]) -> set[str]:
        jobs = self.jobs.get(block.index, ())
        biases = {_bias_of(job.coupling) for job in jobs} if self.update else set()
        return {cut.name for job in jobs for cut in job.coupling.cuts} | biases.intersection(block.tensors)

    def _written_block(self, block: Block, names: Sequence[str], done: list[PrunedMatrix]) -> dict[str, Tensor]:
        """What an earlier run wrote, back in the shapes of the running model: zero where units were removed."""
        stayed = {matrix.name: torch.tensor(matrix.units) for matrix in done if matrix.units is not None}
        choices = [(job.coupling, stayed[job.coupling.consumer]) for job in self.jobs.get(block.index, ())]
        cut = self._changed(block, done)
        read = self.binding.load([name for name in names if name not in cut], self.sink.reader())
        read |= {name: self.sink.reader().tensor(self.binding.unit_of(name).keys[0]) for name in names if name in cut}
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict(keep_vars=True).items()}
        return _padded(read, shapes, choices)

    # --- one consumer --------------------------------------------------------------------------------------------

    def _seen(self, lanes: Sequence[Lane], spec: MatrixSpec) -> _Seen:
        """Statistics of the inputs with which forwards have arrived."""
        seen = _Seen.empty(spec.in_features, self.device)
        for lane in lanes:
            self.store.unpark(lane.watcher)
            assert isinstance(lane.event, AtMatrix)
            seen.add(lane.event.input, spec.name)
            self.store.park(lane.watcher)
        return seen

    def _solve(
        self, job: Job, spec: MatrixSpec, whole: dict[str, Tensor], seen: _Seen | None, cross: Tensor | None
    ) -> _Solved:
        """Choose the units of a consumer, refit it, and put it into ``whole`` with zeros where units go."""
        coupling = job.coupling
        bias_name = _bias_of(coupling)
        bias = whole[bias_name].to(self.device, torch.float32) if bias_name in whole else None
        weight = spec.slices(whole[spec.name])[0].to(self.device, torch.float32)
        seen = seen or _Seen.blind(spec.in_features, self.device)
        gram = seen.gram if bias is not None else seen.gram[:-1, :-1]
        start = weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)
        if cross is not None and bias is None:
            cross = cross[:-1]
        problem = quadratic(gram, cross, start, self.damping)
        assert self.criterion is not None
        columns = coupling.columns.to(self.device)
        units = self.criterion.choose(
            Units(
                weight=weight, columns=columns, feeding=self._feeding(coupling, whole), gram=seen.gram[:-1, :-1],
                sums=seen.gram[-1, :-1], tokens=float(seen.gram[-1, -1]), problem=problem, parts=coupling.parts,
            ),
            coupling.units - job.stay,
        )  # fmt: skip
        stays = columns[units.to(self.device)].reshape(-1).sort().values
        if bias is not None:
            stays = torch.cat([stays, stays.new_tensor([spec.in_features])])
        if self.update:
            made = problem.best(stays)
        else:
            made = torch.zeros_like(problem.start)
            made[stays] = problem.start[stays]
        loss = problem.loss(made) - problem.loss(problem.best(torch.arange(len(gram), device=self.device)))
        self._store(spec.name, whole, made[: spec.in_features].t(), spec)
        if bias is not None and self.update:
            self._store(bias_name, whole, made[spec.in_features], None)
        whole.update(zero_units(whole, coupling, units))
        return _Solved(job, units, max(0.0, loss), problem.notes)

    def _store(self, name: str, whole: dict[str, Tensor], made: Tensor, spec: MatrixSpec | None) -> None:
        rounded = made.to(self.output_dtype(name)).cpu()
        if not torch.isfinite(rounded).all():
            raise RunError(f"{name} does not fit {rounded.dtype} any more", hint="use --dtype bfloat16 or float32")
        whole[name] = (rounded.t() if spec is not None and spec.transposed else rounded).contiguous()

    def _feeding(self, coupling: Coupling, whole: Mapping[str, Tensor]) -> Tensor:
        total = torch.zeros(coupling.units, dtype=torch.float64)
        for cut in coupling.cuts[1:]:
            tensor = whole[cut.name].double().square()
            along = tensor.movedim(cut.dim, 0).reshape(tensor.shape[cut.dim], -1).sum(dim=1)
            total += along[cut.indices].sum(dim=1)
        return total.to(self.device, torch.float32)

    def _put(self, spec: MatrixSpec, whole: Mapping[str, Tensor]) -> None:
        """Let the running model go on with what was solved."""
        module = self.model.get_submodule(spec.module)
        for leaf in ("weight", "bias"):
            running = module._parameters.get(leaf)
            if running is not None:
                running.data.copy_(whole[f"{spec.module}.{leaf}"])

    def _correct(
        self, job: Job, spec: MatrixSpec, whole: dict[str, Tensor], lanes: Sequence[Lane], inputs: Mapping[Lane, Tensor]
    ) -> _Solved:
        """Refit the last consumer to what the dense block gave, and let the forwards go on with what it gives now."""
        before = self._linear(spec, whole)
        seen = _Seen.empty(spec.in_features, self.device)
        cross = torch.zeros(spec.in_features + 1, spec.out_features, device=self.device)
        for index, lane in enumerate(lanes):
            self.store.unpark(lane.watcher)
            self.store.unpark(self.targets[index].watcher)
            assert isinstance(lane.event, LeftBlock)
            wanted = self.targets[index].output.reshape(-1, spec.out_features).float()
            weight = wanted.square().mean(dim=1, keepdim=True).clamp_min(1e-12).rsqrt()
            x = seen.add(inputs[lane], spec.name, weight)
            missing = wanted - lane.event.output.reshape(-1, spec.out_features).float()
            cross.addmm_(x.t(), missing * weight)
            self.store.park(self.targets[index].watcher)
            self.store.park(lane.watcher)
        # X^T Y with Y = X W0^T + what is missing; the first part needs no pass over the tokens.
        solved = self._solve(job, spec, whole, seen, cross + seen.gram @ before)
        change = (self._linear(spec, whole) - before).to(self.compute_dtype)
        for lane in lanes:
            self.store.unpark(lane.watcher)
            assert isinstance(lane.event, LeftBlock)
            output = lane.event.output
            with torch._C.DisableTorchFunction():  # in place: the lane's watcher must go on knowing this tensor
                rows = inputs[lane].reshape(-1, spec.in_features).to(change.dtype)
                output += torch.addmm(change[-1], rows, change[:-1]).reshape(output.shape).to(output.dtype)
            lane.pause_at_end = False
            self.store.park(lane.watcher)
            self._advance(lane)
        return solved

    def _linear(self, spec: MatrixSpec, whole: Mapping[str, Tensor]) -> Tensor:
        """Weight and bias as one matrix for inputs with a column of ones, (in + 1, out)."""
        weight = spec.slices(whole[spec.name])[0].to(self.device, torch.float32)
        bias = whole.get(f"{spec.module}.bias")
        row = torch.zeros(spec.out_features) if bias is None else bias.float()
        return torch.cat([weight.t(), row.to(self.device)[None]])

    def _report(self, one: _Solved, specs: Mapping[str, MatrixSpec], final: Mapping[str, Tensor]) -> PrunedMatrix:
        spec = specs[one.job.coupling.consumer]
        made = spec.slices(final[spec.name])[0]
        zeros = int((made == 0).sum())
        return PrunedMatrix(
            spec.name, list(made.shape), zeros, zeros / made.numel(), one.loss, list(one.notes), one.units.tolist()
        )


@dataclass
class _Solved:
    job: Job
    units: Tensor
    loss: float
    notes: list[str]


@dataclass
class _Seen:
    """Statistics of inputs with a column of ones behind them: the last row of the Gram matrix holds their sums."""

    statistics: InputStatistics

    @classmethod
    def empty(cls, width: int, device: torch.device) -> _Seen:
        return cls(InputStatistics(width + 1, "gram", device=device))

    @classmethod
    def blind(cls, width: int, device: torch.device) -> _Seen:
        """As if every input had been seen once, alone: only the weights count."""
        seen = cls.empty(width, device)
        seen.statistics.update(torch.eye(width + 1))
        return seen

    @property
    def gram(self) -> Tensor:
        gram = self.statistics.gram
        assert gram is not None
        return gram

    def add(self, x: Tensor, name: str, weight: Tensor | None = None) -> Tensor:
        """Take inputs in; returns them as float32 rows with a one behind each, times ``weight`` (tokens, 1)."""
        rows = _with_ones(x, self.statistics.sum_squares.device)
        if weight is not None:
            rows *= weight.to(rows)
        try:
            self.statistics.update(rows)
        except CalibrationError as error:
            raise CalibrationError(f"{error.message} at the input of {name}", hint=error.hint) from None
        return rows


def _bias_of(coupling: Coupling) -> str:
    """Name of the bias that the refit of a consumer changes, if it has one."""
    return f"{coupling.consumer.removesuffix('.weight')}.bias"


def _with_ones(x: Tensor, device: torch.device) -> Tensor:
    with torch._C.DisableTorchFunction():
        rows = x.detach().reshape(-1, x.shape[-1]).to(device, torch.float32)
        return torch.cat([rows, torch.ones(len(rows), 1, device=device)], dim=1)


def _padded(
    cut: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], choices: Sequence[tuple[Coupling, Tensor]]
) -> dict[str, Tensor]:
    """Cut tensors back in their old shapes, zero where something was removed."""
    made = dict(cut)
    for coupling, units in choices:
        for part in coupling.cuts:
            full = list(made[part.name].shape)
            full[part.dim] = shapes[part.name][part.dim]
            grown = made[part.name].new_zeros(full)
            grown.index_copy_(part.dim, part.keep(units, full[part.dim]), made[part.name])
            made[part.name] = grown
    return made
