import pytest
import torch

from secateur.errors import UsageError
from secateur.methods.alps import Alps
from secateur.methods.sparsegpt import SparseGPT
from secateur.patterns import parse_pattern
from secateur.plugins import Target
from secateur.refit import masked_least_squares
from secateur.statistics import InputStatistics
from tests.methods.problems import output_error, problem, solve
from tests.oracles import admm


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("iterations", [1, 3, 12])
def test_equals_the_search_written_from_the_paper(sparsity, iterations):
    for seed in range(3):
        weight, x, stats = problem(8, 24, 100, seed)
        method = Alps(iterations=iterations, settled=0.0, refit_steps=200)
        solved = solve(method, weight, stats, Target(sparsity))
        expected, mask = admm.alps(weight, x, sparsity=sparsity, iterations=iterations)
        assert torch.equal(solved.mask, mask)
        torch.testing.assert_close(solved.weight.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("pattern", "columns"), [("2:4", 24), ("1:4", 24), ("4:8", 40), ("2:3", 30)])
def test_groups_equal_the_search_written_from_the_paper(pattern, columns):
    parsed = parse_pattern(pattern)
    for seed in range(3):
        weight, x, stats = problem(6, columns, 120, seed)
        solved = solve(Alps(iterations=9, refit_steps=200), weight, stats, Target(parsed.sparsity, parsed))
        expected, mask = admm.alps(weight, x, keep=parsed.keep, group=parsed.group, iterations=9, settled=0.003)
        assert torch.equal(solved.mask, mask)
        torch.testing.assert_close(solved.weight.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.5), ("unstructured", 0.7), ("2:4", 0.5)])
def test_is_better_than_sparsegpt_even_when_that_is_refitted(pattern, sparsity):
    for seed in range(3):
        weight, x, stats = problem(32, 64, 400, seed)
        target = Target(sparsity, parse_pattern(pattern))
        plain = solve(SparseGPT(), weight, stats, target)
        gram = (x.double().T @ x.double()).float()
        scale = gram.diagonal().sqrt()
        matrix = gram / scale / scale[:, None]
        refitted = masked_least_squares(matrix, (weight * scale) @ matrix, plain.mask, plain.weight * scale, 40) / scale
        found = solve(Alps(), weight, stats, target)
        errors = [output_error(x, weight, one) for one in (found.weight, refitted, plain.weight)]
        assert errors[0] <= 1.01 * errors[1]
        assert errors[1] <= errors[2]


def test_with_independent_inputs_what_is_kept_stays():
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    stats = InputStatistics(16, "gram")
    stats.update(torch.diag(torch.linspace(0.5, 3.0, 16)))
    solved = solve(Alps(damping=1e-6), weight, stats, Target(0.5))
    torch.testing.assert_close(solved.weight[solved.mask], weight[solved.mask], rtol=1e-4, atol=1e-5)


def test_loss_is_the_error_of_the_outputs():
    weight, x, stats = problem(20, 48, 500)
    solved = solve(Alps(), weight, stats, Target(0.5))
    assert solved.loss == pytest.approx(output_error(x, weight, solved.weight), rel=1e-3)


def test_weights_of_dead_inputs_go_first_and_are_named():
    weight, _, stats = problem(4, 16, 80, dead=(3, 7))
    solved = solve(Alps(), weight, stats, Target(0.25))
    assert not solved.mask[:, [3, 7]].any()
    assert "2 of 16 inputs are dead" in solved.notes[0]
    few = solve(Alps(), weight, stats, Target(0.5, count=3))
    kept = few.mask[:, [3, 7]]
    assert int(kept.sum()) == 5
    assert torch.equal(few.weight[:, [3, 7]][kept], weight[:, [3, 7]][kept])


@pytest.mark.parametrize("tokens", [1, 5])
def test_fewer_tokens_than_inputs(tokens):
    weight, x, stats = problem(8, 32, tokens)
    solved = solve(Alps(), weight, stats, Target(0.5))
    assert int((~solved.mask).sum()) == 128
    plain = weight.abs() * x.square().sum(dim=0).sqrt()
    cut = weight * (plain > plain.flatten().kthvalue(128).values)
    assert output_error(x, weight, solved.weight) <= output_error(x, weight, cut)


def test_of_duplicated_inputs_one_takes_over():
    weight, x, _ = problem(6, 8, 200)
    twice = torch.cat([x, x], dim=1)
    stats = InputStatistics(16, "gram")
    stats.update(twice)
    both = torch.cat([weight, weight], dim=1)
    solved = solve(Alps(refit_steps=60), both, stats, Target(0.5))
    lost = output_error(twice, both, solved.weight) / output_error(twice, both, torch.zeros_like(both))
    assert lost < 0.05
    assert lost <= output_error(twice, both, solve(SparseGPT(), both, stats, Target(0.5)).weight)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"iterations": 0}, "iterations of alps is 0"),
        ({"refit_steps": -1}, "refit_steps of alps is -1"),
        ({"settled": 1.0}, "settled of alps is 1"),
        ({"damping": 0.0}, "damping of alps is 0"),
        ({"penalty": 0.0}, "penalty of alps is 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes, said):
    with pytest.raises(UsageError, match=said):
        Alps(**changes)
