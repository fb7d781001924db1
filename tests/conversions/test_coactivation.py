"""The graph of co-activation against its formula, planted communities, and clusters that are exactly equal."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn

from secateur.conversions import _coactivation
from secateur.conversions._coactivation import coactivation_clusters, made_equal, strongest_edges
from secateur.conversions.moe import Moe
from secateur.errors import MissingExtraError
from tests.conversions.test_moe import Plain, layer_of


def needs_metis() -> None:
    pytest.importorskip("pymetis", reason="the extra 'metis' is not installed")


def communities(
    groups: int, size: int, tokens: int, seed: int = 0, noise: float = 0.02
) -> tuple[torch.Tensor, torch.Tensor]:
    """Activity in which a token has most neurons of one group active and few others; and the group of each neuron."""
    generator = torch.Generator().manual_seed(seed)
    belongs = torch.arange(groups).repeat_interleave(size)[torch.randperm(groups * size, generator=generator)]
    topic = torch.randint(0, groups, (tokens,), generator=generator)
    chance = torch.where(belongs[None] == topic[:, None], 0.8, noise)
    active = torch.rand(tokens, groups * size, generator=generator) < chance
    return active * torch.rand(active.shape, generator=generator), belongs


@pytest.mark.parametrize("rows", [1, 1 << 23])
def test_edges_are_the_strongest_of_the_formula(rows, monkeypatch):
    monkeypatch.setattr(_coactivation, "NEIGHBOURS", 3)
    monkeypatch.setattr(_coactivation, "_ROWS", rows)  # one row at a time, or all at once
    activity = torch.rand(21, 9, generator=torch.Generator().manual_seed(0)).square()
    activity[:, 4] = 0
    a = activity.double().numpy()
    a = a / np.sqrt((a**2).mean())
    counts = sum(np.minimum(a[t : t + 8].T @ a[t : t + 8], 1) for t in range(0, 21, 8))
    np.fill_diagonal(counts, -1)
    best = {(i, int(j)) for i in range(9) for j in np.argsort(-counts[i], kind="stable")[:3] if counts[i, j] > 0}
    wanted = best | {(j, i) for i, j in best}
    first, second, weight = strongest_edges(activity)
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == sorted(wanted)
    assert 4 not in first  # what is never active is tied to nobody
    np.testing.assert_allclose(weight, 255 * counts[first, second] / counts.max(), atol=1.01)
    both = dict(zip(zip(first, second, strict=True), weight, strict=True))
    assert all(both[j, i] == value for (i, j), value in both.items())


def test_scale_changes_no_edge():
    activity, _ = communities(3, 6, 64)
    for one, other in zip(strongest_edges(activity), strongest_edges(activity * 1e-6), strict=True):
        assert (one == other).all()


@pytest.mark.parametrize(("groups", "size"), [(4, 8), (12, 16)])
def test_planted_communities_are_found(groups, size):
    needs_metis()
    activity, belongs = communities(groups, size, 600)
    found = coactivation_clusters(activity, groups, torch.Generator().manual_seed(0))
    assert all(found[belongs == group].unique().numel() == 1 for group in range(groups))


@pytest.mark.parametrize("activity", [
    torch.rand(100, 96, generator=torch.Generator().manual_seed(1)),
    torch.zeros(10, 96),
    communities(3, 32, 200)[0],  # as many as no number of experts
], ids=["dense", "dead", "other groups"])  # fmt: skip
def test_clusters_are_exactly_equal_and_the_same_for_the_same_seed(activity):
    needs_metis()
    for count in (1, 2, 8, 16, 48, 96):
        one, again = (coactivation_clusters(activity, count, torch.Generator().manual_seed(5)) for _ in range(2))
        assert one.bincount(minlength=count).tolist() == [96 // count] * count
        assert one.equal(again)


def test_neurons_move_as_trying_every_move_would_choose():
    random = np.random.default_rng(0)
    for _ in range(10):
        n, count = 12, 3
        matrix = np.triu(random.integers(0, 5, (n, n)), 1)
        matrix = matrix + matrix.T
        first, second = np.nonzero(matrix)
        start = random.integers(0, count, n)
        wanted = start.copy()
        while (np.bincount(wanted, minlength=count) > 4).any():
            held = np.bincount(wanted, minlength=count)
            moves = [
                (matrix[i, wanted == to].sum() - matrix[i, wanted == wanted[i]].sum(), -i, -to)
                for i in range(n) for to in range(count) if held[wanted[i]] > 4 > held[to]
            ]  # fmt: skip
            _, i, to = max(moves)
            wanted[-i] = -to
        before = start.copy()
        found = made_equal((first, second, matrix[first, second]), start, count)
        assert (start == before).all()
        assert found.tolist() == wanted.tolist()
        assert np.bincount(found, minlength=count).tolist() == [4, 4, 4]


def test_what_is_active_together_is_one_expert_and_all_experts_are_the_network():
    needs_metis()
    torch.manual_seed(0)
    plain = Plain(16, 64, gated=False)
    directions = torch.eye(16)[:8] * 4
    group = torch.arange(8).repeat(8)
    with torch.no_grad():
        plain.up.weight.copy_(directions[group] + torch.randn(64, 16) / 10)
        plain.up.bias.fill_(-1.0)
    layer = layer_of(plain.requires_grad_(False), 8, 8)
    inputs = directions[torch.randint(0, 8, (400,))] / 4 + torch.randn(400, 16) / 20
    order = Moe(experts=8, top_k=8, split="coactivation").arrange(layer, inputs, torch.Generator().manual_seed(0))
    assert order.sort().values.tolist() == list(range(64))
    assert all(group[expert].unique().numel() == 1 for expert in order.split(8))
    for name in ("up", "down", "up_bias"):
        getattr(layer, name).data = getattr(layer, name).data[order]
    torch.testing.assert_close(layer(inputs), nn.Module.__call__(plain, inputs), atol=1e-5, rtol=1e-5)


def test_without_pymetis_it_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="needs pymetis") as caught:
        Moe(experts=8, top_k=2, split="coactivation")
    assert caught.value.hint == "pip install 'secateur[metis]'"
    assert caught.value.exit_code == 2
    Moe(experts=8, top_k=2)  # nobody else needs it
