"""A stream that removes units and then trains what is left of a block; see `secateur.engine.reconstruct`.

Where single weights go, the pruned matrices learn. A matrix that has lost units is small and refitted exactly, so here
every matrix of the block learns, or of its half. What goes is held at zero in the consumers, which keeps all that fed
it from learning, and is cut when the block is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from secateur.engine.blocks import Block
from secateur.engine.paired import Spilled
from secateur.engine.reconstruct import Part, Reconstructing, second_half
from secateur.structured.stream import UnitStream


@dataclass
class ReconstructingUnitStream(Reconstructing[Spilled], UnitStream):
    """A stream that removes units and reconstructs its blocks."""

    def _parts(self, block: Block, final: Mapping[str, Tensor]) -> list[Part]:
        jobs = [job.coupling.consumer for job in self.jobs.get(block.index, ())]
        floating = [matrix.name for matrix in block.matrices if final[matrix.name].is_floating_point()]
        able = [*floating, *self._vectors(block, final)]
        later = second_half(block) if self.halves else ()
        parts = []
        for second in (False, True):
            here = tuple(name for name in jobs if name.startswith(later) == second)
            if here:
                parts.append(Part(here, tuple(name for name in able if name.startswith(later) == second)))
        return parts

    @contextmanager
    def _only(self, block: Block, part: Part) -> Iterator[None]:
        whole = self.jobs
        here = [job for job in whole[block.index] if job.coupling.consumer in part.matrices]
        self.jobs = {**whole, block.index: here}
        try:
            yield
        finally:
            self.jobs = whole
