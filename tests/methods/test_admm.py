import pytest
import torch

from secateur.errors import UsageError
from secateur.methods._refitted import Refitted
from secateur.methods.admm import Admm, gradual_mask
from secateur.methods.sparsegpt import SparseGPT
from secateur.methods.wanda import Wanda
from secateur.patterns import parse_pattern
from secateur.plugins import Target
from secateur.statistics import InputStatistics
from tests.methods.problems import output_error, problem, solve
from tests.oracles import boza


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.8])
@pytest.mark.parametrize(("iterations", "changing"), [(1, 1), (6, 4), (20, 15)])
def test_equals_the_update_written_from_the_paper(sparsity, iterations, changing):
    for seed in range(3):
        weight, x, stats = problem(8, 24, 100, seed)
        solved = solve(Admm(iterations=iterations, mask_iterations=changing), weight, stats, Target(sparsity))
        expected, mask = boza.admm(weight, x, sparsity=sparsity, iterations=iterations, mask_iterations=changing)
        assert torch.equal(solved.mask, mask)
        torch.testing.assert_close(solved.weight.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("pattern", "columns"), [("2:4", 24), ("1:4", 24), ("4:8", 40), ("2:3", 30)])
def test_groups_equal_the_update_written_from_the_paper(pattern, columns):
    parsed = parse_pattern(pattern)
    for seed in range(3):
        weight, x, stats = problem(6, columns, 120, seed)
        solved = solve(Admm(), weight, stats, Target(parsed.sparsity, parsed))
        expected, mask = boza.admm(weight, x, keep=parsed.keep, group=parsed.group)
        assert torch.equal(solved.mask, mask)
        torch.testing.assert_close(solved.weight.double(), expected, rtol=1e-3, atol=1e-4)


def test_on_a_fixed_mask_it_comes_to_the_least_squares_solution():
    weight, x, stats = problem(6, 20, 200)
    solved = solve(Admm(iterations=300, mask_iterations=15), weight, stats, Target(0.5))
    h = x.double().T @ x.double()
    h += 0.1 * torch.diag(h.diagonal())  # in units of the inputs the damping is a share of each diagonal entry
    for row in range(6):
        kept = solved.mask[row].nonzero().squeeze(1)
        best = torch.linalg.solve(h[kept][:, kept], (h @ weight[row].double())[kept])
        torch.testing.assert_close(solved.weight[row, kept].double(), best, rtol=1e-3, atol=1e-3)


def test_the_share_of_zeros_grows_to_what_is_asked_for():
    score = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    for target in (Target(0.5), Target(0.5, parse_pattern("2:4")), Target(0.5, count=7)):
        wanted = 7 if target.count else 48
        before = torch.ones(6, 16, dtype=torch.bool)
        for share in (0.0, 0.3, 0.8, 1.0):
            mask = gradual_mask(score, target, share)
            assert int((~mask).sum()) == round(share * wanted)
            assert not (mask & ~before).any()
            before = mask


@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.5), ("unstructured", 0.7), ("2:4", 0.5)])
def test_with_a_refit_it_is_better_than_sparsegpt_and_than_a_refit_of_wanda(pattern, sparsity):
    target = Target(sparsity, parse_pattern(pattern))
    for seed in range(3):
        weight, x, stats = problem(32, 64, 400, seed)
        errors = [
            output_error(x, weight, solve(method, weight, stats, target).weight)
            for method in (Refitted(Admm()), Refitted(Wanda()), SparseGPT())
        ]
        assert errors[0] <= errors[1]
        assert errors[0] <= errors[2]


def test_with_independent_inputs_what_is_kept_stays():
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    stats = InputStatistics(16, "gram")
    stats.update(torch.diag(torch.linspace(0.5, 3.0, 16)))
    solved = solve(Admm(iterations=100), weight, stats, Target(0.5))
    torch.testing.assert_close(solved.weight[solved.mask], weight[solved.mask], rtol=1e-3, atol=1e-4)


def test_weights_of_dead_inputs_go_first_and_are_named():
    weight, _, stats = problem(4, 16, 80, dead=(3, 7))
    solved = solve(Admm(), weight, stats, Target(0.25))
    assert not solved.mask[:, [3, 7]].any()
    assert "2 of 16 inputs are dead" in solved.notes[0]
    few = solve(Admm(), weight, stats, Target(0.5, count=3))
    kept = few.mask[:, [3, 7]]
    assert int(kept.sum()) == 5
    assert torch.equal(few.weight[:, [3, 7]][kept], weight[:, [3, 7]][kept])


@pytest.mark.parametrize("tokens", [1, 5])
def test_fewer_tokens_than_inputs(tokens):
    weight, x, stats = problem(8, 32, tokens)
    solved = solve(Admm(), weight, stats, Target(0.5))
    assert int((~solved.mask).sum()) == 128
    cut = solve(Wanda(), weight, stats, Target(0.5)).weight
    assert output_error(x, weight, solved.weight) <= output_error(x, weight, cut)


def test_of_duplicated_inputs_one_takes_over():
    weight, x, _ = problem(6, 8, 200)
    twice = torch.cat([x, x], dim=1)
    stats = InputStatistics(16, "gram")
    stats.update(twice)
    both = torch.cat([weight, weight], dim=1)
    solved = solve(Refitted(Admm()), both, stats, Target(0.5))
    assert output_error(twice, both, solved.weight) < 0.05 * output_error(twice, both, torch.zeros_like(both))


def test_weights_that_were_bfloat16_are_pruned_exactly():
    weight, _, stats = problem(8, 32, 200)
    weight = weight.bfloat16().float()  # many of them equal
    solved = solve(Admm(), weight, stats, Target(0.5))
    assert int((~solved.mask).sum()) == 128
    assert solved.weight.bfloat16().isfinite().all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"iterations": 0}, "mask_iterations of admm is 15 of 0"),
        ({"mask_iterations": 0}, "mask_iterations of admm is 0 of 20"),
        ({"damping": 0.0}, "damping of admm is 0"),
        ({"penalty": 0.0}, "penalty of admm is 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes, said):
    with pytest.raises(UsageError, match=said):
        Admm(**changes)
