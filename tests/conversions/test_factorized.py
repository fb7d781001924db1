"""Factorised matrices against numpy: singular values, naive contraction, exact counts, and the spread of a budget."""

from __future__ import annotations

import itertools
from math import prod

import numpy as np
import pytest
import torch
from torch import nn

from secateur.conversions._spread import Curve, spread
from secateur.conversions._tensor_train import decompose, full_ranks, split_size, truncate
from secateur.conversions.factorized import Factorized, lost_shares, low_rank, relative_error
from secateur.errors import BudgetError, UnknownNameError, UsageError
from secateur.layers import low_rank as low_rank_layer
from secateur.layers import tensor_train

DEMO = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
"""Matrices of one block of SmolLM2-135M."""


def problem(out_features: int, in_features: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and the Gram matrix of inputs that lie mostly in few directions."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    inputs = torch.randn(400, in_features, generator=generator) * torch.logspace(1, -2, in_features)
    inputs = inputs @ torch.linalg.qr(torch.randn(in_features, in_features, generator=generator)).Q
    return weight, inputs.T @ inputs


@pytest.mark.parametrize("shape", [(24, 24), (12, 30), (30, 12)])
def test_two_factors_are_the_best_of_their_rank(shape):
    weight, gram = problem(*shape)
    root = np.linalg.cholesky(gram.double().numpy() + 1e-9 * np.eye(shape[1]))
    u, s, v = np.linalg.svd(weight.double().numpy() @ root, full_matrices=False)
    lost = lost_shares(weight, gram)
    for rank in (1, 5, min(shape)):
        best = u[:, :rank] * s[:rank] @ v[:rank] @ np.linalg.inv(root)
        first, second = low_rank(weight, gram, rank)
        assert first.shape == (shape[0], rank)
        assert second.shape == (rank, shape[1])
        error = relative_error(weight, first @ second, gram)
        assert error == pytest.approx(relative_error(weight, torch.from_numpy(best), gram), abs=1e-7)
        assert error == pytest.approx(float((s[rank:] ** 2).sum() / (s**2).sum()), abs=1e-7)
        assert float(lost[rank - 1]) == pytest.approx(error, abs=1e-7)


def test_without_weights_two_factors_are_the_truncated_svd():
    weight, _ = problem(20, 16)
    u, s, v = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    first, second = low_rank(weight, None, 6)
    np.testing.assert_allclose((first @ second).numpy(), u[:, :6] * s[:6] @ v[:6], atol=1e-12)


def test_weights_of_the_inputs_lessen_the_error_on_them():
    weight, gram = problem(32, 32)
    weighted, plain = (a @ b for a, b in (low_rank(weight, gram, 8), low_rank(weight, None, 8)))
    assert relative_error(weight, weighted, gram) < 0.2 * relative_error(weight, plain, gram)


@pytest.mark.parametrize("shape", [(24, 24), (12, 30), (30, 12)])
@pytest.mark.parametrize("dead", [False, True])
def test_full_rank_loses_nothing_even_where_inputs_are_dead(shape, dead):
    weight, gram = problem(*shape)
    if dead:
        gram[:5], gram[:, :5] = 0, 0
    first, second = low_rank(weight, gram, min(shape))
    torch.testing.assert_close((first @ second).float(), weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "parts", "found"), [
    (576, 5, [3, 4, 4, 4, 3]), (1536, 5, [4, 4, 6, 4, 4]), (192, 5, [2, 4, 4, 3, 2]), (768, 5, [4, 4, 4, 4, 3]),
    (1024, 5, [4, 4, 4, 4, 4]), (576, 3, [8, 9, 8]), (14, 2, [7, 2]),
])  # fmt: skip
def test_sizes_are_split_evenly(size, parts, found):
    assert split_size(size, parts) == found
    assert prod(found) == size


def test_a_size_with_too_few_factors_is_refused():
    with pytest.raises(UsageError, match=r"q: the input size 34 is no product of 3 numbers above 1"):
        split_size(34, 3, "q: the input size")


