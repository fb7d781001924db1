"""Tensor trains: how sizes are split, the decomposition, and its truncation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from secateur.errors import UsageError


def split_size(size: int, parts: int, where: str = "size") -> list[int]:
    """``size`` as a product of ``parts`` factors above 1: the smallest sum, large ones in the middle.

    >>> split_size(576, 5), split_size(1536, 5)
    ([3, 4, 4, 4, 3], [4, 4, 6, 4, 4])

    Raises:
        UsageError: when it has fewer prime factors than that.
    """
    found = min(_products(size, parts, 2), key=lambda factors: (sum(factors), factors[-1]), default=None)
    if found is None:
        raise UsageError(
            f"{where} {size} is no product of {parts} numbers above 1",
            hint="use fewer --cores, or leave the matrix out with --ignore",
        )
    placed = [0] * parts
    ends = [place for k in range(parts) for place in (parts - 1 - k, k)]
    for place, factor in zip(list(dict.fromkeys(ends))[:parts], found, strict=True):
        placed[place] = factor
    return placed


def _products(size: int, parts: int, least: int) -> Iterator[list[int]]:
    """All ascending lists of ``parts`` factors from ``least`` on with this product."""
    if parts == 1:
        if size >= least:
            yield [size]
        return
    factor = least
    while factor**parts <= size:
        if size % factor == 0:
            yield from ([factor, *rest] for rest in _products(size // factor, parts - 1, factor))
        factor += 1


def full_ranks(inputs: Sequence[int], outputs: Sequence[int]) -> list[int]:
    """Ranks of the n - 1 bonds with which every matrix can be written."""
    pairs = [i * o for i, o in zip(inputs, outputs, strict=True)]
    return [min(prod(pairs[:k]), prod(pairs[k:])) for k in range(1, len(pairs))]


def decompose(weight: Tensor, inputs: Sequence[int], outputs: Sequence[int]) -> list[Tensor]:
    """The whole tensor train of a matrix (out, in): cores (r_{k-1}, i_k, o_k, r_k), all but the last orthonormal.

    The basis of each bond is that of the left singular vectors of the matrix unfolded there, the most important first.
    So keeping the first R of each bond (`truncate`) errs at most sqrt(n - 1) times more than the best train of that
    rank.
    """
    count = len(inputs)
    pairs = weight.reshape(*outputs, *inputs)
    rest = pairs.permute([axis for k in range(count) for axis in (count + k, k)]).reshape(1, -1)
    cores = []
    for k in range(count - 1):
        left = rest.shape[0]
        u, s, v = torch.linalg.svd(rest.reshape(left * inputs[k] * outputs[k], -1), full_matrices=False)
        cores.append(u.reshape(left, inputs[k], outputs[k], -1))
        rest = s[:, None] * v
    cores.append(rest.reshape(-1, inputs[-1], outputs[-1], 1))
    return cores


def truncate(cores: Sequence[Tensor], rank: int) -> list[Tensor]:
    """The first ``rank`` of every inner bond."""
    last = len(cores) - 1
    return [
        core[: rank if k else None, :, :, : rank if k < last else None].contiguous() for k, core in enumerate(cores)
    ]
