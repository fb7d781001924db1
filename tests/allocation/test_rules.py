"""The rules against what their papers say, number by number."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocation._base import Look, Share, projected
from secateur.allocation.alpha import Alpha, tail_exponent
from secateur.allocation.owl import Owl
from secateur.allocation.sensitivity import Sensitivity, best_shares, convex_hull
from secateur.errors import SparsityError, UsageError
from tests.methods.problems import problem
from tests.oracles import allocation as oracle


def number(value):
    return (torch.tensor(value, dtype=torch.float64),)


@given(
    wanted=st.lists(st.tuples(st.floats(-1, 2), st.integers(1, 1000)), min_size=1, max_size=8),
    sparsity=st.floats(0, 0.95),
)
@settings(max_examples=50, deadline=None)
def test_projection_keeps_sum_bounds_and_order(wanted, sparsity):
    shares = {str(i): value for i, (value, _) in enumerate(wanted)}
    sizes = {str(i): size for i, (_, size) in enumerate(wanted)}
    made = projected(shares, sizes, sparsity)
    assert sum(made[n] * sizes[n] for n in made) == pytest.approx(sparsity * sum(sizes.values()), abs=1e-6)
    assert all(0 <= value <= 0.95 for value in made.values())
    for one, other in itertools.permutations(shares, 2):
        if shares[one] <= shares[other]:
            assert made[one] <= made[other]
    inside = [n for n in made if 0 < made[n] < 0.95]
    for one, other in itertools.combinations(inside, 2):
        assert made[one] - made[other] == pytest.approx(shares[one] - shares[other], abs=1e-6)


def test_owl_counts_outliers_of_whole_blocks():
    rule = Owl(outlier=3.0)
    scores, flat = [], []
    for seed in range(3):
        weight, x, stats = problem(6, 16, 40, seed)
        weight[0, seed] = 30.0
        scores.append(rule.measure(Look(weight, stats, None, 0.5, torch.zeros_like(weight).mul)))
        norms = [math.sqrt(float((x[:, j].double() ** 2).mean())) for j in range(16)]
        flat += [abs(float(weight[i, j])) * norms[j] for i in range(6) for j in range(16)]
    assert float(rule.of_block(scores)) == pytest.approx(oracle.outlier_share(flat, 3.0), abs=1e-12)


def test_owl_spreads_blocks_as_far_as_it_says_and_weighs_them():
    told = [Share("a", 100, 0, number(0.01)), Share("b", 300, 1, number(0.03)), Share("c", 50, 2, number(0.02))]
    made = Owl(spread=0.1).allocate(told, 0.5)
    assert made["a"] - made["b"] == pytest.approx(0.2)
    assert made["a"] - made["c"] == pytest.approx(0.1)
    equal = [Share(name, 10, index, number(0.02)) for index, name in enumerate("ab")]
    assert Owl().allocate(equal, 0.5) == pytest.approx({"a": 0.5, "b": 0.5})


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (16, 200)])
def test_alpha_is_the_exponent_of_the_paper(shape):
    for seed in range(3):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).pow(3)
        eigenvalues = torch.linalg.svdvals(weight.double()).square().tolist()
        assert tail_exponent(weight) == pytest.approx(oracle.hill(eigenvalues), rel=1e-6)


def test_alpha_prunes_heavy_tails_less_and_passes_by_what_has_none():
    told = [Share("a", 100, 0, number(2.0)), Share("b", 100, 1, number(6.0)), Share("c", 100, 2, number(math.nan))]
    made = Alpha(spread=0.3).allocate(told, 0.5)
    assert made["b"] / made["a"] == pytest.approx(1.3 / 0.7)
    assert made["a"] < made["c"] < made["b"]
    assert math.isnan(tail_exponent(torch.ones(8, 8)))
    assert math.isnan(tail_exponent(torch.zeros(8, 8)))


def test_alpha_stays_below_one_where_the_factor_would_pass_it():
    told = [Share("a", 100, 0, number(2.0)), Share("b", 10, 1, number(6.0))]
    made = Alpha(spread=0.9).allocate(told, 0.8)
    assert made["b"] == 0.95
    assert (100 * made["a"] + 10 * made["b"]) / 110 == pytest.approx(0.8)


def test_a_curve_is_the_error_weighed_by_the_gradients():
    weight, x, stats = problem(6, 16, 40)
    fisher = torch.rand(6, generator=torch.Generator().manual_seed(1))
    rule = Sensitivity(levels=3, spread=0.2)
    tried = {level: weight * (torch.rand(6, 16, generator=torch.Generator().manual_seed(i)) > level)
             for i, level in enumerate((0.3, 0.5, 0.7))}  # fmt: skip
    curve = rule.measure(Look(weight, stats, fisher, 0.5, lambda level: tried[round(level, 6)]))
    for (level, loss), wanted in zip(curve.tolist(), tried, strict=True):
        assert level == pytest.approx(wanted)
        lost = (x.double() @ (weight - tried[wanted]).double().T).square()
        assert loss == pytest.approx(0.5 * float((lost * fisher.double()).sum()) / 40, rel=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_of_levels_is_cheaper(seed):
    draw = random.Random(seed)
    levels = [0.2, 0.35, 0.5, 0.65, 0.8]
    curves, sizes = {}, {}
    for name in "abcd":
        steps = [draw.uniform(0, 1) for _ in levels]
        curves[name] = [(level, sum(steps[: i + 1])) for i, level in enumerate(levels)]  # rising, not convex
        sizes[name] = draw.randint(10, 200)
    sparsity = draw.uniform(0.25, 0.75)
    made = best_shares(curves, sizes, sparsity)
    assert sum(made[n] * sizes[n] for n in made) == pytest.approx(sparsity * sum(sizes.values()))

    def cost(name):
        for (s0, e0), (s1, e1) in itertools.pairwise(convex_hull(curves[name])):
            if s0 - 1e-9 <= made[name] <= s1 + 1e-9:
                return e0 + (e1 - e0) * (made[name] - s0) / (s1 - s0)
        raise AssertionError

    budget = sparsity * sum(sizes.values())
    assert sum(map(cost, curves)) <= oracle.cheapest(curves.values(), sizes.values(), budget) + 1e-9
    assert sum(min(abs(made[n] - s) > 1e-9 for s, _ in curves[n]) == 0 for n in made) >= len(made) - 1


def test_who_is_more_sensitive_is_pruned_less():
    base = [(0.3, 0.1), (0.5, 0.4), (0.7, 1.0)]
    before = None
    for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
        curves = {"a": [(s, factor * e) for s, e in base], "b": base}
        share = best_shares(curves, {"a": 10, "b": 10}, 0.5)["a"]
        assert before is None or share <= before
        before = share
    assert before < 0.5


def test_a_budget_outside_the_curves_is_refused():
    with pytest.raises(SparsityError, match="cannot be met"):
        best_shares({"a": [(0.3, 0.0), (0.5, 1.0)]}, {"a": 10}, 0.6)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Owl(outlier=0), "outlier of owl"),
        (lambda: Owl(spread=0.6), "spread of owl"),
        (lambda: Alpha(spread=1.0), "spread of alpha"),
        (lambda: Sensitivity(levels=1), "levels of sensitivity is 1"),
        (lambda: Sensitivity(sequences=0), "sequences of sensitivity is 0"),
        (lambda: Sensitivity(spread=0.0), "spread of sensitivity"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, said):
    with pytest.raises(UsageError, match=said):
        make()
