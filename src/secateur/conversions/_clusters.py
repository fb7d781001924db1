"""Clusters of exactly equal size: k-means whose assignment step may only exchange (balanced k-means)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROUNDS = 100
_LEAST = 1e-9
"""An exchange that gains less, as a share of the largest cost, is rounding."""


def balanced_clusters(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Number of a cluster for each point, (n,) int64, as many points in each; the same for the same seed.

    The sum of squared distances to the centres falls in every round, until no exchange of two points lessens it.

    Args:
        points: (n, d), e.g. (1536, 576); ``count`` divides n.
    """
    x = points.double().cpu().numpy()
    centres = x[_spread_out(x, count, generator)]
    assigned = _greedy(_distances(x, centres), len(x) // count)
    for _ in range(ROUNDS):
        centres = np.stack([x[assigned == cluster].mean(axis=0) for cluster in range(count)])
        if not exchange(_distances(x, centres), assigned):
            break
    return torch.from_numpy(assigned)


def exchange(costs: NDArray[np.float64], assigned: NDArray[np.int64]) -> int:
    """Exchange pairs of points between clusters while that lessens the sum of their costs. Returns how many.

    Args:
        costs: (n, clusters), of each point in each cluster.
        assigned: (n,), changed in place.
    """
    count = costs.shape[1]
    least = _LEAST * max(float(np.abs(costs).max()), 1e-300)
    gains = np.full((count, count), -np.inf)
    best = np.zeros((count, count), dtype=np.int64)

    def look(cluster: int) -> None:
        """What the best of a cluster gain by going to each other one."""
        members = np.flatnonzero(assigned == cluster)
        gained = costs[members, cluster, None] - costs[members]
        best[cluster] = members[gained.argmax(axis=0)]
        gains[cluster] = gained.max(axis=0)
        gains[cluster, cluster] = -np.inf

    for cluster in range(count):
        look(cluster)
    done = 0
    while count > 1:
        both = gains + gains.T
        here, there = divmod(int(both.argmax()), count)
        if both[here, there] <= least:
            break
        assigned[best[here, there]], assigned[best[there, here]] = there, here
        look(here)
        look(there)
        done += 1
    return done


def _distances(x: NDArray[np.float64], centres: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared distances (n, clusters), but for what is the same in all clusters."""
    found: NDArray[np.float64] = (centres**2).sum(axis=1) - 2 * x @ centres.T
    return found


def _spread_out(x: NDArray[np.float64], count: int, generator: torch.Generator) -> list[int]:
    """Points to begin with, each drawn by its squared distance from those before it (k-means++)."""
    draws = torch.rand(count, generator=generator, dtype=torch.float64).numpy()
    chosen = [int(draws[0] * len(x))]
    nearest = ((x - x[chosen[0]]) ** 2).sum(axis=1)
    for draw in draws[1:]:
        nearest[chosen] = 0.0
        total = nearest.cumsum()
        if total[-1] > 0:
            new = int(np.searchsorted(total, draw * total[-1], side="right").clip(max=len(x) - 1))
        else:  # all others are copies of those
            new = next(point for point in range(len(x)) if point not in chosen)
        chosen.append(new)
        nearest = np.minimum(nearest, ((x - x[new]) ** 2).sum(axis=1))
    return chosen


def _greedy(costs: NDArray[np.float64], size: int) -> NDArray[np.int64]:
    """An assignment with ``size`` points in each cluster: the nearest pairs first, as long as there is room."""
    assigned = np.full(len(costs), -1, dtype=np.int64)
    room = [size] * costs.shape[1]
    for pair in np.argsort(costs, axis=None, kind="stable"):
        point, cluster = divmod(int(pair), costs.shape[1])
        if assigned[point] < 0 and room[cluster]:
            assigned[point] = cluster
            room[cluster] -= 1
    return assigned
