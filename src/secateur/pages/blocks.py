"""The matrices of a model by block and kind: the first number in a name is the block, the rest is the kind."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from secateur.report_result import BlockMap
from secateur.result import PruneResult

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


def told_gone(result: PruneResult) -> list[str]:
    """What a pruning removed as a whole: the share of the weights, the blocks that stayed, the sizes that are left."""
    if not (result.recipe.get("structure") or result.blocks_kept or result.shape_changes):
        return []
    told = [f"{result.sparsity:.1%} of the prunable weights went in whole units"]
    if result.blocks_kept is not None:
        told.append(f"blocks that stayed, by their number in the source: {_spans(result.blocks_kept)}")
    return told + [f"{key} is {value}" for key, value in result.shape_changes.items() if not isinstance(value, list)]


def _spans(numbers: Sequence[int]) -> str:
    """0-3, 5, 7-8: numbers that follow each other are told by their ends."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


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
