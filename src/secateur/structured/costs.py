"""What blocks and units cost, as a sum: outside the blocks, each block, and each unit of a block.

    cost = outside + sum over the blocks that stay of (block - sum over the kinds of unit·(units removed))

For parameters and bytes this is exact, since the structures cut different tensors, or different slices of them; for the
seconds of a decoding step it is a line through measured points.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from secateur.checkpoint.dtypes import NAMES
from secateur.checkpoint.writer import Entry, Layout, ShardLayout
from secateur.engine.binding import Binding
from secateur.engine.blocks import Structure
from secateur.structured.configure import Shapes
from secateur.structured.couplings import Coupling, Kind
from secateur.structured.plan import weights_of_unit

ByBlock = Mapping[int, Sequence[Coupling]]
"""Block -> its couplings, of those kinds that may be cut."""


@dataclass(frozen=True)
class Cost:
    """A cost in some unit, and how it falls with blocks and units."""

    outside: float
    blocks: Sequence[float]
    units: Sequence[Mapping[Kind, float]]
    """By block and kind: what one unit costs."""
    before: Mapping[Kind, int]
    """By kind: units of a block."""

    def of(self, gone: Collection[int] = (), kept: Mapping[Kind, int] | None = None) -> float:
        """The cost without some blocks, where ``kept`` units of each block stay (of kinds not named: all)."""
        removed = {kind: self.before[kind] - count for kind, count in (kept or {}).items()}
        skip = frozenset(gone)
        total = self.outside
        for index, (whole, units) in enumerate(zip(self.blocks, self.units, strict=True)):
            if index not in skip:
                total += whole - sum(units.get(kind, 0.0) * count for kind, count in removed.items())
        return total


def parameter_cost(structure: Structure, couplings: ByBlock, shapes: Shapes) -> Cost:
    """Prunable parameters: the weights of all matrices in the blocks."""
    units = [
        {coupling.kind: float(weights_of_unit(coupling, shapes)) for coupling in couplings[block.index]}
        for block in structure.blocks
    ]
    return Cost(
        0.0, [float(sum(matrix.size for matrix in block.matrices)) for block in structure.blocks], units,
        units_of(couplings),
    )  # fmt: skip


def byte_cost(layout: Layout, structure: Structure, binding: Binding, couplings: ByBlock, shapes: Shapes) -> Cost:
    """Bytes of the weights files, headers included: never less than what is written, by some bytes of a header more.

    Args:
        layout: of the whole model, in the number format that is written.
    """
    # Empty files are their headers, padded to a multiple of 8 bytes; a full header may need 8 more.
    outside = sum(ShardLayout(shard.name, (), shard.metadata).nbytes + 8 for shard in layout.shards)
    end = layout.nbytes

    def stored(entry: Entry) -> float:
        place = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [end, end]}
        return entry.nbytes + len(json.dumps({entry.key: place}))

    return _of_tensors(layout, structure, binding, couplings, shapes, stored, outside)


def number_cost(layout: Layout, structure: Structure, binding: Binding, couplings: ByBlock, shapes: Shapes) -> Cost:
    """All parameters, outside the blocks as well: floating-point numbers in the files."""

    def stored(entry: Entry) -> float:
        return float(math.prod(entry.shape)) if entry.dtype.is_floating_point else 0.0

    return _of_tensors(layout, structure, binding, couplings, shapes, stored, 0.0, bytes_each=False)


def _of_tensors(
    layout: Layout, structure: Structure, binding: Binding, couplings: ByBlock, shapes: Shapes,
    stored: Callable[[Entry], float], outside: float, *, bytes_each: bool = True,
) -> Cost:  # fmt: skip
    left = {entry.key: entry for shard in layout.shards for entry in shard.entries}
    blocks, units = [], []
    for block in structure.blocks:
        own = {key: left.pop(key) for key in binding.keys_of(block.tensors) if key in left}
        blocks.append(sum(map(stored, own.values())))
        each: dict[Kind, float] = {}
        for coupling in couplings[block.index]:
            total = 0
            for cut in coupling.cuts:
                shape = shapes[cut.name]
                size = own[binding.unit_of(cut.name).keys[0]].dtype.itemsize if bytes_each else 1
                total += math.prod(shape) // shape[cut.dim] * cut.indices.shape[1] * size
            each[coupling.kind] = float(total)
        units.append(each)
    return Cost(outside + sum(map(stored, left.values())), blocks, units, units_of(couplings))


def decode_cost(
    blocks: int, before: Mapping[Kind, int], whole: float, shallow: tuple[int, float] | None,
    narrow: Mapping[Kind, tuple[int, float]],
) -> Cost:  # fmt: skip
    """Seconds of one decoding step: a line through the steps of the whole model and of one smaller in each direction.

    Args:
        whole: seconds of a step of the whole model.
        shallow: blocks of a shallower model and the seconds of its step; None where blocks cannot go.
        narrow: by kind, units of a narrower model's blocks and the seconds of its step.
    """
    block = max(0.0, (whole - shallow[1]) / (blocks - shallow[0])) if shallow else 0.0
    units = {
        kind: max(0.0, (whole - seconds) / (blocks * (before[kind] - left))) for kind, (left, seconds) in narrow.items()
    }
    return Cost(whole - blocks * block, [block] * blocks, [units] * blocks, before)


def units_of(couplings: ByBlock) -> dict[Kind, int]:
    """By kind: units of a block."""
    return {coupling.kind: coupling.units for block in couplings.values() for coupling in block}
