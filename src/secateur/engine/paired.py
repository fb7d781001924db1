"""Two rows of forwards side by side: one through the dense weights, one through what has become of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from secateur.engine.activations import Watcher
from secateur.engine.binding import TensorReader
from secateur.engine.blocks import Block
from secateur.engine.capture import AtBlock, Lane
from secateur.engine.skeleton import drop_tensor
from secateur.engine.stream import BlockStream, Inputs, StreamResult
from secateur.result import PrunedMatrix


class DenseOutput:
    """What the dense block gave for one batch; it can be spilled like the activations of a forward."""

    def __init__(self, output: torch.Tensor) -> None:
        self.output = output
        self.watcher = Watcher()
        self.watcher.remember(output)


@dataclass
class PairedStream(BlockStream):
    """A stream that knows, while it works on a block, what the dense model has there: ``targets``, one for each batch.

    ``teacher`` reads the dense weights; it has the names and shapes of the model.
    """

    teacher: TensorReader | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.targets: list[DenseOutput] = []
        self._dense: list[Lane] = []

    def run(self, batches: Sequence[Inputs], probe: Inputs | None = None) -> StreamResult:
        """As `BlockStream.run`, with a dense forward for every batch."""
        self._dense = [self._lane(batch, observed=False) for batch in batches]
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

    def _dense_outputs(self, block: Block) -> list[DenseOutput]:
        """Take the dense forwards through a block; what it gave each of them."""
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
                lane.keep_output = True
                self._advance(lane)
                outputs.append(DenseOutput(lane.output))
                lane.keep_output, lane.output = False, None
                self.store.park(outputs[-1].watcher)
            return outputs
        finally:
            self._release_outside()
            self.source = ours
            for name in names:
                drop_tensor(self.model, name)
