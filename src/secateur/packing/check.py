"""Checks the tensors of a packed matrix before anything is computed from them."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.packing.layout import Entry, Tensors, bad
from secateur.packing.unpack import row_starts
from secateur.packing.words import popcount, surplus_bits


def check(name: str, entry: Entry, tensors: Tensors) -> Tensor:
    """See that nothing points outside of what is there.

    Returns:
        Where the values of each row begin, as `row_starts`.

    Raises:
        CheckpointError: naming the matrix and what is wrong with it.
    """
    for part, wanted in entry.parts().items():
        found = tensors.get(part)
        if found is None or (found.dtype, tuple(found.shape)) != wanted:
            raise bad(name, f"its tensor {part} is missing, or not of the shape and number format of the header")
    if entry.kind == "mask":
        if surplus_bits(tensors["mask"], entry.columns):
            raise bad(name, "its mask has bits behind the last column")
    elif entry.kind == "2:4":
        _check_index(name, entry, tensors["index"])
    starts = row_starts(entry, tensors)
    if int(starts[-1]) != entry.values:
        raise bad(name, f"its mask asks for {int(starts[-1])} values, it has {entry.values}")
    if bool(tensors["values"][entry.values :].ne(0).any()):
        raise bad(name, "what stands behind its last value is not zero")
    if entry.bits == 4 and bool((_unused_halves(entry, tensors) >> 4).any()):
        raise bad(name, "a half of a byte that has no value is not zero")
    scales = tensors.get("scales")
    if scales is not None and not bool(torch.isfinite(scales).all()):
        raise bad(name, "it has a scale that is not finite")
    return starts


def _check_index(name: str, entry: Entry, index: Tensor) -> None:
    # Two of four columns in each half of a byte; comparing in place of unpacking is several times as fast.
    low = (index & 3) < ((index >> 2) & 3)
    high = ((index >> 4) & 3) < (index >> 6)
    if entry.columns % 8:
        if bool((index[:, -1] >> 4).any()):
            raise bad(name, "its indices of 2:4 go on behind the last column")
        high[:, -1] = True
    if not bool((low & high).all()):
        raise bad(name, "its indices of 2:4 do not ascend")


def _unused_halves(entry: Entry, tensors: Tensors) -> Tensor:
    """The bytes of 4-bit values whose high half is left out, in any order, uint8."""
    values = tensors["values"][: entry.values]
    if entry.kind == "mask":
        counts = popcount(tensors["mask"]).reshape(-1)
        ends = ((counts + 1) // 2).cumsum(0)
        return values[ends[counts % 2 == 1] - 1]
    row = entry.row_values() or 1
    uneven = entry.kind == "dense" and entry.columns % 2
    return values.reshape(-1, row)[:, -1] if uneven else values[:0]
