"""Spearman's rank correlation, with a bootstrap interval."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's correlation and its 95 % interval; None where one side has no two different values."""

    value: float | None
    interval: tuple[float, float] | None


def spearman(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Pearson correlation of the ranks of two arrays (n,); equal values share their mean rank. NaN for a constant."""
    return _correlation(_grouped(first), _grouped(second), np.ones(len(first)))


def with_interval(first: NDArray[Any], second: NDArray[Any], weights: Iterable[NDArray[Any]]) -> RankCorrelation:
    """Spearman's correlation of two arrays (n,), and the percentile interval over resamples.

    Args:
        weights: for each resample, how often each position was drawn, (n,) whole numbers. Ranks of a resample are
            counted from the sorted order of the whole, so that nothing is sorted again.
    """
    grouped = _grouped(first), _grouped(second)
    value = _correlation(*grouped, np.ones(len(first)))
    drawn = np.array([_correlation(*grouped, weight) for weight in weights])
    drawn = drawn[np.isfinite(drawn)]
    if math.isnan(value) or not len(drawn):
        return RankCorrelation(None if math.isnan(value) else value, None)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return RankCorrelation(value, (float(low), float(high)))


_Grouped = tuple[NDArray[np.int64], int]


def _grouped(values: NDArray[Any]) -> _Grouped:
    """For each position the number of its value among the sorted different values, and how many those are."""
    different, inverse = np.unique(values, return_inverse=True)
    return inverse.reshape(-1), len(different)


def _correlation(first: _Grouped, second: _Grouped, weights: NDArray[Any]) -> float:
    """Spearman's correlation where position i occurs ``weights[i]`` times."""
    centred = []
    for group, count in (first, second):
        mass = np.bincount(group, weights, minlength=count)
        if np.count_nonzero(mass) < 2:
            return math.nan
        rank = (np.cumsum(mass) - mass + (mass + 1) / 2)[group]
        centred.append(rank - weights @ rank / weights.sum())
    ours, theirs = centred
    return float(weights @ (ours * theirs) / math.sqrt((weights @ ours**2) * (weights @ theirs**2)))
