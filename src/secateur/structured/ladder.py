"""Refits a structure at several sizes in one pass, and tries whole splits, to measure what they cost.

`LadderStream` runs the dense model once: at each consumer the Gram matrix of the inputs is there, and the units are
chosen and the rest refitted for every size from it. `TrialStream` carries one split out as a pruning run would, without
writing it: blocks are skipped, and each consumer is refitted on the inputs that really arrive. What they made is put
into a model in memory, with columns of zeros for what goes, which computes the same as the cut model
(`secateur.structured.proof`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateur.engine.binding import TensorReader
from secateur.engine.blocks import Block
from secateur.engine.capture import Lane
from secateur.engine.forward import Source
from secateur.engine.stream import Inputs
from secateur.result import PrunedMatrix
from secateur.structured.couplings import Coupling, Kind
from secateur.structured.stream import Job, Seen, UnitStream, bias_of

Tensors = dict[str, Tensor]


class Discard:
    """A sink in which no block is done, and that keeps nothing."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def done(self, index: int) -> list[PrunedMatrix] | None:
        return None

    def reader(self) -> TensorReader:
        return self._source

    def dtype(self, key: str) -> torch.dtype:
        return self._source.dtype(key)

    def write(self, key: str, tensor: Tensor) -> None:
        return

    def copy(self, key: str) -> None:
        return

    def move(self, key: str, tensor: Tensor) -> None:
        return

    def finish(self, index: int, matrices: list[PrunedMatrix]) -> None:
        return


@dataclass
class LadderStream(UnitStream):
    """A dense forward that refits every consumer at several sizes. ``jobs`` has one job for each size."""

    made: dict[tuple[Kind, int], Tensors] = field(default_factory=dict)
    """Kind and size -> the tensors of all blocks that are not as they were, in their whole shapes."""

    def _prune_block(self, block: Block, lanes: list[Lane], final: Tensors) -> list[PrunedMatrix]:
        specs = {matrix.name: matrix for matrix in block.matrices}
        jobs: dict[str, list[Job]] = {}
        for job in self.jobs.get(block.index, ()):
            jobs.setdefault(job.coupling.consumer, []).append(job)

        def refit(name: str, expert: int, seen: Seen | None) -> None:
            question = self._question(jobs[name][0].coupling, expert, specs[name], final, seen)
            for job in jobs[name]:
                units = self._choose(question, job)
                whole = dict(final)
                self._take(job.coupling, expert, specs[name], whole, self._refitted(question, units))
                made = self.made.setdefault((job.coupling.kind, job.stay), {})
                made.update(_changed_tensors(job.coupling, whole))

        self._at_consumers(block, lanes, final, [(name, 0) for name in jobs], refit)
        return []

    def _as_written(self, block: Block, final: Tensors) -> Tensors:
        return final

    def _changed(self, block: Block, matrices: Sequence[PrunedMatrix]) -> set[str]:
        return set()


@dataclass
class TrialStream(UnitStream):
    """A pruning run that writes nothing."""

    gone: frozenset[int] = frozenset()
    """Blocks that are skipped."""
    made: Tensors = field(default_factory=dict)
    """The tensors of all blocks that are not as they were, in their whole shapes."""

    def _lane(self, inputs: Inputs, *, observed: bool) -> Lane:
        lane = super()._lane(inputs, observed=observed)
        lane.skip = self.gone
        return lane

    def _prune_block(self, block: Block, lanes: list[Lane], final: Tensors) -> list[PrunedMatrix]:
        done = super()._prune_block(block, lanes, final)
        for job in self.jobs.get(block.index, ()):
            self.made.update(_changed_tensors(job.coupling, final))
        return done


def _changed_tensors(coupling: Coupling, tensors: Mapping[str, Tensor]) -> Tensors:
    """Of a consumer: its weight and its bias."""
    return {name: tensors[name] for name in (coupling.cuts[0].name, bias_of(coupling)) if name in tensors}


@contextlib.contextmanager
def replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """While it lasts, some parameters of a model have other values."""
    old = {name: model.get_parameter(name).data for name in tensors}
    try:
        for name, tensor in tensors.items():
            model.get_parameter(name).data = tensor.to(old[name].device, old[name].dtype)
        yield
    finally:
        for name, data in old.items():
            model.get_parameter(name).data = data


def jobs_for(
    couplings: Mapping[int, Sequence[Coupling]], sizes: Mapping[Kind, Sequence[int]], gone: frozenset[int] = frozenset()
) -> dict[int, list[Job]]:
    """A job for every size of every coupling, in all blocks but those that go."""
    return {
        index: [Job(coupling, size) for coupling in own for size in sizes.get(coupling.kind, ())]
        for index, own in couplings.items()
        if index not in gone
    }


def divide(batches: Sequence[Inputs], fit_tokens: int, held_tokens: int) -> tuple[list[Inputs], list[Inputs]]:
    """Calibration batches to refit on, the first ones, and others to measure on, the last ones: at most a quarter.

    A single batch is divided by its rows; a single row is used for both.
    """
    rows = list(batches)
    if len(rows) == 1 and (sizes := {value.shape[0] for value in rows[0].values()}) != {1} and len(sizes) == 1:
        cut = -max(1, sizes.pop() // 4)
        rows = [{name: value[:cut] for name, value in rows[0].items()},
                {name: value[cut:] for name, value in rows[0].items()}]  # fmt: skip
    if len(rows) == 1:
        return rows, rows
    most = max(1, len(rows) // 4)
    held = first(rows[::-1][:most], held_tokens)[::-1]
    return first(rows[: len(rows) - len(held)], fit_tokens), held


def first(batches: Sequence[Inputs], tokens: int) -> list[Inputs]:
    """Batches until they hold that many tokens; at least one."""
    taken: list[Inputs] = []
    for batch in batches:
        taken.append(batch)
        if count(taken) >= tokens:
            break
    return taken


def count(batches: Sequence[Inputs]) -> int:
    """Tokens in batches; images count as one."""
    return sum(
        max(value.shape[0] * (value.shape[1] if value.ndim == 2 else 1) for value in batch.values())
        for batch in batches
    )  # fmt: skip
