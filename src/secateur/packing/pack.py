"""Packs a matrix: chooses the kind that takes the fewest bytes, and makes its tensors, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.packing.layout import PADDING, WORD, Entry
from secateur.packing.words import popcount, to_words
from secateur.quantise import quantise

BLOCK = 1 << 21
"""Weights that are worked on at once."""
SURPLUS = 1.02
"""2:4 is taken where it fits unless a mask takes fewer bytes by more than this: its rows have a fixed length."""


@dataclass(frozen=True)
class Counts:
    """What was counted in a matrix as it will be stored, rounded if it is rounded."""

    rows: int
    columns: int
    zeros: int
    """Of the matrix as it came."""
    stored_zeros: int
    """After rounding: small weights may become zero."""
    mask_values: int
    """Elements of the values behind a mask."""
    two_of_four: bool
    """Whether every four consecutive columns have at most two weights that are not zero."""
    negative_zeros: int = 0


@dataclass(frozen=True)
class Setting:
    """How values are stored."""

    bits: int
    group_size: int = 0
    dtype: str = "bfloat16"
    """Of 16 bits."""


def count(matrix: Tensor, setting: Setting) -> Counts:
    """Count what decides on the kind.

    Args:
        matrix: (rows, columns), finite.
    """
    rows, columns = matrix.shape
    zeros = stored = values = negative = 0
    two = columns % 4 == 0
    for _, block in _blocks(matrix):
        zeros += int((block == 0).sum())
        numbers, _ = _rounded(block, setting)
        keep = numbers != 0
        negative += int(((block == 0) & torch.signbit(block)).sum())
        stored += keep.numel() - int(keep.sum())
        values += int(_row_lengths(to_words(keep), setting.bits).sum())
        two = two and not bool((keep.reshape(len(keep), -1, 4).sum(-1) > 2).any())
    return Counts(rows, columns, zeros, stored, values, two, negative)


def entries_for(counts: Counts, setting: Setting, *, transposed: bool = False) -> dict[str, Entry]:
    """The entry of every kind that can hold a matrix."""
    rows, columns = counts.rows, counts.columns
    dtype = setting.dtype if setting.bits == 16 else ""
    base = Entry("mask", rows, columns, setting.bits, counts.mask_values, setting.group_size, dtype, transposed)
    found = {"mask": base}
    for kind in ("2:4", "dense"):
        other = replace(base, kind=kind)
        if kind == "dense" or counts.two_of_four:
            found[kind] = replace(other, values=rows * (other.row_values() or 0))
    return found


def best(entries: dict[str, Entry]) -> Entry:
    """The smallest; 2:4 also when it is larger than a mask by a hair."""
    least = min(entries.values(), key=lambda entry: entry.nbytes)
    two = entries.get("2:4")
    return two if two is not None and least.kind == "mask" and two.nbytes <= SURPLUS * least.nbytes else least


def pack(matrix: Tensor, entry: Entry) -> dict[str, Tensor]:
    """The tensors of a matrix.

    Args:
        matrix: (rows, columns), finite; what an entry was made for by `count` and `entries_for`.

    Raises:
        ValueError: when the entry was made for another matrix.
    """
    setting = Setting(entry.bits, entry.group_size, entry.dtype)
    made: dict[str, list[Tensor]] = {part: [] for part in entry.parts()}
    for _, block in _blocks(matrix):
        numbers, scales = _rounded(block, setting)
        keep = numbers != 0
        if entry.kind == "mask":
            words = to_words(keep)
            made["mask"].append(words)
            values = numbers[keep]
            if entry.bits == 4:
                values = _nibbles_of_words(values, words)
        elif entry.kind == "2:4":
            index, values = _two_of_four(numbers)
            made["index"].append(index)
            values = _nibbles(values).reshape(-1) if entry.bits == 4 else values.reshape(-1)
        else:
            values = _nibbles(numbers).reshape(-1) if entry.bits == 4 else numbers.reshape(-1)
        made["values"].append(values)
        if scales is not None:
            made["scales"].append(scales)
    made["values"].append(torch.zeros(PADDING // entry.value_dtype.itemsize, dtype=entry.value_dtype))
    tensors = {part: torch.cat(pieces) for part, pieces in made.items()}
    for part, (dtype, shape) in entry.parts().items():
        if tensors[part].dtype != dtype or tuple(tensors[part].shape) != shape:
            raise ValueError(f"{part} is {tensors[part].dtype} {tuple(tensors[part].shape)}, not {dtype} {shape}")
    return tensors


def _blocks(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    step = max(1, BLOCK // matrix.shape[1])
    for start in range(0, len(matrix), step):
        yield start, matrix[start : start + step]


def _rounded(block: Tensor, setting: Setting) -> tuple[Tensor, Tensor | None]:
    """The numbers as they are stored, and the scales; every zero is a plain zero."""
    if setting.bits < 16:
        return quantise(block, setting.bits, setting.group_size)
    numbers = block.to(getattr(torch, setting.dtype))
    return torch.where(numbers == 0, 0.0, numbers).to(numbers.dtype), None


def _row_lengths(words: Tensor, bits: int) -> Tensor:
    """Elements of the values of each row: (rows,)."""
    counts = popcount(words)
    return ((counts + 1) // 2 if bits == 4 else counts).sum(-1)


def _nibbles(codes: Tensor) -> Tensor:
    """Codes (rows, n) two in a byte, the first in the low half: (rows, ceil(n / 2))."""
    low = codes[:, ::2].view(torch.uint8) & 15
    high = torch.zeros_like(low)
    high[:, : codes.shape[1] // 2] = codes[:, 1::2].view(torch.uint8) & 15
    return low | (high << 4)


def _nibbles_of_words(codes: Tensor, words: Tensor) -> Tensor:
    """The same for the codes behind a mask, where every word of the mask begins a byte."""
    counts = popcount(words).reshape(-1)
    padded = torch.zeros(int((counts + counts % 2).sum()), dtype=torch.int8)
    ends = (counts + counts % 2).cumsum(0)
    keep = torch.ones(len(padded), dtype=torch.bool)
    keep[ends[counts % 2 == 1] - 1] = False
    padded[keep] = codes
    return _nibbles(padded.unsqueeze(0)).reshape(-1)


def _two_of_four(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Indices, two in four bits and two fours in a byte, and the two values of each four: (rows, columns / 2)."""
    rows, columns = numbers.shape
    fours = numbers.reshape(rows, -1, 4)
    # Stable: what is not zero first, in the order of the columns, then zeros to fill up.
    chosen = torch.sort((fours == 0).to(torch.uint8), dim=-1, stable=True).indices[..., :2].sort(-1).values
    values = fours.gather(-1, chosen).reshape(rows, -1)
    small = chosen.to(torch.uint8)
    halves = small[..., 0] | (small[..., 1] << 2)
    padded = torch.zeros(rows, -(-columns // 8) * 2, dtype=torch.uint8)
    padded[:, : columns // 4] = halves
    return padded[:, ::2] | (padded[:, 1::2] << 4), values


assert WORD % 2 == 0  # a row of a dense matrix at 4 bits is packed as one whose words are all full
