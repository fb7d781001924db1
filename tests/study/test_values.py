"""Objectives and constraints: what is read, what is met, and what no trial can meet."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.errors import StudyError, UnknownNameError
from secateur.study.read import read_study
from secateur.study.values import Reach, check_constraints, meets, parse_constraint, read_objectives, violations
from tests.study.studies import plain

DENSE = {"perplexity": 20.0, "bytes_disk": 1000.0, "accuracy": 0.9}


@pytest.mark.parametrize(
    ("text", "name", "at_most", "limit"),
    [
        ("bytes_disk <= 150MB", "bytes_disk", True, 150e6),
        ("bytes-disk<=1.5 KiB", "bytes_disk", True, 1536),
        ("perplexity <= 1.1x", "perplexity", True, 22.0),
        ("bytes_disk >= 0.5X", "bytes_disk", False, 500.0),
        ("sparsity >= 50%", "sparsity", False, 0.5),
        ("nonzero <= 1e6", "nonzero", True, 1e6),
        ("perplexity <= 30", "perplexity", True, 30.0),
        ("perplexity <= dense + 2.5", "perplexity", True, 22.5),
        ("perplexity <= dense", "perplexity", True, 20.0),
        ("accuracy >= dense - 0.01", "accuracy", False, 0.89),
        ("accuracy>=dense-1%", "accuracy", False, 0.89),
        ("accuracy >= 0.99x", "accuracy", False, 0.891),
    ],
)
def test_constraints_are_read(text, name, at_most, limit):
    found = parse_constraint(text, "labels" if name == "accuracy" else "language")
    assert (found.name, found.at_most) == (name, at_most)
    assert found.limit(DENSE) == pytest.approx(limit)


@pytest.mark.parametrize(
    "text",
    ["perplexity < 3", "perplexity", "perplexity <= ", "perplexity <= many", "perplexity <= 150MB",
     "sparsity >= 2x", "perplexity <= 0x", "bytes_disk <= -1", 5, "perplexity <= dense -", "perplexity <= dense * 2",
     "perplexity <= dense - 1MB", "sparsity >= dense + 0.1", "perplexity <= densely"],
)  # fmt: skip
def test_other_texts_are_refused(text):
    with pytest.raises(StudyError):
        parse_constraint(text)


def test_names_are_checked_and_the_nearest_is_suggested():
    with pytest.raises(UnknownNameError, match="perplexty") as raised:
        parse_constraint("perplexty <= 3")
    assert raised.value.nearest == "perplexity"
    with pytest.raises(UnknownNameError) as raised:
        read_objectives({"bytes": "minimize"})
    assert "bytes_disk" in raised.value.hint
    with pytest.raises(UnknownNameError, match="minimise"):
        read_objectives({"perplexity": "minimise"})
    for nothing in (None, {}, ["perplexity"]):
        with pytest.raises(StudyError):
            read_objectives(nothing)


def test_a_violation_is_the_share_by_which_a_limit_is_missed():
    limits = [parse_constraint("perplexity <= 1.1x"), parse_constraint("sparsity >= 0.5")]
    missed = violations(limits, {"perplexity": 24.2, "sparsity": 0.6}, DENSE)
    assert missed["perplexity <= 1.1x"] == pytest.approx(0.1)
    assert missed["sparsity >= 0.5"] == pytest.approx(-0.2)
    assert meets(missed) is False
    assert meets(violations(limits, {"perplexity": 22.0, "sparsity": 0.5}, DENSE)) is True
    assert meets(violations(limits, {"sparsity": 0.6}, DENSE)) is None
    assert meets(violations(limits, {"sparsity": 0.4}, DENSE)) is False  # whatever the perplexity is
    assert meets({}) is True


@pytest.mark.parametrize(
    ("constraints", "named"),
    [
        (["bytes_disk <= 100MB", "bytes_disk >= 200MB"], ["100MB", "200MB"]),
        (["perplexity <= 1.1x", "perplexity >= 1.2x"], ["1.1x", "1.2x"]),
        (["perplexity <= dense + 1", "perplexity >= dense + 2"], ["dense + 1", "dense + 2"]),
        (["sparsity >= 0.9"], ["sparsity >= 0.9", "0.6"]),
        (["sparsity <= 0.1"], ["sparsity <= 0.1", "0.2"]),
    ],
)
def test_contradictions_are_told_before_anything_is_opened(constraints, named):
    with pytest.raises(StudyError) as raised:
        read_study(plain(constraints=constraints), Path(), "s.yaml")
    assert "no trial can meet" in raised.value.message
    assert all(name in raised.value.message for name in named)


def test_constraints_that_touch_can_be_met():
    read_study(plain(constraints=["sparsity >= 0.6", "perplexity <= 1.1x", "perplexity >= 1.1x"]), Path(), "s.yaml")


def test_limits_that_some_dense_model_allows_are_not_refused_before_it_is_measured():
    limits = [parse_constraint("perplexity <= 1.1x"), parse_constraint("perplexity >= dense + 3")]
    check_constraints(limits, {}, {})  # from 30 on there is room
    check_constraints(limits, {}, {"perplexity": 40.0})
    with pytest.raises(StudyError, match="no trial can meet both"):
        check_constraints(limits, {}, DENSE)


@pytest.mark.parametrize(
    ("name", "task", "hint"), [("accuracy", "language", "task: labels"), ("perplexity", "labels", "leave task: labels")]
)
def test_a_quantity_of_the_other_task_is_refused_with_the_way_out(name, task, hint):
    for refused in (lambda: read_objectives({name: "minimize"}, task), lambda: parse_constraint(f"{name} <= 1", task)):
        with pytest.raises(StudyError, match=f"{name} is not measured in a study with task {task}") as raised:
            refused()
        assert hint in raised.value.hint


def test_relative_and_absolute_limits_are_compared_once_the_dense_model_is_measured():
    limits = [parse_constraint("perplexity <= 10"), parse_constraint("perplexity >= 1x")]
    check_constraints(limits, {}, {})
    with pytest.raises(StudyError, match="no trial can meet both"):
        check_constraints(limits, {}, DENSE)


def test_what_the_space_cannot_give_is_refused_with_the_reason():
    reach = {"bytes_disk": Reach(900, 1000, "zeros make no file smaller")}
    with pytest.raises(StudyError, match=r"at least 900 \(zeros make no file smaller\)"):
        check_constraints([parse_constraint("bytes_disk <= 0.5x")], reach, DENSE)
    with pytest.raises(StudyError, match="at most 1,000"):
        check_constraints([parse_constraint("bytes_disk >= 2KB")], reach, DENSE)
    check_constraints([parse_constraint("bytes_disk <= 900")], reach, DENSE)
