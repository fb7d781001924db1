"""Allocation rules written from their papers, number by number; and a budgeted choice by trying everything."""

import itertools
import math


def outlier_share(scores, times):
    """Percent of a block's scores above so many times their mean, as a share; scores as one flat list."""
    mean = sum(scores) / len(scores)
    return sum(score > times * mean for score in scores) / len(scores)


def hill(eigenvalues):
    """AlphaPruning's exponent with the start of the tail around the peak of the histogram of logarithms."""
    values = sorted(eigenvalues)
    logs = [math.log(value) for value in values]
    width = (logs[-1] - logs[0]) / 100
    counts = [0] * 100
    for log in logs:
        counts[min(99, int((log - logs[0]) / width))] += 1
    peak = math.exp(logs[0] + counts.index(max(counts)) * width)
    best = None
    for k, start in enumerate(values):
        n = len(values) - k
        if not 0.95 * peak <= start <= 1.5 * peak or n < 2:
            continue
        excess = sum(logs[k:]) - n * math.log(start)
        if excess <= 0:
            continue
        alpha = 1 + n / excess
        distance = max(abs(1 - (value / start) ** (1 - alpha) - i / n) for i, value in enumerate(values[k:]))
        if best is None or distance < best[0]:
            best = (distance, alpha)
    return best[1]


def cheapest(curves, sizes, budget):
    """The least sum of curve values at which there are at least ``budget`` zeros; one point of each curve is taken."""
    return min(
        sum(loss for _, loss in chosen)
        for chosen in itertools.product(*curves)
        if sum(share * size for (share, _), size in zip(chosen, sizes, strict=True)) >= budget - 1e-9
    )
