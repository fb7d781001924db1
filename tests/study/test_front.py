"""The front against its definition, the knee where it can be seen, and what is never chosen."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from secateur.study.front import best_of, finalists_of, front_of, knee_of, points_of
from secateur.study_result import Trial

COORDINATES = st.integers(1, 6).map(float)
POINTS = st.lists(st.tuples(COORDINATES, COORDINATES, COORDINATES), min_size=1, max_size=12).map(
    lambda points: dict(enumerate(points))
)


@given(POINTS)
def test_the_front_is_those_that_nobody_betters(points):
    front = front_of(points)
    for number, point in points.items():
        better = [
            other for other in points.values()
            if other != point and all(a <= b for a, b in zip(other, point, strict=True))
        ]  # fmt: skip
        assert (number in front) == (not better)
    assert front == sorted(front)


@given(POINTS, st.integers(1, 5))
def test_finalists_are_of_the_front_with_the_knee_and_as_many_as_there_can_be(points, count):
    front = front_of(points)
    chosen = finalists_of(points, front, count)
    assert len(chosen) == len(set(chosen)) == min(count, len(front))
    assert set(chosen) <= set(front)
    assert chosen[0] == knee_of(points, front)


def test_the_knee_is_farthest_from_the_chord_in_logarithms():
    points = {0: (1.0, 1000.0), 1: (2.0, 20.0), 2: (30.0, 5.0), 3: (1000.0, 1.0)}

    def distance(point):
        x, y = (math.log(value) / math.log(1000) for value in point)
        return (1 - x - y) / math.sqrt(2)

    assert knee_of(points, [0, 1, 2, 3]) == max(points, key=lambda number: distance(points[number])) == 1


def test_one_objective_has_its_best_and_an_empty_front_nothing():
    assert knee_of({3: (5.0,), 4: (2.0,), 9: (2.0,)}, [4, 9]) == 4
    assert knee_of({}, []) is None
    assert finalists_of({}, [], 3) == []


def test_only_complete_trials_that_meet_the_constraints_and_have_all_values_count():
    values = {"perplexity": 10.0, "sparsity": 0.5}
    trials = [
        Trial(0, "complete", {}, "", values, meets=True),
        Trial(1, "complete", {}, "", values, meets=False),
        Trial(2, "stopped", {}, "", values),
        Trial(3, "complete", {}, "", {**values, "perplexity": None}),
        Trial(4, "failed", {}, ""),
    ]
    assert points_of(trials, {"perplexity": "minimize", "sparsity": "maximize"}) == {0: (10.0, -0.5)}


def test_the_best_of_each_objective_is_the_first_of_the_best():
    trials = [Trial(n, "complete", {}, "", {"speed": speed, "size": size}, n != 3)
              for n, (speed, size) in enumerate([(2.0, 5.0), (3.0, 7.0), (3.0, 5.0), (9.0, 1.0)])]  # fmt: skip
    objectives = {"speed": "maximize", "size": "minimize"}
    assert best_of(points_of(trials, objectives), objectives) == {"speed": 1, "size": 0}
    assert best_of({}, objectives) == {}
