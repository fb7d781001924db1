"""Statistics and solutions of the matrices of one block."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from secateur.engine.blocks import MatrixSpec
from secateur.engine.capture import AtMatrix, Lane
from secateur.errors import CalibrationError, RunError
from secateur.methods._common import is_identity
from secateur.plugins import Method, make_method
from secateur.result import PrunedMatrix
from secateur.seeds import derived_seed
from secateur.statistics import InputStatistics

if TYPE_CHECKING:
    from secateur.engine.stream import BlockStream


class Solver:
    """Statistics and solutions of the matrices of one block."""

    def __init__(
        self,
        stream: BlockStream,
        specs: Mapping[str, MatrixSpec],
        final: dict[str, torch.Tensor],
        reports: dict[str, PrunedMatrix],
    ) -> None:
        self._stream = stream
        self._specs = specs
        self._final = final
        self._reports = reports
        self._statistics: dict[tuple[str, int], InputStatistics] = {}
        self._shared: set[tuple[str, int]] = set()
        self._solved: set[tuple[str, int]] = set()
        self._source = {name: final[name] for name in reports}
        for name in reports:  # solved from the source's precision, kept in the result's
            if final[name].dtype != stream.output_dtype(name):
                final[name] = torch.empty_like(final[name], dtype=stream.output_dtype(name))

    @property
    def finished(self) -> bool:
        """Whether every matrix is solved."""
        return len(self._solved) == sum(max(self._specs[name].experts, 1) for name in self._reports)

    def observe(self, lane: Lane, event: AtMatrix) -> None:
        """Take in the input with which a forward has arrived. The same tensor as last time is not counted again."""
        key = (event.name, event.expert)
        kind = self._stream.method.statistics
        if kind == "none" or event.name not in self._reports or key in self._solved:
            lane.last_input = None
            return
        version = event.input._version
        last = lane.last_input
        same = last is not None and last[0] is event.input and last[1] == version
        if key not in self._statistics:
            if same:
                assert last is not None
                self._statistics[key] = last[2]
                self._shared.add(key)
            else:
                self._statistics[key] = InputStatistics(
                    self._specs[event.name].in_features, kind, device=self._stream.device
                )
        statistics = self._statistics[key]
        if key not in self._shared:
            try:
                statistics.update(event.input)
            except CalibrationError as error:
                raise CalibrationError(f"{error.message} at the input of {event.name}", hint=error.hint) from None
        elif not same and key in lane.met:  # used once more, on something else: from now on it has its own
            statistics = self._statistics[key] = copy.deepcopy(statistics)
            self._shared.discard(key)
            statistics.update(event.input)
        elif not same:
            raise RuntimeError(f"the forwards do not agree on what {event.name} shares its input with")
        lane.met.add(key)
        lane.last_input = (event.input, version, statistics)

    def solve(self, name: str, expert: int, *, seen_only: bool = False) -> None:
        """Prune one matrix and put it in the running model; with ``seen_only`` not one that saw no token."""
        key = (name, expert)
        if name not in self._reports or key in self._solved or (seen_only and key not in self._statistics):
            return
        statistics = self._statistics.pop(key, None)
        self._solve(name, expert, self._stream.method, statistics)
        owner, _, leaf = name.rpartition(".")
        running = self._stream.model.get_submodule(owner)._parameters[leaf]
        assert running is not None
        with torch._C.DisableTorchFunctionSubclass():
            spec = self._specs[name]
            spec.slices(running.data)[expert].copy_(spec.slices(self._final[name])[expert])

    def solve_rest(self) -> None:
        """Matrices that no calibration token reached (rare experts), or all of them when the method needs none."""
        unreached = []
        for name in self._reports:
            for expert in range(max(self._specs[name].experts, 1)):
                if (name, expert) in self._solved:
                    continue
                method = self._stream.method
                if method.statistics != "none":
                    unreached.append(f"{name}[{expert}]" if self._specs[name].experts else name)
                    around = getattr(method, "around", None)  # what is done after any method is done here as well
                    method = make_method("magnitude")
                    method = method if around is None else around(method)
                    self._reports[name].notes.append(f"expert {expert}: no calibration token came, pruned by magnitude")
                self._solve(name, expert, method, None)
        if unreached:
            shown = ", ".join(unreached[:3]) + (", ..." if len(unreached) > 3 else "")
            self._stream.reporter.warn(
                f"{len(unreached)} matrices saw no calibration token and were pruned by magnitude: {shown}"
            )

    def _wanted(
        self, name: str, weight: torch.Tensor, statistics: InputStatistics | None
    ) -> tuple[torch.Tensor, list[str]]:
        """The weights whose outputs a method shall keep, and what must be told about them."""
        return weight, []

    def _solve(self, name: str, expert: int, method: Method, statistics: InputStatistics | None) -> None:
        spec, target = self._specs[name], self._stream.plan.target(name, expert)
        part = spec.slices(self._final[name])[expert]
        weight = spec.slices(self._source[name])[expert].to(self._stream.device, torch.float32, copy=True).contiguous()
        generator = torch.Generator().manual_seed(derived_seed(self._stream.seed, name, expert))
        weight, notes = (weight, []) if is_identity(target) else self._wanted(name, weight, statistics)
        solved = method.solve(weight, statistics, target, generator=generator)
        if not torch.isfinite(solved.weight).all():
            raise RunError(f"the method returned NaN or infinity for {name}", hint="use more calibration data")
        part.copy_(solved.weight)
        if not torch.isfinite(part).all():
            raise RunError(f"{name} does not fit {part.dtype} any more", hint="use --dtype bfloat16 or float32")
        self._solved.add((name, expert))
        report = self._reports[name]
        for kind in ("loss", "loss_before_refit", "loss_before_rounding"):
            if (loss := getattr(solved, kind)) is not None:  # experts are added up
                setattr(report, kind, (getattr(report, kind) or 0.0) + loss)
        for note in [*notes, *solved.notes]:
            report.notes.append(f"expert {expert}: {note}" if spec.experts else note)
