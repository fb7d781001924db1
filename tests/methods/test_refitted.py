"""The refit at the end of a method: against a direct solve, never worse, and who gets it."""

import pytest
import torch

from secateur.errors import UsageError
from secateur.methods._refitted import Refitted, with_refit
from secateur.methods.alps import Alps
from secateur.methods.magnitude import Magnitude
from secateur.methods.random import Random
from secateur.methods.sparsegpt import SparseGPT
from secateur.methods.wanda import Wanda
from secateur.patterns import parse_pattern
from secateur.plugins import Target
from secateur.refit import refit
from secateur.statistics import InputStatistics
from tests.methods.problems import output_error, problem, solve

EVERY = [Random(), Magnitude(), Wanda(), SparseGPT()]
every_method = pytest.mark.parametrize("method", EVERY, ids=lambda method: method.name)


@every_method
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("tokens", [1, 10, 400])
def test_the_mask_stays_and_the_error_never_grows(method, pattern, tokens):
    for seed in range(3):
        weight, x, stats = problem(12, 32, tokens, seed, dead=(5,))
        target = Target(0.5, parse_pattern(pattern))
        plain, refitted = solve(method, weight, stats, target), solve(Refitted(method), weight, stats, target)
        assert torch.equal(plain.mask, refitted.mask)
        assert not refitted.weight[~refitted.mask].view(torch.int32).any()
        assert refitted.weight.isfinite().all()
        before, after = (output_error(x, weight, one.weight) for one in (plain, refitted))
        assert after <= before * (1 + 1e-5)
        assert refitted.loss <= refitted.loss_before_refit
        assert refitted.loss_before_refit == pytest.approx(before, rel=1e-3, abs=1e-3)
        assert refitted.loss == pytest.approx(after, rel=1e-3, abs=1e-3)
        assert refitted.notes == plain.notes


def test_the_values_are_those_of_a_direct_solve():
    weight, x, stats = problem(6, 24, 300)
    mask = torch.rand(6, 24, generator=torch.Generator().manual_seed(1)) > 0.5
    made, before, after = refit(weight, weight * mask, mask, stats.gram, stats.dead(), steps=100)
    h = x.double().T @ x.double()
    h += 0.01 * h.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    for row in range(6):
        kept = mask[row].nonzero().squeeze(1)
        best = torch.linalg.solve(h[kept][:, kept], (h @ weight[row].double())[kept])
        torch.testing.assert_close(made[row, kept].double(), best, rtol=1e-4, atol=1e-5)
    assert after < before


def test_a_row_that_would_lose_keeps_what_it_had():
    # At the optimum for lambda = 0 nothing is left to gain, and with lambda the solution is a little worse.
    weight, x, stats = problem(5, 16, 200)
    mask = torch.rand(5, 16, generator=torch.Generator().manual_seed(2)) > 0.4
    h, best = x.double().T @ x.double(), torch.zeros(5, 16)
    for row in range(5):
        kept = mask[row].nonzero().squeeze(1)
        best[row, kept] = torch.linalg.solve(h[kept][:, kept], (h @ weight[row].double())[kept]).float()
    made, before, after = refit(weight, best, mask, stats.gram, stats.dead())
    assert torch.equal(made, best)
    assert before == after


@every_method
def test_nothing_to_do_changes_no_bit(method):
    weight, _, stats = problem(4, 16, 50)
    solved = solve(Refitted(method), weight, stats, Target(0.0))
    assert torch.equal(solved.weight.view(torch.int32), weight.view(torch.int32))
    assert solved.loss_before_refit is None


@every_method
def test_without_any_live_input_it_is_the_method_alone(method):
    stats = InputStatistics(16, "gram")
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    plain, refitted = (solve(one, weight, stats, Target(0.5)) for one in (method, Refitted(method)))
    assert torch.equal(plain.weight, refitted.weight)


def test_of_duplicated_inputs_the_kept_one_takes_over():
    weight, x, _ = problem(6, 8, 200)
    twice = torch.cat([x, x], dim=1)
    stats = InputStatistics(16, "gram")
    stats.update(twice)
    both = torch.cat([weight, weight], dim=1)
    mask = torch.ones(6, 16, dtype=torch.bool)
    mask[:, 8:] = False
    made, before, after = refit(both, both * mask, mask, stats.gram, stats.dead(), steps=60)
    assert not made[:, 8:].any()
    assert after < 0.05 * before


def test_who_is_refitted():
    assert isinstance(with_refit(SparseGPT(), None), Refitted)
    for method in (Random(), Magnitude(), Wanda()):
        assert with_refit(method, None) is method
        made = with_refit(method, True)
        assert isinstance(made, Refitted)
        assert made.statistics == "gram"
        assert with_refit(made, True) is made
    assert with_refit(SparseGPT(), False) == SparseGPT()


def test_a_method_with_steps_of_its_own_does_it_itself():
    assert with_refit(Alps(), None) == with_refit(Alps(), True) == Alps()
    assert with_refit(Alps(), False) == Alps(refit_steps=0)
    with pytest.raises(UsageError, match="contradict"):
        with_refit(Alps(refit_steps=0), True)


def test_what_the_method_plans_and_sees_is_as_it_says():
    assert Refitted(Wanda()).sees_dense_block(parse_pattern("2:4"))
    assert not Refitted(SparseGPT()).sees_dense_block(parse_pattern("2:4"))
    assert Refitted(Wanda()).plan([], lambda name: torch.ones(1), 0.5) is None
    counts = Refitted(Magnitude(scope="global")).plan(["a"], lambda name: torch.arange(4.0).view(2, 2), 0.5)
    assert counts == {"a": 2}


@pytest.mark.parametrize("stats", [None, InputStatistics(16, "norms"), InputStatistics(9, "gram")])
def test_a_gram_matrix_is_needed(stats):
    with pytest.raises(ValueError, match="of 16 inputs"):
        solve(Refitted(Magnitude()), torch.ones(4, 16), stats, Target(0.5))
