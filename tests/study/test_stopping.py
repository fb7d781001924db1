"""When a trial is given up, and that nobody is given up who could still be on the front."""

from __future__ import annotations

import math

import pytest

from secateur.study.stopping import Bar, hopeless, limits_of
from secateur.study.values import parse_constraint

DENSE = {"perplexity": 20.0, "nll_per_token": math.log(20.0)}


def rival(number: int, proxy: float, **others: float) -> dict[str, object]:
    return {"number": number, "proxy": proxy, "others": others}


def test_a_limit_is_carried_over_by_the_dense_model():
    # On the first windows the dense model has 25 where it has 20 on all, so 30 stands for 37.5 there.
    ((text, limit),) = limits_of([parse_constraint("perplexity <= 1.5x")], DENSE, math.log(25.0))
    assert text == "perplexity <= 1.5x"
    assert math.exp(limit) == 37.5 or math.isclose(math.exp(limit), 37.5)
    bar = Bar(2, 2.0, [(text, limit)])
    assert hopeless(bar, math.log(74.9), {}) == ""
    reason = hopeless(bar, math.log(75.1), {})
    assert "75.1" in reason
    assert "37.5" in reason
    assert "perplexity <= 1.5x" in reason


def test_limits_on_other_quantities_and_lower_limits_stop_nobody():
    limits = [parse_constraint("bytes_disk <= 3"), parse_constraint("perplexity >= 1x")]
    assert limits_of(limits, DENSE, 3.0) == []


def test_accuracy_is_compared_by_the_share_of_wrong_texts():
    limit = [parse_constraint("accuracy >= dense - 0.02", "labels")]
    dense = {"accuracy": 0.9}
    ((_, allowed),) = limits_of(limit, dense, math.log(0.05))
    assert math.exp(allowed) == pytest.approx(0.12)  # the dense model does better on the few: that says little
    ((text, allowed),) = limits_of(limit, dense, math.log(0.13))
    assert math.exp(allowed) == pytest.approx(0.15)
    bar = Bar(64, 2.0, [(text, allowed)], labels=True)
    assert hopeless(bar, math.log(0.29), {}) == ""
    reason = hopeless(bar, math.log(0.31), {})
    assert reason.startswith("share of wrong texts 0.310 on the first 64 texts is more than 2 times the 0.150")
    rivals = Bar(64, 2.0, rivals=[rival(3, 0.1)], labels=True)
    assert hopeless(rivals, math.log(0.19), {}) == ""
    assert "0.100 of trial 3" in hopeless(rivals, math.log(0.21), {})


def test_an_upper_limit_on_accuracy_stops_nobody():
    assert limits_of([parse_constraint("accuracy <= 0.5", "labels")], {"accuracy": 0.9}, -2.0) == []


def test_with_one_objective_the_best_complete_trial_is_the_measure():
    bar = Bar(2, 3.0, rivals=[rival(4, 50.0), rival(7, 30.0)])
    assert hopeless(bar, math.log(89.0), {}) == ""
    assert "trial 7" in hopeless(bar, math.log(91.0), {})


def test_who_is_better_in_another_objective_is_never_given_up():
    bar = Bar(2, 2.0, rivals=[rival(1, 30.0, nonzero=100.0)], objectives={"nonzero": "minimize"})
    assert hopeless(bar, math.log(1e6), {"nonzero": 99.0}) == ""
    assert "trial 1" in hopeless(bar, math.log(61.0), {"nonzero": 100.0})
    assert hopeless(bar, math.log(59.0), {"nonzero": 200.0}) == ""


def test_what_is_not_known_yet_stops_nobody():
    fast = Bar(2, 2.0, rivals=[rival(1, 30.0)], objectives={"decode_tokens_per_second": "maximize"})
    assert hopeless(fast, math.log(1e6), {"nonzero": 1.0}) == ""
    only_limits = Bar(2, 2.0, rivals=[rival(1, 30.0)], rivalry=False)
    assert hopeless(only_limits, math.log(1e6), {}) == ""


def test_a_destroyed_model_is_a_reason_not_an_overflow():
    assert "inf" in hopeless(Bar(2, 3.0, rivals=[rival(0, 30.0)]), 1e5, {})
