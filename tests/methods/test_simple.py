"""random, magnitude and wanda: kept weights stay bit-equal, and the mask is the brute-force one."""

import pytest
import torch

from secateur.errors import UnknownNameError
from secateur.methods.magnitude import Magnitude
from secateur.methods.random import Random
from secateur.methods.wanda import Wanda
from secateur.patterns import parse_pattern
from secateur.plugins import Target
from secateur.statistics import InputStatistics
from tests.oracles import masks as oracle


def solve(method, weight, target, stats=None, seed=0):
    return method.solve(weight, stats, target, generator=torch.Generator().manual_seed(seed))


def problem(rows=7, columns=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, columns, generator=generator) * torch.rand(columns, generator=generator) * 3
    stats = InputStatistics(columns, "norms")
    stats.update(x)
    return torch.randn(rows, columns, generator=generator), x, stats


@pytest.mark.parametrize("method", [Random(), Magnitude(), Magnitude(scope="row"), Magnitude(scope="global"), Wanda()])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_kept_weights_are_bit_equal(method, pattern):
    weight, _, stats = problem()
    weight[0, :5] = -0.0
    solved = solve(method, weight, Target(0.5, parse_pattern(pattern)), stats)
    kept = solved.mask
    assert torch.equal(solved.weight[kept].view(torch.int32), weight[kept].view(torch.int32))


def test_magnitude_scopes():
    weight, _, _ = problem()
    size = weight.abs()
    matrix = oracle.of_matrix(size, round(0.3 * weight.numel()))
    for scope in ("matrix", "global"):
        assert torch.equal(solve(Magnitude(scope=scope), weight, Target(0.3)).mask, matrix)
    assert torch.equal(solve(Magnitude(scope="row"), weight, Target(0.3)).mask, oracle.per_row(size, round(0.3 * 24)))
    grouped = solve(Magnitude(), weight, Target(0.25, parse_pattern("3:4")))
    assert torch.equal(grouped.mask, oracle.per_group(size, 3, 4))
    with pytest.raises(UnknownNameError, match="scope"):
        Magnitude(scope="rows")


def test_wanda_is_the_formula_of_the_paper():
    for seed in range(5):
        weight, x, stats = problem(seed=seed)
        score = weight.double().abs() * x.double().square().sum(dim=0).sqrt()
        assert torch.equal(solve(Wanda(), weight, Target(0.6), stats).mask, oracle.per_row(score, round(0.6 * 24)))
        grouped = solve(Wanda(), weight, Target(0.5, parse_pattern("2:4")), stats)
        assert torch.equal(grouped.mask, oracle.per_group(score, 2, 4))


def test_a_count_is_spread_evenly_over_the_rows():
    weight, _, stats = problem()
    for count in (0, 3, 50, 83, 7 * 24):
        rows = (~solve(Wanda(), weight, Target(0.5, count=count), stats).mask).sum(dim=1)
        assert int(rows.sum()) == count
        assert int(rows.max() - rows.min()) <= 1


def test_wanda_with_gram_statistics_is_the_same():
    weight, x, stats = problem()
    gram = InputStatistics(24, "gram")
    gram.update(x)
    assert torch.equal(solve(Wanda(), weight, Target(0.5), stats).mask, solve(Wanda(), weight, Target(0.5), gram).mask)


def test_random_follows_its_generator_alone():
    weight, _, _ = problem()
    one = solve(Random(), weight, Target(0.5), seed=1).mask
    assert torch.equal(one, solve(Random(), weight * 2, Target(0.5), seed=1).mask)
    assert not torch.equal(one, solve(Random(), weight, Target(0.5), seed=2).mask)


def test_random_prunes_every_place_equally_often():
    weight = torch.ones(4, 5)
    generator = torch.Generator().manual_seed(0)
    times = sum((~Random().solve(weight, None, Target(0.4), generator=generator).mask).int() for _ in range(2000))
    assert int(times.sum()) == 2000 * 8
    assert ((times - 800).abs() < 5 * (2000 * 0.4 * 0.6) ** 0.5).all()
