"""What structures cost a model, measured on it in memory: each alone, blocks in order, and whole splits."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur.checkpoint.source import Source
from secateur.engine.activations import ActivationStore
from secateur.engine.device import activation_limit, trim_memory
from secateur.engine.forward import Stored
from secateur.engine.plan import Plan
from secateur.engine.stream import Inputs
from secateur.measure.model import load_model
from secateur.plugins import Criterion, make_method
from secateur.progress import Recorder
from secateur.recipe import Recipe
from secateur.structured.block_choice import greedy_order, skipping
from secateur.structured.budget import Curve, Split, splits
from secateur.structured.configure import noun
from secateur.structured.costs import Cost, units_of
from secateur.structured.couplings import Kind
from secateur.structured.ladder import Discard, LadderStream, Tensors, TrialStream, first, jobs_for, replaced
from secateur.structured.offers import Offers
from secateur.verbs.loss import measured_loss

if TYPE_CHECKING:
    from secateur.verbs.shape import Model

ORDER_TOKENS = 1024
"""Calibration tokens that the order of blocks is found on."""
AMONG = 8
"""Blocks that are tried again for each block that goes, after the first."""


class LossBench:
    """The model in memory, and what is measured on it."""

    def __init__(
        self, recipe: Recipe, source: Source, model: Model, offers: Offers, criterion: Criterion, fit: list[Inputs],
        held: list[Inputs], device: torch.device, compute: torch.dtype, reporter: Recorder,
    ) -> None:  # fmt: skip
        self._recipe, self._model, self._offers, self._criterion = recipe, model, offers, criterion
        self._fit, self._held, self._device, self._compute = fit, held, device, compute
        self._reporter = reporter
        self._scratch = tempfile.TemporaryDirectory(prefix="secateur-")
        self._whole = load_model(source.folder, device=str(device), dtype="float32")
        self._loss, self.unit = measured_loss(self._whole, held, device, compute, reporter)
        self.dense = self._loss()

    def close(self) -> None:
        """Free the model."""
        del self._whole, self._loss
        self._scratch.cleanup()
        trim_memory()

    def _excess(self) -> float:
        value = self._loss() - self.dense
        return value if math.isfinite(value) else math.inf

    def curves(self, sizes: Mapping[Kind, Sequence[int]]) -> dict[Kind, Curve]:
        """The loss of every kind alone, at each of the sizes."""
        if not sizes:
            return {}
        stream = self._stream(LadderStream, "refitting at several sizes", jobs=jobs_for(self._offers.couplings, sizes))
        stream.run(self._fit)
        points: dict[Kind, dict[int, float]] = {kind: {} for kind in sizes}
        self._reporter.stage("measuring sizes", len(stream.made))
        for kind, size in list(stream.made):
            with replaced(self._whole, stream.made.pop((kind, size))):
                points[kind][size] = self._excess()
            self._reporter.advance(f"{size} {noun(kind)}")
        before = units_of(self._offers.couplings)
        return {kind: Curve.through(points[kind], before[kind]) for kind in sizes}

    def order(self, cost: Cost, limit: float, curves: Mapping[Kind, Curve]) -> tuple[list[int], list[float]]:
        """Blocks in the order in which they go, and the loss after each.

        It ends where blocks alone meet the budget, or cost more than the best split that is known.
        """
        total = len(self._model.structure.blocks)
        few = first(self._held, ORDER_TOKENS)
        search, _ = measured_loss(self._whole, few, self._device, self._compute, self._reporter)
        order: list[int] = []
        depth: list[float] = []
        self._reporter.stage("leaving out blocks", total)
        removal = greedy_order(self._whole, self._model.structure, search, self._reporter, among=AMONG)
        with contextlib.closing(removal):
            for index, _ in removal:
                order.append(index)
                depth.append(self._excess())
                found = splits(cost, limit, order, depth, self._offers.sizes, curves)
                if cost.of(order) <= limit or (found and found[0].predicted <= depth[-1]):
                    break
                self._reporter.stage("leaving out blocks", min(AMONG, total - len(order)))
        return order, depth

    def trials(self, chosen: Sequence[Split]) -> list[float | None]:
        """The loss of whole splits, carried out on the text to refit on."""
        measured: list[float | None] = []
        for number, split in enumerate(chosen, start=1):
            made: Tensors = {}
            if split.kept:
                sizes = {kind: [size] for kind, size in split.kept.items()}
                gone = frozenset(split.gone)
                stage = f"trying split {number} of {len(chosen)}"
                stream = self._stream(TrialStream, stage, jobs=jobs_for(self._offers.couplings, sizes, gone), gone=gone)
                stream.run(self._fit)
                made = stream.made
            skipped: set[int] = set()
            with skipping(self._whole, self._model.structure, skipped), replaced(self._whole, made):
                if 0 in split.gone:
                    self._loss()  # shows what a block returns before the first one is skipped
                skipped.update(split.gone)
                measured.append(finite(self._excess()))
        return measured

    def _stream(self, kind: type[Any], stage: str, **more: Any) -> Any:
        model, stored = self._model, Stored(self._model.reader)
        store = ActivationStore(activation_limit(self._recipe.activation_memory), Path(self._scratch.name))
        return kind(
            model.skeleton, model.structure, model.binding, stored, Discard(stored), make_method("magnitude"), Plan(),
            store, self._device, self._compute, self._recipe.seed, self._reporter, stage, criterion=self._criterion,
            update=self._recipe.update, **more,
        )  # fmt: skip


def finite(value: float) -> float | None:
    """A number that JSON can hold."""
    return value if math.isfinite(value) else None
