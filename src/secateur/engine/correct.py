"""A stream that prunes towards the outputs of the dense model, so that errors are corrected instead of passed on.

Before a block is pruned, a dense forward of every batch goes through it and its inputs of the matrices are kept, beside
the activations and spilled like them. See `secateur.correction`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.correction import Drift
from secateur.engine.blocks import MatrixSpec
from secateur.engine.capture import AtMatrix, Lane
from secateur.engine.paired import PairedStream, Spilled
from secateur.engine.solver import Solver
from secateur.engine.stream import Inputs, StreamResult
from secateur.result import PrunedMatrix
from secateur.statistics import InputStatistics

HELD_OUT = 8
"""One of so many calibration batches is held out to choose beta by."""
FIXED = 0.5
"""Beta when there are too few batches to choose it."""


class DenseInputs(Spilled):
    """Inputs of the matrices of one block in the dense forward of one batch, by name of the matrix.

    They are in the order in which they came: a matrix may be used more than once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[str, list[torch.Tensor]] = {}
        self._last: tuple[torch.Tensor, int, torch.Tensor] | None = None

    def keep(self, event: AtMatrix) -> None:
        """Note an input as a copy, since the forward empties its own; matrices with the same input share it."""
        last = self._last
        if last is None or last[0] is not event.input or last[1] != event.input._version:
            with torch._C.DisableTorchFunction():
                copied = event.input.clone()
            self.watcher.remember(copied)
            last = self._last = event.input, event.input._version, copied
        self.inputs.setdefault(event.name, []).append(last[2])

    def close(self) -> None:
        """The forward has left the block."""
        self._last = None


@dataclass
class CorrectingStream(PairedStream[DenseInputs]):
    """A pruning stream with the dense forward beside it. Stacked experts, whose tokens differ, are not corrected."""

    beta: float | None = None
    """How much of the correction is taken, 0 to 1; None chooses it for each matrix."""
    keeps_output: ClassVar[bool] = False
    """Whether what the dense block gives is kept as well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.observes_dense = True
        matrices = self.structure.matrices
        self._corrected = {one.name for one in matrices if one.name in self.plan.targets and not one.experts}

    def run(self, batches: list[Inputs], probe: Inputs | None = None) -> StreamResult:  # type: ignore[override]
        """As `BlockStream.run`, with a dense forward for every batch."""
        if self.beta is None and len(batches) < HELD_OUT:
            self.beta = FIXED
            self.reporter.warn(
                f"{len(batches)} calibration batches are too few to choose the error correction by: {FIXED:g} is taken"
            )
        return super().run(batches, probe)

    def _through(self, lane: Lane) -> DenseInputs:
        """Take one dense forward through the block it stands at."""
        kept = DenseInputs()
        lane.keep_output = self.keeps_output
        self._advance(lane)
        while isinstance(lane.event, AtMatrix):
            if lane.event.name in self._corrected:
                self.store.unpark(lane.watcher)
                kept.keep(lane.event)
            self._advance(lane)
        kept.close()
        if lane.keep_output:
            lane.keep_output = False
            kept.take_output(lane)
        return kept

    def _one_pass(self) -> bool:
        return False  # each matrix must see what arrives behind the pruned ones, that is what is corrected

    def _solver(
        self, lanes: list[Lane], specs: Mapping[str, MatrixSpec], final: dict[str, torch.Tensor],
        reports: dict[str, PrunedMatrix],
    ) -> Solver:  # fmt: skip
        return CorrectingSolver(self, specs, final, reports, dict(zip(lanes, self.targets, strict=True)), self.beta)


class CorrectingSolver(Solver):
    """A solver that gives the method corrected weights.

    Args:
        dense: what the dense forward of the same batch had, for every lane.
        beta: None chooses it.
    """

    def __init__(
        self, stream: CorrectingStream, specs: Mapping[str, MatrixSpec], final: dict[str, torch.Tensor],
        reports: dict[str, PrunedMatrix], dense: Mapping[Lane, DenseInputs], beta: float | None,
    ) -> None:  # fmt: skip
        super().__init__(stream, specs, final, reports)
        self._dense, self._beta = dense, beta
        self._held_out = {lane for number, lane in enumerate(dense, start=1) if number % HELD_OUT == 0}
        self._drifts: dict[int, tuple[InputStatistics, Drift]] = {}
        """By the statistics they belong to: matrices with one input share both."""
        self._turns: dict[tuple[Lane, str], int] = {}
        """How often a matrix was met on the way of a batch."""
        self._unlike: dict[int, InputStatistics] = {}
        """Statistics of inputs that the dense model has no counterpart of: other tokens came there."""

    def observe(self, lane: Lane, event: AtMatrix) -> None:
        """Take in the input that arrived, and how far it is from the dense model's."""
        super().observe(lane, event)
        key = (event.name, event.expert)
        spec = self._specs[event.name]
        if lane.last_input is None or spec.experts:
            return
        turn = self._turns[lane, event.name] = self._turns.get((lane, event.name), -1) + 1
        if key in self._shared:
            return
        statistics = lane.last_input[2]
        dense = self._dense[lane]
        inputs = dense.inputs.get(event.name, [])
        kept = inputs[turn] if turn < len(inputs) else None
        late = turn > 0 and id(statistics) not in self._drifts  # some of its inputs were counted with another matrix's
        if kept is None or kept.shape != event.input.shape or late:
            self._unlike[id(statistics)] = statistics
            return
        held = self._beta is None and lane in self._held_out
        if id(statistics) not in self._drifts:
            drift = Drift(spec.in_features, self._stream.device, held_out=self._beta is None)
            self._drifts[id(statistics)] = statistics, drift
        self._stream.store.unpark(dense.watcher)
        order = self._stream.orders.get(event.name)
        with torch._C.DisableTorchFunction():
            kept = kept if order is None else kept.index_select(-1, order.to(kept.device))
            self._drifts[id(statistics)][1].update(event.input, kept, held_out=held)
        self._stream.store.park(dense.watcher)

    def _wanted(
        self, name: str, weight: torch.Tensor, statistics: InputStatistics | None
    ) -> tuple[torch.Tensor, list[str]]:
        if self._specs[name].experts:
            note = "earlier errors are not corrected: other tokens come to an expert than in the dense model"
            notes = self._reports[name].notes
            notes += [note] if note not in notes else []
            return weight, []
        found = self._drifts.get(id(statistics))
        if statistics is None or found is None or id(statistics) in self._unlike:
            return weight, ["earlier errors are not corrected: the dense model has no such input to compare with"]
        corrected, beta = found[1].corrected(weight, statistics, self._beta)
        self._reports[name].beta = beta
        return corrected, []
