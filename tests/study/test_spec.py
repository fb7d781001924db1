"""A study file: what is refused before anything is opened, and where its paths lead."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.errors import StudyError, UnknownNameError
from secateur.study.read import BUILTIN, load_study, read_study
from tests.study.studies import plain, write_study


def test_paths_start_at_the_file_and_names_stay_names(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "choice.txt").write_text("x")
    spec = load_study(write_study(tmp_path, data={"choice": "choice.txt", "test": "wikitext:wikitext-2-raw-v1"}))
    assert spec.model == str(tmp_path / "model")
    assert spec.data.choice == str(tmp_path / "choice.txt")
    assert spec.data.test == "wikitext:wikitext-2-raw-v1"
    assert (spec.storage, spec.out) == (tmp_path / "tiny.db", tmp_path / "tiny")


def test_the_study_that_comes_with_the_library_is_read_and_small_enough_for_its_time():
    assert set(BUILTIN) == {"paper", "classifier"}
    spec = load_study("paper")
    assert (spec.name, spec.model, spec.minutes) == ("paper", "demo", 90)
    grid = list(spec.grid())
    assert {one["method"] for one in grid if one.get("structure") == "none"} == {
        "random",
        "magnitude",
        "wanda",
        "sparsegpt",
        "alps",
    }
    assert {one["sparsity"] for one in grid if "sparsity" in one} >= {0.1, 0.8}
    assert {one["pattern"] for one in grid if "pattern" in one} == {"unstructured", "2:4", "4:8"}
    assert {"depth", "ffn"} <= {one.get("structure") for one in grid}
    recovered = [one for one in grid if one["recovery"] != "none"]
    # On two cores recovery learns some 110 tokens a second, and pruning and measuring take a minute.
    seconds = 60 * len(grid) + sum(spec.training(one).tokens / 110 for one in recovered)
    assert recovered
    assert seconds < 90 * 60
    for one in recovered:  # each right behind another of the same pruned model, so that it is pruned once
        before = grid[grid.index(one) - 1]
        assert {**before, "recovery": "", "format": ""} == {**one, "recovery": "", "format": ""}


BAD = {
    "unknown key": ({"objective": {}}, UnknownNameError, "did you mean 'objectives'"),
    "unknown sampler": ({"sampler": "gridd"}, UnknownNameError, "did you mean 'grid'"),
    "no model": ({"model": None}, StudyError, "model is missing"),
    "no space": ({"space": None}, StudyError, "space is missing"),
    "no objectives": ({"objectives": None}, StudyError, "objectives are missing"),
    "unknown objective": ({"objectives": {"perplexty": "minimize"}}, UnknownNameError, "did you mean 'perplexity'"),
    "name that is a path": ({"name": "a/b"}, StudyError, "file name"),
    "no trials": ({"budget": {"trials": 0}}, StudyError, "at least 1"),
    "no time": ({"budget": {"minutes": -1}}, StudyError, "more than 0"),
    "unknown budget": ({"budget": {"hours": 1}}, UnknownNameError, "minutes"),
    "sampler without an end": ({"sampler": "tpe"}, StudyError, "never ends"),
    "unknown data": ({"data": {"tests": "x"}}, UnknownNameError, "did you mean 'test'"),
    "windows of one token": ({"data": {"sequence-length": 1}}, StudyError, "at least 2"),
    "stop without quality": ({"objectives": {"nonzero": "minimize"}, "stop": {}}, StudyError, "perplexity"),
    "stop that stops the best": ({"stop": {"factor": 0.5}}, StudyError, "at least 1"),
    "stop that looks at more than there is": ({"stop": {"evaluate": 7}}, StudyError, "7 windows"),
    "no finalists": ({"finalists": 0}, StudyError, "at least 1"),
    "unknown baseline": ({"baselines": ["bf16"]}, UnknownNameError, "bfloat16"),
    "memory without unit": ({"resources": {"memory": "lots"}}, StudyError, "4GB"),
    "constraints that are no list": ({"constraints": {"a": 1}}, StudyError, "list"),
    "seed that is a text": ({"seed": "a"}, StudyError, "whole number"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_studies_are_refused(case):
    changes, kind, words = BAD[case]
    with pytest.raises(kind) as raised:
        read_study(plain(**changes), Path(), "s.yaml")
    assert words in raised.value.message + raised.value.hint
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("content", ["", "- a\n", "a: [", "\x00"])
def test_files_that_are_no_study_are_refused(content, tmp_path):
    (tmp_path / "s.yaml").write_text(content)
    with pytest.raises(StudyError, match=r"s\.yaml"):
        load_study(tmp_path / "s.yaml")


def test_a_file_that_is_not_there_and_a_name_that_is_not_known():
    with pytest.raises(StudyError, match="no study file"):
        load_study("missing.yaml")
    with pytest.raises(UnknownNameError) as raised:
        load_study("papper")
    assert raised.value.nearest == "paper"
