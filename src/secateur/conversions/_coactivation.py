"""Clusters of neurons that are active together: their graph of co-activation, cut by METIS, made exactly equal."""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.errors import MissingExtraError

TOGETHER = 8
"""So many tokens are one occasion: what is active on it together counts at most once."""
NEIGHBOURS = 64
"""Of the edges of a neuron the strongest so many stay; an edge stays when it is one of them at either end."""
_ROWS = 1 << 23
"""Numbers of the matrix of all pairs that are in memory at a time."""
_HEAVIEST = 255
"""Weight of the strongest edge. METIS takes whole numbers, whose sum must fit into 32 bits."""

Edges = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""Two neurons and a weight for each edge, both ways, sorted by the first and then by the second."""


def check_extra() -> None:
    """See that METIS is there.

    Raises:
        MissingExtraError: saying what to install.
    """
    if importlib.util.find_spec("pymetis") is None:
        raise MissingExtraError("--split coactivation needs pymetis", hint="pip install 'secateur[metis]'")


def coactivation_clusters(activity: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Number of a cluster for each neuron, (neurons,) int64, as many neurons in each; the same for the same seed.

    Args:
        activity: (tokens, neurons), none below zero; ``count`` divides the neurons.
    """
    import pymetis

    neurons, size = activity.shape[1], activity.shape[1] // count
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    if count == 1 or size == 1:
        return torch.arange(neurons) // size
    edges = strongest_edges(activity)
    first, second, weight = edges
    kind = pymetis.zero_copy_dtype()
    graph = pymetis.CSRAdjacency(
        np.searchsorted(first, np.arange(neurons + 1)).astype(kind), second.astype(kind)
    )  # fmt: skip
    cut = pymetis.part_graph(
        count, graph, eweights=weight.astype(kind), options=pymetis.Options(seed=seed, ufactor=1)
    )  # fmt: skip
    return torch.from_numpy(made_equal(edges, np.asarray(cut.vertex_part, dtype=np.int64), count))


def strongest_edges(activity: Tensor) -> Edges:
    """The graph of co-activation: sum over occasions of min(sum over their tokens of a_i a_j, 1), its strongest edges.

    Activities are divided by their root mean square over all tokens and neurons, so that 1 means the same everywhere.

    Args:
        activity: (tokens, neurons), none below zero.
    """
    neurons = activity.shape[1]
    a = activity.float() / activity.float().square().mean().sqrt().clamp(min=1e-30)
    kept = min(NEIGHBOURS, neurons - 1)
    step = max(1, _ROWS // neurons)
    ends, others, strengths = [], [], []
    for start in range(0, neurons, step):
        rows = torch.zeros(min(step, neurons - start), neurons, device=a.device)
        for occasion in a.split(TOGETHER):
            rows += (occasion[:, start : start + step].t() @ occasion).clamp_(max=1)
        here = torch.arange(len(rows), device=a.device)
        rows[here, here + start] = -1
        strongest, other = rows.sort(dim=1, descending=True, stable=True)
        ends.append((here + start)[:, None].expand(-1, kept).reshape(-1).cpu())
        others.append(other[:, :kept].reshape(-1).cpu())
        strengths.append(strongest[:, :kept].reshape(-1).cpu())
    one, two, strength = (torch.cat(parts).numpy() for parts in (ends, others, strengths))
    most = float(strength.max(initial=0.0))
    weight = np.ceil(_HEAVIEST * strength / most).astype(np.int64) if most > 0 else np.zeros(len(one), dtype=np.int64)
    # Both ways and once each; the two ways of a pair may differ in their last bit.
    pairs = np.concatenate([one * neurons + two, two * neurons + one])
    order = np.lexsort((-np.concatenate([weight, weight]), pairs))
    pairs, weights = pairs[order], np.concatenate([weight, weight])[order]
    new = np.append(True, pairs[1:] != pairs[:-1]) & (weights > 0)
    return pairs[new] // neurons, pairs[new] % neurons, weights[new]


def made_equal(edges: Edges, assigned: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """An assignment with as many neurons in each cluster: one by one those move that lose least by it.

    What a neuron loses is the weight of its edges within its cluster less that of its edges into the other one; of
    equals the first moves, to the first.

    Args:
        assigned: (neurons,), a number of a cluster for each; ``count`` divides the neurons.
    """
    first, second, weight = edges
    assigned, size = assigned.copy(), len(assigned) // count
    tied = np.zeros((len(assigned), count), dtype=np.int64)
    np.add.at(tied, (first, assigned[second]), weight)
    starts = np.searchsorted(first, np.arange(len(assigned) + 1))
    while True:
        held = np.bincount(assigned, minlength=count)
        full, room = np.flatnonzero(held > size), np.flatnonzero(held < size)
        if not len(full):
            return assigned
        movable = np.flatnonzero(np.isin(assigned, full))
        gained = tied[np.ix_(movable, room)] - tied[movable, assigned[movable], None]
        at, to = divmod(int(gained.argmax()), len(room))
        neuron, old, new = movable[at], assigned[movable[at]], room[to]
        assigned[neuron] = new
        beside = slice(starts[neuron], starts[neuron + 1])
        tied[second[beside], old] -= weight[beside]
        tied[second[beside], new] += weight[beside]
