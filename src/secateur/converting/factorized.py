"""Factorises the matrices of a model: one pass to choose ranks, where a budget asks for it, and one to write."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoint.folder import copy_side_files
from secateur.checkpoint.ledger import LEDGER, Ledger
from secateur.checkpoint.writer import CheckpointWriter
from secateur.conversions._spread import Curve, spread
from secateur.conversions.factorized import Factorized, relative_error
from secateur.converting.opened import Converted, Opened
from secateur.converting.output import ConvertSink, Nowhere, Replaced, copied_keys, layout_of, replaced, write_config
from secateur.engine.activations import ActivationStore
from secateur.engine.device import activation_limit, trim_memory
from secateur.engine.forward import probe_inputs
from secateur.engine.plan import Plan
from secateur.engine.stream import BlockSink, BlockStream
from secateur.errors import BudgetError
from secateur.layers.spec import Spec
from secateur.plugins import Method, Solved, StatisticsKind, Target
from secateur.progress import Reporter
from secateur.result import ConvertedMatrix, PrunedMatrix
from secateur.statistics import InputStatistics

UNREACHED = "no calibration token came: factorised without weights of the inputs"


@dataclass(frozen=True)
class _Named(Target):
    """A target that says which matrix it is for."""

    name: str = ""


@dataclass
class _Look:
    """Stands where a method does: notes what ranks would cost, and changes nothing."""

    conversion: Factorized
    statistics: StatisticsKind
    ranks: dict[str, list[int | None]] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)

    def solve(
        self, weight: Tensor, stats: InputStatistics | None, target: Target, *, generator: torch.Generator
    ) -> Solved:
        assert isinstance(target, _Named)
        gram = stats.gram if stats is not None else None
        self.ranks[target.name], self.curves[target.name] = self.conversion.curve(target.name, weight, gram)
        return Solved(weight, torch.ones_like(weight, dtype=torch.bool))


@dataclass
class _Factorize:
    """Stands where a method does: gives the matrix that the tensors of a layer stand for, and keeps the tensors."""

    conversion: Factorized
    statistics: StatisticsKind
    work: FactorizeWork
    made: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def solve(
        self, weight: Tensor, stats: InputStatistics | None, target: Target, *, generator: torch.Generator
    ) -> Solved:
        assert isinstance(target, _Named)
        one, sink = self.work.by_name[target.name], self.work.sink
        assert sink is not None
        gram = stats.gram if stats is not None else None
        made = {
            leaf: tensor.to(sink.stored_dtype(one))
            for leaf, tensor in self.conversion.solve(weight, gram, one.entry).items()
        }
        central = self.conversion.central
        if one.owner is not None and central is not None:
            made[central] = sink.tensor(one, central).to(weight.device)
        self.made[target.name] = made
        whole = dense(made, one.entry)
        return Solved(whole, torch.ones_like(whole, dtype=torch.bool), relative_error(weight, whole, gram))


def dense(tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> Tensor:
    """The matrix (out, in) that the tensors of a layer stand for."""
    made: Tensor = importlib.import_module(f"secateur.layers.{entry['kind']}").dense(tensors, entry)
    return made


class FactorizeWork:
    """A factorisation that was found possible."""

    def __init__(
        self, conversion: Factorized, opened: Opened, batches: Sequence[Mapping[str, Tensor]],
        probe: Mapping[str, Tensor] | None,
    ) -> None:  # fmt: skip
        self.models: list[dict[str, Any]] = []
        self._conversion, self._opened, self._batches = conversion, opened, batches
        self._probe = probe or probe_inputs(opened.model)
        self.by_name: dict[str, Replaced] = {}
        self.sink: ConvertSink | None = None
        self._statistics: StatisticsKind = "gram" if conversion.statistics else "none"
        for name in opened.specs:
            opened.key_of(name)
        self.nbytes = sum(opened.reader.info(key).nbytes for key in opened.reader.keys)
        if conversion.share is None:
            self._name_layers(dict.fromkeys(opened.specs))
            layout = layout_of(opened, self._changed)
            self.nbytes, self.parameters = layout.nbytes, (layout.parameters, layout.parameters)
            return
        rest = layout_of(opened, {}).parameters - sum(spec.size for spec in opened.specs.values())
        self.parameters = rest, rest + self._limit()
        if conversion.cores > 2:
            for name, spec in opened.specs.items():
                conversion.entry(name, (spec.out_features, spec.in_features), 1)

    @property
    def _changed(self) -> dict[str, Replaced]:
        return {one.key: one for one in self.by_name.values()}

    def _name_layers(self, ranks: Mapping[str, int | None]) -> None:
        """Layers of the matrices that are factorised, with these ranks; None means the option's."""
        owners: dict[tuple[Any, ...], Replaced] = {}
        central = self._conversion.central
        for block in self._opened.structure.blocks:
            for spec in block.matrices:
                if spec.name not in ranks:
                    continue
                entry = self._conversion.entry(spec.name, (spec.out_features, spec.in_features), ranks[spec.name])
                kind = importlib.import_module(f"secateur.layers.{entry['kind']}")
                shapes = kind.shapes(spec.out_features, spec.in_features, entry)
                role = (block.row, spec.name.removeprefix(block.name), *spec.shape)
                owner = owners.get(role) if central is not None else None
                one = replaced(self._opened, spec.name, entry, shapes, kind.BIAS, owner, central)
                owners.setdefault(role, one)
                self.by_name[spec.name] = one

    def write(self, partial: Path, fingerprint: dict[str, Any], resume: bool, reporter: Reporter) -> Converted:
        """Choose ranks, factorise block by block, write."""
        opened, ranks = self._opened, None
        if self._conversion.share is not None:
            earlier = Ledger.header(partial / LEDGER) if resume else None
            if earlier is not None and {**earlier, "ranks": None} == {**fingerprint, "ranks": None}:
                ranks = earlier["ranks"]
            else:
                ranks = self._choose_ranks(partial, reporter)
            self._name_layers(ranks)
        changed = self._changed
        ledger = Ledger.begin(partial / LEDGER, {**fingerprint, "ranks": ranks}, resume=resume)
        method = _Factorize(self._conversion, self._statistics, self)
        unreached: dict[str, None] = {}

        def make(one: Replaced) -> Mapping[str, Tensor]:
            if one.name not in method.made:  # the engine saw no input of it
                unreached[one.name] = None
                weight = opened.specs[one.name].slices(opened.reader.tensor(one.key))[0].float()
                method.solve(weight, None, _Named(0.0, name=one.name), generator=torch.Generator())
            return method.made.pop(one.name)

        with CheckpointWriter(partial, layout_of(opened, changed), resume=resume) as writer:
            self.sink = sink = ConvertSink(opened, writer, ledger, changed, make, dense)
            if sink.blocks_done:
                reporter.note(f"resuming: {sink.blocks_done} of {len(opened.structure.blocks)} blocks are done")
            stream = self._stream(method, sink, list(self.by_name), partial, "factorising", reporter)
            found = stream.run(self._batches, self._probe)
            sink.copy_rest()
            shards = writer.finish()
        for name in unreached:
            reporter.warn(f"{name}: {UNREACHED}")
        copy_side_files(opened.source.folder, partial)
        spec = self._spec()
        write_config(partial, opened, spec)
        return Converted(
            spec=spec,
            matrices=self._rows(found.matrices, unreached),
            shards=shards,
            probe=self._probe,
            answer=found.probe,
            prunable=self._prunable(),
            renamed=copied_keys(opened, list(self.by_name.values())),
            told=self._told(),
            needs_training=self._conversion.share_central,
        )

    def _stream(
        self, method: Method, sink: BlockSink, names: Sequence[str], scratch: Path, stage: str, reporter: Reporter
    ) -> BlockStream:
        opened = self._opened
        plan = Plan({name: _Named(0.0, name=name) for name in names})
        store = ActivationStore(activation_limit(opened.recipe.activation_memory), scratch)
        return BlockStream(
            opened.model, opened.structure, opened.binding, opened.reader, sink, method, plan, store, opened.device,
            opened.compute, opened.recipe.seed, reporter, stage,
        )  # fmt: skip

    def _choose_ranks(self, scratch: Path, reporter: Reporter) -> dict[str, int | None]:
        """Spread the budget; a matrix that stays whole is not in the answer."""
        opened, look = self._opened, _Look(self._conversion, self._statistics)
        names = list(opened.specs)
        self._stream(look, Nowhere(opened.reader), names, scratch, "choosing ranks", reporter).run(self._batches)
        for name in (name for name in names if name not in look.curves):  # no token came: looked at without
            weight = opened.specs[name].slices(opened.reader.tensor(opened.key_of(name)))[0].float()
            look.ranks[name], look.curves[name] = self._conversion.curve(name, weight, None)
        trim_memory()
        chosen = spread([look.curves[name] for name in names], self._limit())
        ranks = {name: look.ranks[name][choice] for name, choice in zip(names, chosen, strict=True)}
        return {name: rank for name, rank in ranks.items() if rank is not None}

    def _limit(self) -> int:
        """Parameters that the chosen matrices may have together."""
        share = self._conversion.share
        assert share is not None
        whole = self._opened.whole
        untouched = whole - sum(spec.size for spec in self._opened.specs.values())
        limit = int(share * whole) - untouched
        if limit <= 0:
            raise BudgetError(
                f"{untouched / whole:.1%} of the block parameters are in matrices that are not factorised",
                hint="give a larger share, or loosen --targets and --ignore",
            )
        return limit

    def _spec(self) -> Spec:
        tied = {}
        central = self._conversion.central
        for one in self.by_name.values():
            if one.owner is not None:
                tied[f"{one.module}.{central}"] = f"{one.owner.module}.{central}"
        return Spec("factorized", {one.module: one.entry for one in self.by_name.values()}, tied)

    def _rows(self, found: Sequence[PrunedMatrix], unreached: Mapping[str, None]) -> list[ConvertedMatrix]:
        errors = {matrix.name: matrix.loss for matrix in found}
        rows = []
        for name, spec in self._opened.specs.items():
            one = self.by_name.get(name)
            if one is None:
                rows.append(ConvertedMatrix(name, spec.shape, "dense", spec.size, None, 0.0))
                continue
            ranks = one.entry.get("ranks") or [one.entry["rank"]]
            notes = [UNREACHED] if name in unreached else []
            rows.append(
                ConvertedMatrix(name, spec.shape, one.entry["kind"], one.parameters, max(ranks), errors[name], notes)
            )
        return rows

    def _prunable(self) -> dict[str, int]:
        kept = {k: n for k, n in self._opened.prunable().items() if k not in self._changed}
        return kept | {key: prod(shape) for one in self.by_name.values() for key, shape in one.tensors.values()}

    def _told(self) -> list[str]:
        before = self._opened.whole
        after = sum(self._prunable().values())
        count, whole = len(self.by_name), len(self._opened.specs) - len(self.by_name)
        said = [
            f"{count} matrices became {'two factors' if self._conversion.cores == 2 else 'chains of tensors'}"
            + (f", {whole} stay whole" if whole else "")
            + f": {after:,} parameters in the blocks, before {before:,} ({after / before:.1%})."
        ]
        if after >= before:
            said.append("At this rank factors are larger than the matrices: nothing is saved.")
        if self._conversion.share_central:
            said.append("The middle tensors are tied over the blocks: the model is of no use until it is trained.")
        return said


def prepare(
    conversion: Factorized, opened: Opened, batches: Sequence[Mapping[str, Tensor]],
    probe: Mapping[str, Tensor] | None, reporter: Reporter,
) -> FactorizeWork:  # fmt: skip
    """Check that every chosen matrix can be factorised as asked.

    Raises:
        SecateurError: where one cannot.
    """
    return FactorizeWork(conversion, opened, batches, probe)
