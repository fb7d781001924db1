"""Fused models against numpy, token by token, and the counts of the formula."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch
from torch import nn

from secateur.conversions.fused import Fused, low_rank_difference
from secateur.errors import UsageError
from secateur.layers import fused
from tests.conversions.test_factorized import DEMO


def test_an_expert_is_the_truncated_svd_of_the_difference():
    torch.manual_seed(0)
    base, tuned = torch.randn(20, 14), torch.randn(20, 14)
    u, s, v = np.linalg.svd((tuned - base).double().numpy(), full_matrices=False)
    up, down, directions, squares = low_rank_difference(base, tuned, 5)
    np.testing.assert_allclose((up @ down).numpy(), u[:, :5] * s[:5] @ v[:5], atol=1e-6)
    np.testing.assert_allclose(squares.numpy(), s**2, rtol=1e-5)
    np.testing.assert_allclose(np.abs(directions.numpy() @ v.T), np.eye(14), atol=1e-4)


def test_the_error_falls_with_the_rank_and_is_none_at_full_rank():
    torch.manual_seed(1)
    base, tuned = torch.randn(12, 16), [torch.randn(12, 16), torch.randn(12, 16)]
    conversion = Fused(models=("a", "b"))
    errors = [conversion.solve(base, tuned, rank, 2)[1] for rank in (1, 4, 8, 12)]
    assert errors == sorted(errors, reverse=True)
    made, error = conversion.solve(base, tuned, 12, 2)
    assert error == pytest.approx(0, abs=1e-12)
    for number, weight in enumerate(tuned):
        torch.testing.assert_close(base + made["up"][number] @ made["down"][number], weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("models", "rank", "router_rank", "added"), [(2, 8, 4, 6_082_560), (2, 16, 8, 12_165_120)])
def test_counts_are_those_of_the_formula(models, rank, router_rank, added):
    entry = {"kind": "fused", "models": models, "rank": rank, "router_rank": router_rank, "top": 1}
    count = sum(prod(s) for shape in DEMO for s in fused.shapes(*shape, entry, bias=False).values())
    assert 30 * count == added


@pytest.mark.parametrize("top", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_routes_every_token_as_the_formula_says(top, bias):
    torch.manual_seed(2)
    base = nn.Linear(10, 7, bias=bias)
    layer = fused.build(base, {"models": 3, "rank": 4, "router_rank": 2, "top": top})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    inputs = torch.randn(2, 6, 10)
    with torch.no_grad():
        found = layer(inputs).reshape(-1, 7).double().numpy()
    up, down, router = (getattr(layer, name).detach().double().numpy() for name in ("up", "down", "router"))
    for token, x in enumerate(inputs.reshape(-1, 10).double().numpy()):
        strength = np.array([np.linalg.norm(router[i] @ x) for i in range(3)])
        share = np.exp(strength) / np.exp(strength).sum()
        chosen = np.argsort(-share)[:top]
        wanted = base.weight.detach().double().numpy() @ x
        wanted += base.bias.detach().double().numpy() if bias else 0
        for i in chosen:
            part = up[i] @ (down[i] @ x) + (layer.expert_bias[i].detach().double().numpy() if bias else 0)
            wanted += share[i] / share[chosen].sum() * part
        np.testing.assert_allclose(found[token], wanted, atol=1e-4)


def test_shares_sum_to_one_and_only_the_chosen_have_one():
    torch.manual_seed(3)
    share = fused.route(torch.randn(50, 8), torch.randn(4, 3, 8), 2)
    torch.testing.assert_close(share.sum(1), torch.ones(50))
    assert ((share > 0).sum(1) == 2).all()


def test_one_model_needs_no_router():
    layer = fused.build(nn.Linear(6, 5), {"models": 1, "rank": 2, "router_rank": 0, "top": 1})
    assert layer.router is None
    assert Fused(models=("a",)).entry("m", (40, 50))["router_rank"] == 0


@pytest.mark.parametrize(("options", "words"), [
    ({}, "needs --models"),
    ({"models": ("a",), "rank": 0}, "--rank 0"),
    ({"models": ("a",), "router_rank": 0}, "--router-rank 0"),
    ({"models": ("a", "b"), "top": 3}, "--top 3 of 2 models"),
    ({"models": ("a", "b"), "format": "delta"}, "--format delta is for one model"),
    ({"models": ("a", "b"), "rest": "model"}, "--rest model is for one model"),
    ({"models": ("a",), "rest": "none"}, "--rest none"),
    ({"models": ("a",), "base": "b"}, "--base applies a delta"),
])  # fmt: skip
def test_options_that_make_no_sense_are_refused(options, words):
    with pytest.raises(UsageError, match=words) as caught:
        Fused(**options)
    assert caught.value.hint


def test_a_rank_above_full_is_refused_by_name():
    with pytest.raises(UsageError, match=r"--rank 13 is more than block\.q \(12 x 20\) has"):
        Fused(models=("a",), rank=13).entry("block.q", (12, 20))
    with pytest.raises(UsageError, match="--router-rank 13"):
        Fused(models=("a", "b"), rank=2, router_rank=13).entry("m", (12, 20))
