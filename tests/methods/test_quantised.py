"""Kept weights in few bits: on the grid of the sparse format, zeros stay, and no worse than rounding to nearest."""

from __future__ import annotations

import itertools

import pytest
import torch

from secateur.errors import UsageError
from secateur.methods._quantised import Quantised, bare, descend, rounded, with_bits
from secateur.methods._refitted import with_refit
from secateur.methods.alps import Alps
from secateur.methods.magnitude import Magnitude
from secateur.methods.sparsegpt import SparseGPT
from secateur.methods.wanda import Wanda
from secateur.patterns import parse_pattern
from secateur.plugins import Target
from secateur.quantise import LIMITS, expand_scales, quantise
from secateur.statistics import InputStatistics
from tests.methods.problems import output_error, problem, solve

METHODS = {"sparsegpt": with_refit(SparseGPT(), None), "published": SparseGPT(), "alps": Alps(iterations=12)}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
each_width = pytest.mark.parametrize(("bits", "group_size"), [(8, 64), (4, 64), (4, 128)])


def again(weight, bits, group_size):
    """What the sparse format makes of a matrix."""
    codes, scales = quantise(weight, bits, group_size)
    return codes.float() * expand_scales(scales, weight.shape[1], group_size)


@each_method
@each_width
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_the_grid_is_met_zeros_stay_and_nearest_is_no_better(method, bits, group_size, pattern):
    for seed in range(2):
        weight, x, stats = problem(12, 200, 300, seed, dead=(5, 130))
        target = Target(0.5, parse_pattern(pattern))
        plain = solve(method, weight, stats, target)
        made = solve(Quantised(method, bits, group_size), weight, stats, target)
        assert torch.equal(made.weight, again(made.weight, bits, group_size)), "packing it again changes nothing"
        assert torch.equal(made.mask, plain.mask)
        assert not made.weight[~made.mask].view(torch.int32).any(), "plain zeros, no negative ones"
        for start in range(0, 200, group_size):
            values = made.weight[:, start : start + group_size]
            for row in values:
                assert len(row.unique()) <= LIMITS[bits][1] - LIMITS[bits][0] + 1
        nearest = [rounded(plain.weight, bits, group_size), again(plain.weight, bits, group_size)]
        errors = [output_error(x, weight, one) for one in (made.weight, *nearest)]
        assert errors[0] <= errors[1] * (1 + 1e-6)
        if bits == 4:  # 4 bits cost enough to tell
            assert errors[0] < errors[2]
            assert errors[0] - output_error(x, weight, plain.weight) < 0.9 * (errors[1] - errors[0]) + errors[0]
        assert made.loss == pytest.approx(errors[0], rel=1e-3)
        assert made.loss_before_rounding == plain.loss
        assert made.loss_before_refit == plain.loss_before_refit


