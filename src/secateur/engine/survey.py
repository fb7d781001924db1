"""One forward through the dense model, block by block, in which an allocation rule looks at every matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.allocation._base import Look, Measuring
from secateur.engine.blocks import Block, MatrixSpec
from secateur.engine.capture import Lane
from secateur.engine.solver import Solver
from secateur.engine.stream import BlockStream
from secateur.patterns import UNSTRUCTURED
from secateur.plugins import Method, Solved, StatisticsKind, Target
from secateur.result import PrunedMatrix
from secateur.seeds import derived_seed
from secateur.statistics import InputStatistics


def gathering(statistics: StatisticsKind) -> Method:
    """What stands in the place of a method: it says which statistics are gathered, and changes nothing."""
    return _Gathering(statistics)


@dataclass
class _Gathering:
    statistics: StatisticsKind

    def solve(
        self, weight: Tensor, stats: InputStatistics | None, target: Target, *, generator: torch.Generator
    ) -> Solved:
        return Solved(weight, torch.ones_like(weight, dtype=torch.bool))


@dataclass
class Survey(BlockStream):
    """The forward. ``plan`` names the matrices to look at; ``method`` comes from `gathering`."""

    rule: Measuring | None = None
    solver: Method | None = None
    """Prunes a matrix where the rule asks for it."""
    fisher: Mapping[str, Tensor] = field(default_factory=dict)
    """Name of a matrix -> mean squared gradient of its outputs, (out,)."""
    sparsity: float = 0.0
    """What is to be divided."""
    keep: Callable[[str, float, Tensor], None] | None = None
    """Takes name and sparsity of whatever the rule has pruned, and the matrix, (out, in)."""
    measured: dict[str, list[Tensor]] = field(default_factory=dict)
    """Name of a matrix -> what the rule made of it, for each expert."""

    def _prune_block(self, block: Block, lanes: list[Lane], final: dict[str, Tensor]) -> list[PrunedMatrix]:
        super()._prune_block(block, lanes, final)
        reduce = getattr(self.rule, "of_block", None)
        names = [matrix.name for matrix in block.matrices if matrix.name in self.measured]
        if reduce is not None and names:
            whole = reduce([one for name in names for one in self.measured[name]])
            self.measured.update({name: [whole] for name in names})
        return []

    def _solver(
        self, lanes: list[Lane], specs: Mapping[str, MatrixSpec], final: dict[str, Tensor],
        reports: dict[str, PrunedMatrix],
    ) -> Solver:  # fmt: skip
        return _Surveyor(self, specs, final, reports)

    def look(self, name: str, expert: int, weight: Tensor, statistics: InputStatistics | None) -> None:
        """Let the rule measure one matrix, (out, in) float32."""
        assert self.rule is not None

        def solve(sparsity: float) -> Tensor:
            assert self.solver is not None
            generator = torch.Generator().manual_seed(derived_seed(self.seed, name, expert))
            known = None if self.solver.statistics == "none" else statistics
            made = self.solver.solve(weight, known, Target(sparsity, UNSTRUCTURED), generator=generator).weight
            if self.keep is not None:
                self.keep(name, sparsity, made)
            return made

        seen = Look(weight, statistics, self.fisher.get(name), self.sparsity, solve)
        self.measured.setdefault(name, []).append(self.rule.measure(seen))


class _Surveyor(Solver):
    """Has matrices looked at instead of solved; the running weights stay as they are."""

    def _solve(self, name: str, expert: int, method: Method, statistics: InputStatistics | None) -> None:
        stream, spec = self._stream, self._specs[name]
        assert isinstance(stream, Survey)
        kind = stream.method.statistics
        if statistics is None and kind != "none":  # no calibration token came here
            statistics = InputStatistics(spec.in_features, kind, device=stream.device)
        part = spec.slices(self._source[name])[expert]
        weight = part.to(stream.device, torch.float32, copy=True).contiguous()
        stream.look(name, expert, weight, statistics)
        self._solved.add((name, expert))