def naive(cores: list[torch.Tensor]) -> np.ndarray:
    """W by its definition: a sum over all bonds for every pair of indices."""
    inputs, outputs = [c.shape[1] for c in cores], [c.shape[2] for c in cores]
    made = np.zeros((prod(outputs), prod(inputs)))
    for row, o in enumerate(itertools.product(*map(range, outputs))):
        for column, i in enumerate(itertools.product(*map(range, inputs))):
            value = np.eye(1)
            for core, a, b in zip(cores, i, o, strict=True):
                value = value @ core[:, a, b, :].double().numpy()
            made[row, column] = value[0, 0]
    return made


@pytest.mark.parametrize(("inputs", "outputs"), [([2, 3, 2], [3, 2, 2]), ([2, 2, 2, 2, 3], [2, 2, 3, 1, 2])])
def test_a_chain_is_what_its_definition_says(inputs, outputs):
    weight = torch.randn(prod(outputs), prod(inputs), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cores = decompose(weight, inputs, outputs)
    assert [core.shape[-1] for core in cores[:-1]] == full_ranks(inputs, outputs)
    np.testing.assert_allclose(naive(cores), weight.numpy(), atol=1e-12)
    small = truncate(cores, 3)
    np.testing.assert_allclose(tensor_train.rebuild(small).numpy(), naive(small), atol=1e-12)
    rows = torch.randn(5, prod(inputs), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    np.testing.assert_allclose(tensor_train.chain(small, rows).numpy(), rows.numpy() @ naive(small).T, atol=1e-12)


def test_a_truncated_chain_errs_no_more_than_its_bound_and_less_with_rank():
    inputs, outputs = [3, 4, 3], [4, 3, 4]
    weight = torch.randn(48, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    cores = decompose(weight, inputs, outputs)
    pairs = weight.reshape(*outputs, *inputs).permute(3, 0, 4, 1, 5, 2).numpy()
    unfolded = [np.linalg.svd(pairs.reshape(rows, -1), compute_uv=False) for rows in (12, 144)]
    errors = []
    for rank in (1, 4, 8, 12):
        error = float((tensor_train.rebuild(truncate(cores, rank)) - weight).square().sum())
        assert error <= sum(float((s[rank:] ** 2).sum()) for s in unfolded) + 1e-9
        errors.append(error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-20


def test_counts_are_those_of_the_formulas():
    def cores(out_features: int, in_features: int) -> list[int]:
        entry = Factorized(cores=5, rank="full").entry("m", (out_features, in_features))
        return [prod(shape) for shape in tensor_train.shapes(out_features, in_features, entry).values()]

    assert sum(cores(768, 768)) == 676_433
    assert sum(cores(4096, 1024)) == 4_522_496
    assert 30 * sum(out * inner for out, inner in DEMO) == 106_168_320
    shared = sum(30 * (sum(sizes) - sizes[2]) + sizes[2] for sizes in (cores(*shape) for shape in DEMO))
    assert shared == 13_566_744


@pytest.mark.parametrize("rows", [1, 3, 500])
def test_the_layer_gives_the_same_core_by_core_and_through_the_matrix(rows):
    torch.manual_seed(0)
    old = nn.Linear(36, 48)
    entry = Factorized(cores=3, rank=6).entry("m", (48, 36))
    layer = tensor_train.build(old, entry)
    solved = Factorized(cores=3, rank=6).solve(old.weight.detach(), None, entry)
    layer.load_state_dict({**solved, "bias": old.bias.detach()})
    inputs = torch.randn(2, rows, 36)
    expected = inputs @ tensor_train.dense(solved, entry).T + old.bias
    torch.testing.assert_close(layer(inputs), expected, atol=1e-5, rtol=1e-5)
    chained = tensor_train.chain_operations(entry["inputs"], entry["outputs"], entry["ranks"])
    assert chained > 0


def test_two_factors_are_two_linear_layers():
    old = nn.Linear(12, 20)
    layer = low_rank_layer.build(old, {"kind": "low_rank", "rank": 3})
    assert [type(part) for part in layer] == [nn.Linear, nn.Linear]
    assert layer[0].bias is None
    assert sum(p.numel() for p in layer.parameters()) == 3 * (12 + 20) + 20


def test_a_budget_is_spread_as_trying_everything_would():
    generator = np.random.default_rng(0)
    for _ in range(20):
        curves = []
        for _ in range(3):  # convex: every further step of one size gains less
            gains = np.sort(generator.random(4))[::-1]
            errors = [float(gains.sum() - gains[:k].sum()) for k in range(5)]
            curves.append(Curve([10 * k + 10 for k in range(5)], errors))
        limit = int(generator.integers(3, 15)) * 10
        chosen = spread(curves, limit)
        best = min(
            sum(curve.errors[c] for curve, c in zip(curves, choice, strict=True))
            for choice in itertools.product(range(5), repeat=3)
            if sum(curve.parameters[c] for curve, c in zip(curves, choice, strict=True)) <= limit
        )
        assert sum(curve.parameters[c] for curve, c in zip(curves, chosen, strict=True)) <= limit
        assert sum(curve.errors[c] for curve, c in zip(curves, chosen, strict=True)) == pytest.approx(best)


def test_what_is_left_of_a_budget_goes_where_a_choice_off_the_hull_fits():
    curve = Curve([1, 5, 10], [1.0, 0.9, 0.0])  # 5 lies above the line from 1 to 10
    assert spread([curve], 9) == [1]
    assert spread([curve], 10) == [2]
    with pytest.raises(BudgetError, match="takes 1"):
        spread([curve], 0)


def test_a_curve_ends_with_the_whole_matrix():
    weight, gram = problem(24, 36)
    for cores in (2, 3):
        ranks, curve = Factorized(cores=cores, budget="parameters=0.5").curve("m", weight, gram)
        assert ranks[-1] is None
        assert (curve.parameters[-1], curve.errors[-1]) == (24 * 36, 0.0)
        assert max(curve.parameters[:-1]) < 24 * 36
        assert curve.errors[:-1] == sorted(curve.errors[:-1], reverse=True)


@pytest.mark.parametrize(("options", "kind", "words"), [
    ({}, UsageError, "needs --rank or --budget"),
    ({"rank": 4, "budget": "parameters=0.5"}, UsageError, "not both"),
    ({"rank": 0}, UsageError, "--rank 0"),
    ({"rank": "many"}, UsageError, "--rank many"),
    ({"rank": 4, "cores": 1}, UsageError, "--cores 1"),
    ({"rank": 4, "cores": 9}, UsageError, "--cores 9"),
    ({"budget": "bytes=0.5"}, BudgetError, "bytes=0.5"),
    ({"budget": "parameters=2"}, BudgetError, "is no share"),
    ({"budget": "parametres=0.5"}, UnknownNameError, "parametres"),
    ({"rank": 4, "weighting": "gradients"}, UsageError, "--weighting gradients"),
    ({"rank": 4, "share_central": True}, UsageError, "2 cores have no middle tensor"),
    ({"budget": "parameters=0.5", "cores": 3, "share_central": True}, UsageError, "same rank everywhere"),
])  # fmt: skip
def test_options_that_make_no_sense_are_refused(options, kind, words):
    with pytest.raises(kind, match=words) as caught:
        Factorized(**options)
    assert caught.value.hint


def test_a_rank_above_full_is_refused_by_name():
    with pytest.raises(UsageError, match=r"rank 25 is more than block\.q \(24 x 36\) has, which is 24"):
        Factorized(rank=25).entry("block.q", (24, 36))
    with pytest.raises(UsageError, match="which is 12"):
        Factorized(cores=3, rank=13).entry("m", (48, 36))