@pytest.mark.parametrize("bits", [8, 4])
def test_every_row_is_no_worse_than_rounded_to_nearest(bits):
    weight, x, stats = problem(30, 96, 40, seed=3)  # fewer tokens than columns
    plain = solve(SparseGPT(), weight, stats, Target(0.6))
    made = solve(Quantised(SparseGPT(), bits, 64), weight, stats, Target(0.6)).weight
    nearest = rounded(plain.weight, bits, 64)
    for row in range(30):
        ours, theirs = (output_error(x, weight[row : row + 1], one[row : row + 1]) for one in (made, nearest))
        assert ours <= theirs * (1 + 1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_with_inputs_that_have_nothing_to_do_with_each_other_nearest_is_best(bits):
    stats = InputStatistics(64, "gram")
    stats.update(torch.diag(torch.linspace(0.5, 2.0, 64)))
    weight = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    made = solve(Quantised(SparseGPT(), bits, 64), weight, stats, Target(0.5))
    assert torch.equal(made.weight, rounded(weight.masked_fill(~made.mask, 0.0), bits, 64))


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_on_the_grid_and_sparse_already_stays(bits):
    weight, _, stats = problem(9, 128, 400)
    on_grid = again(again(weight, bits, 64), bits, 64)
    on_grid = rounded(on_grid.masked_fill(weight.abs() < weight.abs().median(), 0.0), bits, 64)
    share = float((on_grid == 0).float().mean())
    made = solve(Quantised(Magnitude(), bits, 64), on_grid, stats, Target(share))
    assert torch.equal(made.weight, on_grid)
    # Nothing is pruned, and zeros are zeros all the same.
    made = solve(Quantised(SparseGPT(), bits, 64), on_grid, stats, Target(0.0))
    assert torch.equal(made.weight, on_grid)


def test_a_step_of_the_descent_is_the_best_value_of_its_column():
    """Two columns and one pass: the second column is what brute force over its codes finds."""
    weight = torch.tensor([[1.0, 0.37]])
    stats = InputStatistics(2, "gram")
    stats.update(torch.tensor([[1.0, 0.9], [0.2, 1.0], [0.5, -0.1]]))
    pruned = torch.tensor([[0.8, 0.37]])  # the first holds the largest code, so it stays
    made = descend(weight, pruned, pruned != 0, stats.gram, 4, 64, passes=1)
    codes, scales = quantise(pruned, 4, 64)
    scale, first = float(scales), float(codes[0, 0] * scales.float())
    h = stats.gram + 0.01 * stats.gram.diagonal().mean() * torch.eye(2)

    def error(code):
        d = torch.tensor([[first, code * scale]]) - weight
        return float(d @ h @ d.t())

    best = min(range(-8, 8), key=error)
    assert made[0].tolist() == pytest.approx([first, best * scale])


def test_the_descent_ends_where_no_single_code_can_do_better():
    weight, _, stats = problem(4, 24, 200, seed=1)
    mask = torch.rand(4, 24, generator=torch.Generator().manual_seed(1)) > 0.4
    pruned = weight * mask
    made = descend(weight, pruned, mask, stats.gram, 4, 64, passes=50).double()
    scales = quantise(pruned, 4, 64)[1].double()
    h = stats.gram.double()
    h += 0.01 * h.diagonal().mean() * torch.eye(24, dtype=torch.float64)

    def error(row):
        return float((row - weight[number].double()) @ h @ (row - weight[number].double()))

    for number, column in itertools.product(range(4), range(24)):
        code = round(float(made[number, column] / scales[number, 0]))
        largest = (made[number] / scales[number, 0]).round().abs().max()
        if mask[number, column] and abs(code) < largest:
            for other in {max(code - 1, -8), min(code + 1, 7)} - {code}:
                changed = made[number].clone()
                changed[column] = other * scales[number, 0]
                assert error(changed) >= error(made[number]) * (1 - 1e-5)


def test_inputs_of_which_nothing_is_known_are_rounded_to_nearest():
    weight, _, stats = problem(6, 64, 50, dead=range(64))
    for given in (stats, None):
        made = solve(Quantised(Magnitude(), 8, 64), weight, given, Target(0.5))
        assert torch.equal(made.weight, rounded(solve(Magnitude(), weight, None, Target(0.5)).weight, 8, 64))


def test_inputs_are_not_changed_and_the_result_is_the_same_twice():
    weight, _, stats = problem(6, 100, 150)
    kept, gram = weight.clone(), stats.gram.clone()
    first, second = (solve(Quantised(SparseGPT(), 4, 64), weight, stats, Target(0.5)).weight for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(weight, kept)
    assert torch.equal(stats.gram, gram)


def test_who_can_be_rounded():
    assert with_bits(SparseGPT(), None, 64) == SparseGPT()
    assert with_bits(with_refit(Wanda(), True), 8, 64).statistics == "gram"
    assert bare(with_bits(with_refit(SparseGPT(), None), 8, 64)) == SparseGPT()
    assert with_bits(with_refit(Wanda(), True), 8, 64).sees_dense_block(parse_pattern("2:4"))
    for method in (Wanda(), Magnitude()):
        with pytest.raises(UsageError, match="needs the Gram matrix"):
            with_bits(method, 8, 64)
