"""Evolution on losses that are known: budget, bounds, fitness that never rises, seeds, and where it must arrive."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch

from secateur.allocation._base import Searching, Share, make_allocation
from secateur.allocation.evolve import Evolve, Switches, evolved, forwards
from secateur.allocation.sensitivity import Sensitivity
from secateur.errors import SparsityError, UsageError

SIZES = {"a": 100, "b": 100, "c": 100, "d": 300, "e": 300, "f": 70}


class Bench:
    """A model whose loss is a function of the levels; it notes what it was asked."""

    def __init__(self, loss: Callable[[Mapping[str, int]], float], seed: int = 0, windows: int = 8) -> None:
        self.generator, self.windows = random.Random(seed), windows
        self.history: list[float] = []
        self.asked: list[Sequence[int]] = []
        self._loss = loss

    def loss(self, levels: Mapping[str, int], windows: Sequence[int]) -> float:
        assert all(0 <= number < self.windows for number in windows)
        self.asked.append(tuple(windows))
        return self._loss(levels)

    def tell(self, loss: float) -> None:
        self.history.append(loss)


def bowl(best: Mapping[str, int]) -> Callable[[Mapping[str, int]], float]:
    return lambda levels: float(sum(SIZES[name] * (levels[name] - best[name]) ** 2 for name in best))


def curves(seed: int, levels: int = 7) -> list[Share]:
    """Six matrices with curves that are convex and differ, around a sparsity of a half."""
    draw = random.Random(seed)
    told = []
    for name, size in SIZES.items():
        factor = draw.uniform(0.1, 3)
        points = [(0.35 + 0.3 * k / (levels - 1), factor * (k + 1) ** 2) for k in range(levels)]
        told.append(Share(name, size, 0, (torch.tensor(points, dtype=torch.float64),)))
    return told


def zeros(made: Mapping[str, float]) -> float:
    return sum(SIZES[name] * share for name, share in made.items())


@pytest.mark.parametrize("seed", range(12))
def test_the_number_of_zeros_and_the_bounds_are_kept(seed: int) -> None:
    told, rule = curves(seed), Evolve(generations=15)
    start = rule.allocate(told, 0.5)
    draw = random.Random(seed)
    bench = Bench(bowl({name: draw.randrange(7) for name in SIZES}), seed)
    made = rule.refine(told, start, 0.5, bench)
    assert zeros(made) == pytest.approx(zeros(start), abs=1e-9)
    assert all(0.35 - 1e-9 <= share <= 0.65 + 1e-9 for share in made.values())
    tried = rule.tried(0.5)
    off = [name for name in made if min(abs(made[name] - level) for level in tried) > 1e-9]
    assert all(made[name] == start[name] for name in off)  # what lies between two levels stays
    assert len(off) <= 1


@pytest.mark.parametrize("seed", range(6))
def test_the_best_fitness_never_rises_and_is_that_of_the_result(seed: int) -> None:
    start = dict.fromkeys(SIZES, 3)
    draw = random.Random(100 + seed)
    loss = bowl({name: draw.randrange(7) for name in SIZES})
    bench = Bench(loss, seed)
    made = evolved(start, Switches(SIZES, 7), 25, 8, bench)
    assert len(bench.history) == 26
    assert bench.history[0] == loss(start)
    assert all(after <= before for before, after in itertools.pairwise(bench.history))
    assert bench.history[-1] == loss(made)
    assert bench.history[-1] < bench.history[0]


def test_it_arrives_where_the_loss_is_lowest() -> None:
    best = {"a": 5, "b": 1, "c": 3, "d": 4, "e": 2, "f": 3}
    made = evolved(dict.fromkeys(SIZES, 3), Switches(SIZES, 7), 60, 16, Bench(bowl(best)))
    assert made == best


def test_matrices_of_other_sizes_are_switched_where_the_sizes_allow_it() -> None:
    # One of 300 for three of 100; the one of 70 has no partner.
    best = {"a": 4, "b": 4, "c": 4, "d": 2, "e": 3, "f": 6}
    made = evolved(dict.fromkeys(SIZES, 3), Switches(SIZES, 7), 80, 16, Bench(bowl(best)))
    assert made == {**best, "f": 3}


def test_without_generations_it_is_sensitivity() -> None:
    told = curves(1)
    bench = Bench(lambda levels: pytest.fail("nothing is measured"))
    start = Sensitivity().allocate(told, 0.5)
    assert Evolve(generations=0).allocate(told, 0.5) == start
    assert Evolve(generations=0).refine(told, start, 0.5, bench) == start
    assert Evolve().tried(0.5) == pytest.approx([pair[0] for pair in told[0].measured[0].tolist()])


def test_a_seed_gives_the_same_and_another_seed_looks_elsewhere() -> None:
    loss = bowl({"a": 6, "b": 0, "c": 5, "d": 6, "e": 0, "f": 1})
    made = []
    for seed in (1, 1, 2):
        bench = Bench(loss, seed)
        evolved(dict.fromkeys(SIZES, 3), Switches(SIZES, 7), 3, 4, bench)
        made.append(bench.history)
    assert made[0] == made[1]
    assert made[0] != made[2]


@pytest.mark.parametrize(("windows", "offspring"), [(16, 8), (1, 1), (3, 2), (8, 32), (2, 8)])
def test_no_more_forwards_than_it_says(windows: int, offspring: int) -> None:
    bench = Bench(bowl({"a": 6, "b": 0}), windows=windows)
    evolved(dict.fromkeys(SIZES, 3), Switches(SIZES, 7), 10, offspring, bench)
    assert sum(map(len, bench.asked)) <= forwards(windows, 10, offspring)
    assert all(len({*one}) == len(one) for one in bench.asked)


def test_nothing_to_switch_is_no_fault() -> None:
    for sizes in ({"a": 100}, {"a": 100, "b": 70}):
        bench = Bench(lambda levels: 1.0)
        assert evolved(dict.fromkeys(sizes, 1), Switches(sizes, 3), 4, 4, bench) == dict.fromkeys(sizes, 1)
    edge = {"a": 2, "b": 2}  # both at the last level: none can rise
    assert evolved(edge, Switches(dict.fromkeys("ab", 10), 3), 4, 4, Bench(lambda levels: 1.0)) == edge


@pytest.mark.parametrize(
    ("options", "said"),
    [({"generations": -1}, "generations of evolve is -1"), ({"offspring": 0}, "offspring of evolve is 0"),
     ({"windows": 0}, "windows of evolve is 0"), ({"step": 0.0}, "step of evolve"), ({"step": 0.2}, "step of evolve"),
     ({"sequences": 0}, "sequences of sensitivity"), ({"spread": 0.6, "step": 0.1}, "spread of sensitivity")],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options: dict[str, float], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Evolve(**options)  # type: ignore[arg-type]


def test_it_is_found_as_a_rule_that_searches() -> None:
    rule = make_allocation("evolve", {"generations": "2"})
    assert isinstance(rule, Searching)
    assert rule.forwards == forwards(16, 2, 8)
    with pytest.raises(SparsityError):
        rule.tried(0.97)
    assert not isinstance(make_allocation("sensitivity"), Searching)
