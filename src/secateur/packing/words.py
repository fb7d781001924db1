"""Masks as 64-bit words: column j of a row is bit j mod 64 of its word j div 64."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from secateur.packing.layout import WORD

_SHIFTS = [1 << bit for bit in range(8)]
_PAIRS, _FOURS, _EIGHTS, _SUM = 0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F, 0x0101010101010101


def to_words(keep: Tensor) -> Tensor:
    """Pack a mask.

    Args:
        keep: bool, (rows, columns).

    Returns:
        int64, (rows, ceil(columns / 64)); bits behind the last column are zero.
    """
    rows, columns = keep.shape
    padded = torch.zeros(rows, -(-columns // WORD) * WORD, dtype=torch.uint8, device=keep.device)
    padded[:, :columns] = keep
    places = torch.tensor(_SHIFTS, dtype=torch.uint8, device=keep.device)
    return (padded.reshape(rows, -1, 8) * places).sum(-1, dtype=torch.uint8).view(torch.int64)


def from_words(words: Tensor, columns: int) -> Tensor:
    """The mask, bool (rows, columns), of words (rows, n)."""
    octets = words.contiguous().view(torch.uint8).to(torch.int32)
    return _eights(words.device)[octets].view(torch.bool).reshape(len(words), -1)[:, :columns]


@functools.cache
def _eights(device: torch.device) -> Tensor:
    """The eight bits of each byte as eight bytes, seen as one number, which is faster than shifting. int64, (256,)."""
    places = torch.tensor(_SHIFTS, dtype=torch.uint8, device="cpu")  # said, for a caller may have set another default
    bits = (torch.arange(256, dtype=torch.uint8, device="cpu").unsqueeze(1) & places).ne(0)
    return bits.view(torch.int64).reshape(-1).to(device)


def popcount(words: Tensor) -> Tensor:
    """Set bits of each word, uint8 of the same shape."""
    if type(words) is Tensor and words.device.type == "cpu" and not torch.compiler.is_compiling():
        # In one pass: this is what checking a mask takes.
        return torch.from_numpy(np.bitwise_count(words.numpy().view(np.uint64)))
    counts = words - ((words >> 1) & _PAIRS)
    counts = (counts & _FOURS) + ((counts >> 2) & _FOURS)
    return ((((counts + (counts >> 4)) & _EIGHTS) * _SUM) >> 56).to(torch.uint8)


def surplus_bits(words: Tensor, columns: int) -> bool:
    """Whether a bit behind the last column is set."""
    used = columns % WORD
    return used != 0 and bool(((words[:, -1] >> used) & ((1 << (WORD - used)) - 1)).any())
