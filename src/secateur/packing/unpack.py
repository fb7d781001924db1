"""Unpacks rows of a packed matrix. It runs on any device; what it reads must have passed `check`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from secateur.packing.layout import Entry, Tensors
from secateur.packing.words import from_words, popcount
from secateur.quantise import expand_scales

BLOCK = 1 << 21
"""Weights that are unpacked at once."""


def row_starts(entry: Entry, tensors: Tensors) -> Tensor:
    """Where the values of each row begin, and after the last where they end: int64, (rows + 1,)."""
    if entry.kind == "mask":
        counts = popcount(tensors["mask"])
        lengths = ((counts + 1) // 2 if entry.bits == 4 else counts).sum(-1)
    else:
        lengths = torch.full((entry.rows,), entry.row_values() or 0, device=tensors["values"].device)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def row_blocks(entry: Entry, size: int = BLOCK) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) row of blocks of at most ``size`` weights, or of one row."""
    step = max(1, size // entry.columns)
    for first in range(0, entry.rows, step):
        yield first, min(first + step, entry.rows)


def unpack_rows(entry: Entry, tensors: Tensors, starts: Tensor, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Some rows of the matrix.

    Args:
        starts: of `row_starts`.

    Returns:
        (last - first, columns).
    """
    begin, end = int(starts[first]), int(starts[last])
    stored = tensors["values"][begin:end]
    rows = last - first
    if entry.kind == "mask":
        words = tensors["mask"][first:last]
        numbers = _codes_of_words(stored, words) if entry.bits == 4 else stored
        keep = from_words(words, entry.columns)
        found = torch.zeros(keep.shape, dtype=numbers.dtype, device=stored.device).masked_scatter_(keep, numbers)
    elif entry.kind == "2:4":
        found = _from_fours(entry, stored.reshape(rows, -1), tensors["index"][first:last])
    else:
        found = stored.reshape(rows, -1)
        if entry.bits == 4:
            found = _codes(found)[:, : entry.columns]
    if entry.bits == 16:
        return found.to(dtype)
    return (found.float() * expand_scales(tensors["scales"][first:last], entry.columns, entry.group_size)).to(dtype)


def gather_rows(entry: Entry, tensors: Tensors, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Single rows of a matrix of the kind dense, in any order.

    Args:
        rows: int64, any shape.

    Returns:
        (*rows.shape, columns).
    """
    flat = rows.reshape(-1)
    # index_select, unlike an index, refuses negative numbers
    stored = tensors["values"][: entry.values].reshape(entry.rows, -1).index_select(0, flat)
    found = _codes(stored)[:, : entry.columns] if entry.bits == 4 else stored
    if entry.bits < 16:
        found = found.float() * expand_scales(tensors["scales"][flat], entry.columns, entry.group_size)
    return found.to(dtype).reshape(*rows.shape, entry.columns)


def unpack(entry: Entry, tensors: Tensors, dtype: torch.dtype, starts: Tensor | None = None) -> Tensor:
    """The whole matrix, (rows, columns)."""
    starts = row_starts(entry, tensors) if starts is None else starts
    whole = torch.empty(entry.rows, entry.columns, dtype=dtype, device=tensors["values"].device)
    for first, last in row_blocks(entry):
        whole[first:last] = unpack_rows(entry, tensors, starts, first, last, dtype)
    return whole


def count_nonzero(entry: Entry, tensors: Tensors) -> int:
    """How many of the stored numbers are not zero; all that are not stored are zero."""
    stored = tensors["values"]
    if entry.bits != 4:
        return int(stored.count_nonzero())
    return int((stored & 15).count_nonzero()) + int((stored >> 4).count_nonzero())


def _codes(octets: Tensor) -> Tensor:
    """The two signed numbers of each byte, low half first: int8, (..., 2 n)."""
    signed = octets.view(torch.int8)
    low = (signed << 4) >> 4  # the shift to the right repeats the sign
    return torch.stack([low, signed >> 4], dim=-1).reshape(*octets.shape[:-1], -1)


def _codes_of_words(octets: Tensor, words: Tensor) -> Tensor:
    """The numbers behind a mask; a word with an odd number of them leaves half a byte unused."""
    counts = popcount(words).reshape(-1)
    codes = _codes(octets)
    keep = torch.ones(len(codes), dtype=torch.bool, device=codes.device)
    odd = counts % 2 == 1
    keep[(counts + counts % 2).cumsum(0)[odd] - 1] = False
    return codes[keep]


def _from_fours(entry: Entry, stored: Tensor, index: Tensor) -> Tensor:
    rows, fours = len(stored), entry.columns // 4
    numbers = (_codes(stored) if entry.bits == 4 else stored).reshape(rows, -1, 2)
    places = two_of_four_places(index, fours)
    found = torch.zeros(rows, fours, 4, dtype=numbers.dtype, device=numbers.device)
    return found.scatter_(-1, places.to(torch.int64), numbers).reshape(rows, -1)


def two_of_four_places(index: Tensor, fours: int) -> Tensor:
    """The columns within each four that have a value: uint8, (rows, fours, 2)."""
    halves = torch.stack([index & 15, index >> 4], dim=-1).reshape(len(index), -1)[:, :fours]
    return torch.stack([halves & 3, halves >> 2], dim=-1)
