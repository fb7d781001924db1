"""What every allocation rule promises. The rules are found, so a new one is tested without being named here."""

import dataclasses
from pathlib import Path

import pytest
import torch

import secateur.allocation
from secateur import plugins
from secateur.allocation._base import Look, Measuring, Share, WithGradients, make_allocation
from secateur.errors import SparsityError, UnknownNameError
from secateur.methods.sparsegpt import SparseGPT
from secateur.plugins import Target
from secateur.statistics import InputStatistics

NAMES = list(plugins.available("allocation"))
SHAPES = {"a.weight": (4, 8), "b.weight": (24, 32), "c.weight": (16, 48), "d.weight": (8, 8)}
BLOCKS = {"a.weight": 0, "b.weight": 0, "c.weight": 1, "d.weight": 3}


def looks(rule, sparsity):
    """What a rule sees of four matrices with heavy tails of different weight."""
    for number, (name, (rows, columns)) in enumerate(SHAPES.items()):
        generator = torch.Generator().manual_seed(number)
        weight = torch.randn(rows, columns, generator=generator).mul_(1 + number).pow_(3)
        stats = None
        if rule.needs in ("norms", "gram"):
            stats = InputStatistics(columns, rule.needs)
            stats.update(torch.randn(100, columns, generator=generator))

        def solve(level, weight=weight, stats=stats):
            return SparseGPT().solve(weight, stats, Target(level), generator=torch.Generator()).weight

        fisher = torch.rand(rows, generator=generator) if isinstance(rule, WithGradients) else None
        yield name, Look(weight, stats, fisher, sparsity, solve)


def shares(rule, sparsity):
    """The same as a rule is told of them when all were measured."""
    sizes = {name: rows * columns for name, (rows, columns) in SHAPES.items()}
    measured = {}
    if isinstance(rule, Measuring):
        measured = {name: (rule.measure(look),) for name, look in looks(rule, sparsity)}
        if hasattr(rule, "of_block"):
            whole = {b: rule.of_block([measured[n][0] for n in SHAPES if BLOCKS[n] == b]) for b in {*BLOCKS.values()}}
            measured = {name: (whole[BLOCKS[name]],) for name in SHAPES}
    return [Share(name, sizes[name], BLOCKS[name], measured.get(name, ())) for name in SHAPES]


def test_every_file_is_a_rule():
    files = {path.stem for path in Path(secateur.allocation.__file__).parent.glob("[!_]*.py")}
    assert files == {name.replace("-", "_") for name in NAMES}
    assert {"uniform", "owl", "alpha", "sensitivity", "evolve"} <= files


@pytest.mark.parametrize("name", NAMES)
def test_is_described(name):
    rule = make_allocation(name)
    assert rule.needs in ("nothing", "weights", "norms", "gram")
    assert isinstance(rule, Measuring) == (rule.needs != "nothing")
    description = plugins.describe("allocation", name, "allocation")
    assert all(option.help for option in description.options)
    assert {option.name for option in description.options} == {field.name for field in dataclasses.fields(rule)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sparsity", [0.0, 0.02, 0.3, 0.5, 0.9, 0.95])
def test_the_weighted_mean_is_the_sparsity_asked_for(name, sparsity):
    rule = make_allocation(name)
    told = shares(rule, sparsity)
    made = rule.allocate(told, sparsity)
    assert set(made) == set(SHAPES)
    assert all(0 <= share <= 0.95 for share in made.values())
    total = sum(one.size for one in told)
    assert sum(made[one.name] * one.size for one in told) / total == pytest.approx(sparsity, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_comes_twice_and_the_order_of_matrices_says_nothing(name):
    rule = make_allocation(name)
    told = shares(rule, 0.6)
    first = rule.allocate(told, 0.6)
    assert rule.allocate(told, 0.6) == first
    assert rule.allocate(told[::-1], 0.6) == pytest.approx(first)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_a_sparsity_outside_the_range_is_refused(name, sparsity):
    rule = make_allocation(name)
    told = shares(rule, 0.5)
    with pytest.raises(SparsityError):
        rule.allocate(told, sparsity)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "uniform"])
def test_a_sparsity_that_bounds_cannot_meet_is_refused(name):
    rule = make_allocation(name)
    told = shares(rule, 0.95)
    with pytest.raises(SparsityError, match="cannot be met"):
        rule.allocate(told, 0.97)


def test_unknown_names_are_refused():
    with pytest.raises(UnknownNameError, match="allocation 'oowl'"):
        make_allocation("oowl")
    with pytest.raises(UnknownNameError, match="option of allocation owl"):
        make_allocation("owl", {"spred": 1})
