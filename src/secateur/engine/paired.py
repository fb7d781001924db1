"""Two rows of forwards side by side: one through the dense weights, one through what has become of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import torch

from secateur.engine.activations import Watcher
from secateur.engine.binding import TensorReader
from secateur.engine.blocks import Block
from secateur.engine.capture import AtBlock, Lane
from secateur.engine.skeleton import drop_tensor
from secateur.engine.stream import BlockStream, Inputs, StreamResult
from secateur.result import PrunedMatrix


class Spilled:
    """What a dense forward leaves behind for one batch; it can be spilled like the activations of a forward."""

    def __init__(self) -> None:
        self.watcher = Watcher()
        self.output: torch.Tensor | None = None
        """What the dense block gave, where that is wanted."""

    def take_output(self, lane: Lane) -> None:
        """Keep what the block gave to a forward that has just left it."""
        self.output, lane.output = lane.output, None
        assert self.output is not None
        self.watcher.remember(self.output)


Kept = TypeVar("Kept", bound=Spilled)


@dataclass
class PairedStream(BlockStream, Generic[Kept]):
    """A stream that knows, while it works on a block, what the dense model has there: ``targets``, one for each batch.

    ``teacher`` reads the dense weights; it has the names and shapes of the model.
    """

    teacher: TensorReader | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.targets: list[Kept] = []
        self.observes_dense = False
        """Whether the dense forwards pause at matrices as well."""
        self._dense: list[Lane] = []

    def run(self, batches: Sequence[Inputs], probe: Inputs | None = None) -> StreamResult:
        """As `BlockStream.run`, with a dense forward for every batch."""
        self._dense = [self._lane(batch, observed=self.observes_dense) for batch in batches]
        try:
            return super().run(batches, probe)
        finally:
            for lane in self._dense:
                lane.stop()

    def _block(self, block: Block, lanes: list[Lane], prober: Lane | None) -> list[PrunedMatrix]:
        self.targets = self._dense_outputs(block)
        try:
            return super()._block(block, lanes, prober)
        finally:
            for target in self.targets:
                self.store.forget(target.watcher)
            self.targets = []

    def _through(self, lane: Lane) -> Kept:
        """Take one dense forward through the block it stands at; what shall be kept of it."""
        kept = Spilled()
        lane.keep_output = True
        self._advance(lane)
        lane.keep_output = False
        kept.take_output(lane)
        return cast("Kept", kept)

    def _dense_outputs(self, block: Block) -> list[Kept]:
        """Take the dense forwards through a block; what is kept of each of them."""
        assert self.teacher is not None
        ours, self.source = self.source, self.teacher
        names = [name for name in block.tensors if self.binding.bound(name)]
        try:
            for lane in self._dense:
                if lane.event is None:  # from the start of the model to its first block
                    self._advance(lane)
            self._release_outside()
            here = [lane for lane in self._dense if lane.event == AtBlock(block.index)]
            if here:
                self._install(block, self.binding.load(names, self.teacher), self.compute_dtype)
            outputs = []
            for lane in here:
                outputs.append(self._through(lane))
                self.store.park(outputs[-1].watcher)
            return outputs
        finally:
            self._release_outside()
            self.source = ours
            for name in names:
                drop_tensor(self.model, name)
