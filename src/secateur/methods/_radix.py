"""The smallest weights of many matrices, found in two passes without holding more than one of them.

The bits of a float32 that is not negative sort like the number itself. The first pass counts the upper bits of all
|w|, which tells the bin of the threshold; the second counts the lower bits inside that bin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from secateur.errors import WeightValueError
from secateur.masks import zero_count

_LOW_BITS = 13
_LOW_BINS = 1 << _LOW_BITS
_HIGH_BINS = 1 << (31 - _LOW_BITS)
_FIRST_NOT_FINITE = 0x7F800000 >> _LOW_BITS
_CHUNK = 1 << 22


def lowest_counts(names: Sequence[str], load: Callable[[str], Tensor], sparsity: float) -> dict[str, int]:
    """How many of the globally smallest round(sparsity·total) weights lie in each matrix.

    Ties go by the order of ``names``. ``load`` is called twice for each name.

    Raises:
        WeightValueError: when a weight is NaN or infinite; the matrix is named.
    """
    high = torch.zeros(_HIGH_BINS, dtype=torch.int64)
    for name in names:
        counts = torch.zeros_like(high)
        for bits in _magnitude_bits(load(name)):
            counts += torch.bincount(bits >> _LOW_BITS, minlength=_HIGH_BINS).cpu()
        if int(counts[_FIRST_NOT_FINITE:].sum()):
            raise WeightValueError(f"{name} holds NaN or infinity", hint="the source is damaged; get it anew")
        high += counts
    k = zero_count(sparsity, int(high.sum()))
    if k == 0:
        return dict.fromkeys(names, 0)
    threshold_bin, rest = _bin_of(high, k)

    below: dict[str, int] = {}
    low: dict[str, Tensor] = {}
    for name in names:
        below[name], low[name] = 0, torch.zeros(_LOW_BINS, dtype=torch.int64)
        for bits in _magnitude_bits(load(name)):
            upper = bits >> _LOW_BITS
            below[name] += int((upper < threshold_bin).sum())
            inside = bits[upper == threshold_bin] & (_LOW_BINS - 1)
            low[name] += torch.bincount(inside, minlength=_LOW_BINS).cpu()
    everything = torch.zeros(_LOW_BINS, dtype=torch.int64)
    for counts in low.values():
        everything += counts
    last, ties = _bin_of(everything, rest)  # ties: how many weights equal to the threshold go
    result = {}
    for name in names:
        equal = min(ties, int(low[name][last]))
        ties -= equal
        result[name] = below[name] + int(low[name][:last].sum()) + equal
    return result


def _magnitude_bits(weight: Tensor) -> Iterator[Tensor]:
    """Bits of |w| as int32, chunk by chunk, so that the temporaries stay small."""
    for chunk in weight.detach().reshape(-1).split(_CHUNK):
        yield chunk.float().contiguous().view(torch.int32) & 0x7FFFFFFF


def _bin_of(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th smallest (k from 1), and how many of that bin belong to the k smallest."""
    total = counts.cumsum(0)
    index = int(torch.searchsorted(total, k))
    return index, k - int(total[index] - counts[index])
