"""Clusters against trying everything, the layer against its formula, routers, and exact counts."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from secateur.conversions._clusters import balanced_clusters, exchange
from secateur.conversions._routers import captured, mean_rows, train_router
from secateur.conversions.moe import Moe
from secateur.errors import UsageError
from secateur.layers import moe
from secateur.layers.moe import MoeFfn, expert_scores, router_shapes, runs


class Plain(nn.Module):
    """y = D act(G x) * U x + d, or without a gate y = D act(U x + u) + d."""

    def __init__(self, inner: int, neurons: int, *, gated: bool, act: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(inner, neurons, bias=not gated), nn.Linear(neurons, inner)
        self.gate = nn.Linear(inner, neurons, bias=False) if gated else None
        self.act = act or nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x) if self.gate is None else self.act(self.gate(x)) * self.up(x)
        return self.down(self.act(h) if self.gate is None else h)


def layer_of(plain: Plain, experts: int, top: int, router: str = "mlp") -> MoeFfn:
    """The layer with the neurons in the order they have, and a random router."""
    entry: dict[str, Any] = {
        "gate": "gate" if plain.gate is not None else "", "up": "up", "down": "down", "act": "act",
        "experts": experts, "top": top, "router": router,
    }  # fmt: skip
    layer = moe.build(plain, entry)
    with torch.no_grad():
        layer.up.copy_(plain.up.weight)
        layer.down.copy_(plain.down.weight.t())
        layer.down_bias.copy_(plain.down.bias)
        if plain.gate is not None:
            layer.gate.copy_(plain.gate.weight)
        else:
            layer.up_bias.copy_(plain.up.bias)
        for name in router_shapes(experts, layer.in_features, router):
            layer.get_parameter(name).normal_()
    return layer.requires_grad_(False)


def test_clusters_are_exactly_equal_and_the_same_for_the_same_seed():
    points = torch.randn(96, 7, generator=torch.Generator().manual_seed(0))
    first, again = (balanced_clusters(points, 8, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.bincount(minlength=8).tolist() == [12] * 8
    assert first.equal(again)
    same = balanced_clusters(torch.zeros(12, 3), 4, torch.Generator().manual_seed(0))  # nothing tells them apart
    assert same.bincount(minlength=4).tolist() == [3] * 4


def test_what_lies_together_is_one_cluster():
    generator = torch.Generator().manual_seed(1)
    centres, order = 10 * torch.randn(6, 5, generator=generator), torch.randperm(48, generator=generator)
    belongs = torch.arange(6).repeat_interleave(8)[order]
    found = balanced_clusters(centres[belongs] + torch.randn(48, 5, generator=generator) / 10, 6, generator)
    assert all(found[belongs == group].unique().numel() == 1 for group in range(6))


def test_no_exchange_of_two_is_left_that_would_lessen_the_cost():
    random = np.random.default_rng(0)
    for _ in range(20):
        costs, assigned = random.random((12, 3)), np.arange(12) % 3
        before = costs[np.arange(12), assigned].sum()
        exchange(costs, assigned)
        now = costs[np.arange(12), assigned].sum()
        assert now <= before
        assert np.bincount(assigned).tolist() == [4, 4, 4]
        for one, other in itertools.combinations(range(12), 2):
            there = costs[one, assigned[other]] + costs[other, assigned[one]]
            assert there >= costs[one, assigned[one]] + costs[other, assigned[other]] - 1e-6


def test_of_two_clusters_the_assignment_is_the_best_there_is():
    random = np.random.default_rng(1)
    for _ in range(10):
        costs, assigned = random.random((8, 2)), np.arange(8) % 2
        exchange(costs, assigned)
        best = min(
            sum(costs[point, 0 if point in first else 1] for point in range(8))
            for first in itertools.combinations(range(8), 4)
        )
        assert costs[np.arange(8), assigned].sum() == pytest.approx(best, abs=1e-6)


def test_numbers_become_runs():
    assert list(runs([0, 1, 2, 5, 7, 8])) == [(0, 3), (5, 6), (7, 9)]
    assert list(runs([])) == []


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("router", ["mlp", "similarity", "oracle"])
@pytest.mark.parametrize("gathered", [0, 1 << 20])
def test_each_token_goes_through_its_experts_and_no_others(gated, router, gathered, monkeypatch):
    monkeypatch.setattr(moe, "GATHERED", gathered)
    torch.manual_seed(0)
    plain = Plain(6, 20, gated=gated, act=nn.SiLU()).requires_grad_(False)
    layer, x = layer_of(plain, 5, 2, router), torch.randn(3, 4, 6)
    scores = layer.scores(x.reshape(-1, 6)).reshape(3, 4, 5)
    if router == "mlp":
        unit = x / x.norm(dim=2, keepdim=True)
        torch.testing.assert_close(scores, torch.tanh(unit @ layer.router_in.t()) @ layer.router_out.t())
    neurons = plain.act(plain.up(x)) if plain.gate is None else plain.act(plain.gate(x)) * plain.up(x)
    if router == "oracle":
        torch.testing.assert_close(scores, neurons.abs().reshape(3, 4, 5, 4).sum(3))
    chosen = torch.zeros(3, 4, 5).scatter_(2, scores.topk(2, dim=2).indices, 1.0)
    wanted = plain.down(neurons * chosen.repeat_interleave(4, dim=2))
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)
    for row, token in itertools.product(range(3), range(4)):  # one by one, as in decoding
        one = layer(x[row : row + 1, token : token + 1])
        torch.testing.assert_close(one, wanted[row : row + 1, token : token + 1], atol=1e-5, rtol=1e-5)


def test_what_is_not_chosen_is_not_read(monkeypatch):
    monkeypatch.setattr(moe, "GATHERED", 0)
    torch.manual_seed(1)
    layer, x = layer_of(Plain(6, 20, gated=True), 5, 2), torch.randn(1, 1, 6)
    wanted, chosen = layer(x), layer.scores(x[0]).topk(2).indices[0].tolist()
    for expert in set(range(5)) - set(chosen):
        for matrix in (layer.gate, layer.up, layer.down):
            matrix[expert * 4 : expert * 4 + 4] = torch.nan  # a mask would make NaN of it
    assert layer(x).equal(wanted)


@pytest.mark.parametrize("gated", [True, False])
def test_all_experts_are_the_network_itself(gated):
    torch.manual_seed(2)
    plain = Plain(6, 20, gated=gated).requires_grad_(False)
    layer, x = layer_of(plain, 5, 5), torch.randn(7, 6)
    torch.testing.assert_close(layer(x), plain(x), atol=1e-6, rtol=1e-6)
    own = sum(parameter.numel() for parameter in plain.parameters())
    assert sum(parameter.numel() for parameter in layer.parameters()) == own + 5 * 6 + 5 * 5


def test_the_order_is_a_permutation_into_equal_experts_and_changes_nothing():
    torch.manual_seed(3)
    plain = Plain(6, 24, gated=False).requires_grad_(False)
    layer, x = layer_of(plain, 4, 4), torch.randn(50, 6)
    for split in ("weights", "activations"):
        conversion = Moe(experts=4, top_k=4, split=split)
        order = conversion.arrange(layer, x, torch.Generator().manual_seed(0))
        assert order.sort().values.tolist() == list(range(24))
        whole = layer(x)
        for name in ("up", "down", "up_bias"):
            getattr(layer, name).data = getattr(layer, name).data[order]
        torch.testing.assert_close(layer(x), whole, atol=1e-5, rtol=1e-5)


def test_a_router_costs_what_the_formula_says():
    assert Moe(experts=48, top_k=12).added(576) == 48 * 576 + 48 * 48 == 29_952
    assert Moe(experts=48, top_k=12, router="similarity").added(576) == 48 * 576
    assert Moe(experts=48, top_k=12, router="oracle").added(576) == 0


def task() -> tuple[MoeFfn, torch.Tensor]:
    """A ReLU network whose experts answer to other directions of the input each, and inputs near one of these."""
    torch.manual_seed(4)
    directions = torch.randn(8, 16)
    plain = Plain(16, 64, gated=False)
    with torch.no_grad():
        plain.up.weight.copy_(directions.repeat_interleave(8, 0) + torch.randn(64, 16) / 2)
        plain.up.bias.fill_(-6.0)
    layer = layer_of(plain.requires_grad_(False), 8, 2)
    return layer, directions[torch.randint(0, 8, (600,))] * torch.rand(600, 1) * 2 + torch.randn(600, 16)


def test_training_reaches_the_router_only_and_finds_the_active_experts():
    layer, inputs = task()
    layer.requires_grad_(True)
    inputs.requires_grad_(True)
    activity = expert_scores(layer.hidden(inputs), 8)
    start = mean_rows(layer.up, 8)
    before = {name: tensor.detach().clone() for name, tensor in layer.named_parameters()}
    first, second = train_router(inputs, activity, start, 2, torch.Generator().manual_seed(0))
    assert inputs.grad is None
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert all(tensor.equal(before[name]) for name, tensor in layer.named_parameters())
    held = slice(9, None, 10)  # what decides and what is measured is what was held out
    shares = [captured(moe.route(inputs[held], a, b), activity[held], 2) for a, b in ((start, None), (first, second))]
    assert not first.equal(start)
    assert shares[0] < shares[1] <= captured(activity[held], activity[held], 2)


def test_the_oracle_loses_least_and_chance_most_and_more_experts_never_more():
    layer, inputs = task()
    lost = {}
    for router in ("oracle", "mlp"):
        for top in (1, 2, 4, 8):
            conversion = Moe(experts=8, top_k=top, router=router)
            layer.router, layer.top = router, top
            for name, tensor in conversion.route(layer, inputs, torch.Generator().manual_seed(0)).items():
                layer.get_parameter(name).data = tensor
            lost[router, top] = conversion.lost(layer, inputs)
    for name in ("router_in", "router_out"):
        layer.get_parameter(name).normal_()
    layer.top = 2
    chance = Moe(experts=8, top_k=2).lost(layer, inputs)
    for top in (1, 2, 4, 8):
        assert lost["oracle", top]["captured"] == pytest.approx(lost["oracle", top]["best"])
        assert lost["oracle", top]["captured"] >= lost["mlp", top]["captured"] - 1e-6
    assert chance["captured"] < lost["mlp", 2]["captured"]
    assert lost["oracle", 2]["error"] < lost["mlp", 2]["error"] < chance["error"]
    errors = [lost["oracle", top]["error"] for top in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize(("options", "words"), [
    ({}, "needs --experts"),
    ({"experts": 8}, "needs --top-k"),
    ({"experts": 0, "top_k": 1}, "--experts 0"),
    ({"experts": 4, "top_k": 5}, "--top-k 5 of 4 experts"),
    ({"experts": 4, "top_k": 2, "router": "hash"}, "--router hash"),
    ({"experts": 4, "top_k": 2, "split": "metis"}, "--split metis"),
])  # fmt: skip
def test_options_that_make_no_sense_are_refused(options, words):
    with pytest.raises(UsageError, match=words) as caught:
        Moe(**options)
    assert caught.value.hint


def test_experts_that_do_not_divide_are_refused_with_numbers_that_do():
    with pytest.raises(UsageError, match="7 experts do not divide the 48 neurons of mlp") as caught:
        Moe(experts=7, top_k=2).check("mlp", 48)
    assert caught.value.hint == "give --experts 3 or 4 or 6 or 8"
