"""Symmetric rounding to 8 or 4 bits: a weight is code times scale, and zero stays zero.

Scales are bfloat16, so that a code of 8 bits times its scale is exact in float32. At 8 bits codes are -127 .. 127 and
the scale is the largest weight by 127, rounded up. At 4 bits codes are -8 .. 7; of several scales, of either sign, that
with the smallest squared error is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SHRINK = (1.0, 0.93, 0.86, 0.79)
"""At 4 bits: how far the largest weight may be cut to make the others finer."""
LIMITS = {8: (-127, 127), 4: (-8, 7)}


def quantise(matrix: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes and scales.

    Args:
        matrix: (rows, columns), any floating dtype, finite.
        bits: 8 or 4.
        group_size: columns that share a scale; 0 is the row.

    Returns:
        Codes, int8 (rows, columns), and scales, bfloat16 (rows, groups).
    """
    rows, columns = matrix.shape
    values = _grouped(matrix, group_size)
    low, high = torch.aminmax(values, dim=-1)
    largest = torch.maximum(high, -low)
    if bits == 8:
        scales = _up(largest / 127)
    else:
        # The extreme gets code -8, so that the scale has the other sign than it.
        signed = torch.where(high >= -low, -largest, largest)
        candidates = [_up(signed * shrink / 8) for shrink in _SHRINK] + [_up(largest / 7)]
        scales = candidates[0]
        least = torch.full_like(largest, torch.inf)
        for candidate in candidates:
            error = (_codes(values, candidate, bits) * candidate.float().unsqueeze(-1) - values).square().sum(-1)
            scales = torch.where(error < least, candidate, scales)
            least = torch.minimum(error, least)
    codes = _codes(values, scales, bits).reshape(rows, -1)[:, :columns].to(torch.int8)
    return codes, scales


def settled(matrix: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """As `quantise`, but what comes out is its own rounding: given to `quantise`, codes times scales come back exactly.

    At 4 bits that is so anyway. At 8 bits it takes a code of 127 in every group: where the scale was rounded up so far
    that there is none, the next smaller bfloat16 takes its place, and the largest weight is cut by a step at most.
    """
    codes, scales = quantise(matrix, bits, group_size)
    if bits == 4:
        return codes, scales
    rows, columns = matrix.shape
    values = _grouped(matrix, group_size)
    short = _grouped(codes, group_size).abs().amax(-1) < 127
    size = scales.view(torch.int16)  # of two scales that are not negative, the larger has the larger number
    scales = torch.where(short & (size > 1), (size - 1).view(torch.bfloat16), scales)
    return _codes(values, scales, bits).reshape(rows, -1)[:, :columns].to(torch.int8), scales


def expand_scales(scales: Tensor, columns: int, group_size: int) -> Tensor:
    """One scale for each column in float32, (rows, columns), or (rows, 1) where a row has one."""
    if scales.shape[1] == 1:
        return scales.float()
    return scales.float().repeat_interleave(group_size, dim=1)[:, :columns]


def _grouped(matrix: Tensor, group_size: int) -> Tensor:
    """(rows, groups, size) float32, with zeros behind the last column."""
    rows, columns = matrix.shape
    size = group_size or columns
    groups = -(-columns // size)
    values = torch.zeros(rows, groups * size, dtype=torch.float32, device=matrix.device)
    values[:, :columns] = matrix
    return values.reshape(rows, groups, size)


def _codes(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    low, high = LIMITS[bits]
    wide = scales.float().unsqueeze(-1)
    return torch.where(wide == 0, 0.0, values / torch.where(wide == 0, 1.0, wide)).round().clamp(low, high)


def _up(scale: Tensor) -> Tensor:
    """The nearest bfloat16 that is no smaller in size, so that the largest weight needs no larger code."""
    narrow = scale.to(torch.bfloat16)
    short = narrow.float().abs() < scale.abs()
    return torch.where(short, (narrow.view(torch.int16) + 1).view(torch.bfloat16), narrow)
