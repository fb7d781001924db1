"""The matrices of a model by block and kind: the first number in a name is the block, the rest is the kind."""

from __future__ import annotations

import re
from collections.abc import Mapping

from secateur.report_result import BlockMap

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def block_map(model: str, sparsity: Mapping[str, float], losses: Mapping[str, float] | None = None) -> BlockMap:
    """A map of all matrices of a model.

    Args:
        sparsity: name of a matrix -> share of its weights that are zero. Several of one block and kind (the matrices of
            experts, named one by one) are put together by their mean.
        losses: name -> what pruning it cost, summed for each block; matrices without one are left out of the sum.
    """
    places = {name: _place(name) for name in sparsity}
    blocks = list(dict.fromkeys(block for block, _ in places.values()))
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    cells: dict[tuple[str, str], list[float]] = {}
    for name, place in places.items():
        cells.setdefault(place, []).append(sparsity[name])
    rows = [[_mean(cells.get((block, kind))) for block in blocks] for kind in kinds]
    loss: list[float | None] = []
    if losses:
        sums: dict[str, float] = {}
        for name, value in losses.items():
            block = _place(name)[0]
            sums[block] = sums.get(block, 0.0) + value
        loss = [sums.get(block) for block in blocks]
    return BlockMap(model, blocks, kinds, rows, loss)


def _place(name: str) -> tuple[str, str]:
    """Block and kind of a matrix: ``model.layers.3.mlp.up_proj.weight`` is (3, mlp.up_proj)."""
    found = _NUMBER.search(name)
    if found is None:
        return "-", name.removesuffix(".weight")
    before, after = name[: found.start()], name[found.end() + 1 :].removesuffix(".weight")
    # Encoder and decoder have a block 0 each: the name of the row stands before it, unless it is the usual one.
    row = "" if before in ("model.layers.", "layers.", "transformer.h.", "h.") else f"{before[:-1]} "
    return f"{row}{found[0]}", _NUMBER.sub("*", after)


def _mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None
