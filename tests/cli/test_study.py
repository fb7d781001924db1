"""``secateur study``: arguments to the call, results to a table or one JSON object, errors to exit codes."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from secateur.errors import Interrupted, StudyError
from secateur.study_result import StudyResult, Trial
from tests.cli.conftest import Verb
from tests.study import labelled
from tests.study.studies import write_study


def a_result() -> StudyResult:
    settings = {"structure": "none", "method": "wanda", "pattern": "unstructured", "sparsity": 0.5, "recovery": "none"}
    values = {"perplexity": 12.5, "bytes_disk": 2_000_000, "sparsity": 0.5}
    return StudyResult(
        "s", "demo", {"perplexity": "minimize"}, [], {}, True, 3,
        baselines=[Trial(-1, "complete", {}, "demo", {"perplexity": 10.0, "bytes_disk": 2_000_000}, name="dense")],
        trials=[
            Trial(0, "complete", settings, "secateur prune demo -o trial-0000", values, meets=True),
            Trial(1, "failed", {**settings, "sparsity": 0.9}, "", reason="[bold]no luck[/bold]"),
            Trial(2, "running", {**settings, "sparsity": 0.7}, ""),
        ],
        front=[0], recommended=0, recommended_by="the best in perplexity", warnings=["mind this"],
    )  # fmt: skip


@pytest.fixture
def run_verb(monkeypatch):
    verb = Verb()
    verb.answer = a_result()
    monkeypatch.setitem(sys.modules, "secateur.study.run", SimpleNamespace(run_study=verb))
    return verb


@pytest.fixture
def status_verb(monkeypatch):
    verb = Verb()
    verb.answer = a_result()
    monkeypatch.setitem(sys.modules, "secateur.study.status", SimpleNamespace(study_status=verb))
    return verb


def test_run_passes_the_study_and_who_runs_it(run, run_verb, tmp_path):
    done = run("study", "run", str(write_study(tmp_path)), "--workers", "3")
    assert done.status == 0, done.err
    assert run_verb.args[0].name == "tiny"
    assert run_verb.kwargs["workers"] == 3
    assert run_verb.kwargs["ray"] is None
    assert "Recommended: trial 0, the best in perplexity." in done.out
    assert "secateur prune demo -o trial-0000" in done.out
    assert "[bold]no luck[/bold]" in done.out  # hostile text is text
    assert "warning: mind this" in done.err


def test_data_and_a_study_of_several_models_reach_the_call(run, run_verb, tmp_path):
    path = labelled.write_study(tmp_path, model=["demo", "demo-encoder"])
    done = run("study", "run", str(path), "--data", str(tmp_path), "--json", "--quiet")
    assert done.status == 0, done.err
    assert [one["name"] for one in json.loads(done.out)["studies"]] == ["s", "s"]
    assert run_verb.calls == 2
    assert run_verb.args[0].name == "tiny-demo-encoder"
    assert run_verb.args[0].data.source == str(tmp_path)


def test_accuracy_is_told_with_its_interval_and_the_best_of_each_speed(run, status_verb, tmp_path):
    speeds = {"sentences_per_second": 31.5, "sentences_per_second_batch_32": 64.0}
    trial = Trial(
        0, "complete", {"structure": "depth"}, "make it", {"accuracy": 0.9, **speeds}, True,
        intervals={"sentences_per_second": [30.0, 33.0], "accuracy": [0.88, 0.92]},
    )  # fmt: skip
    tested = {"test_accuracy": 0.91}
    status_verb.answer = StudyResult(
        "s", "m", dict.fromkeys(speeds, "maximize"), [], {}, finished=True, trials=[trial], finalists=[trial],
        baselines=[Trial(-1, "complete", {}, "", tested, name="dense", intervals={"test_accuracy": [0.89, 0.93]})],
        front=[0], best=dict.fromkeys(speeds, 0), recommended=0, recommended_by="the best",
    )  # fmt: skip
    done = run("study", "status", str(tmp_path / "s.db"))
    assert "Best in sentences_per_second: trial 0, 31.50 [30.00, 33.00]." in done.out
    assert "90.0 % [88.0 %, 92.0 %]" in done.out
    assert "91.0 % [89.0 %, 93.0 %]" in done.out


def test_json_is_one_object(run, run_verb, tmp_path):
    done = run("study", "run", str(write_study(tmp_path)), "--json", "--quiet")
    assert StudyResult(**json.loads(done.out)).name == "s"


def test_status_shows_what_there_is(run, status_verb, tmp_path):
    done = run("study", "status", str(tmp_path / "s.db"))
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert any("dense" in line and "10.00" in line and "baseline" in line for line in lines)
    assert any("wanda 0.5" in line and "12.50" in line and "on the front" in line for line in lines)
    assert any("wanda 0.7" in line and "running" in line for line in lines)
    assert "3 of 3 trials: 1 complete, 1 failed, 1 running; finished" in done.out


@pytest.mark.parametrize(
    ("error", "status"), [(StudyError("no", hint="do"), 2), (Interrupted("stopped", hint="same command"), 130)]
)
def test_errors_have_their_status(error, status, run, run_verb, tmp_path):
    def raise_it(reporter):
        raise error

    run_verb.during = raise_it
    done = run("study", "run", str(write_study(tmp_path)))
    assert done.status == status
    assert done.out == ""
    assert f"error: {error.message}" in done.err


def test_a_bad_study_is_refused_before_anything_runs(run, run_verb, tmp_path):
    done = run("study", "run", str(write_study(tmp_path, objectives={"perplexty": "minimize"})))
    assert done.status == 2
    assert "did you mean 'perplexity'" in done.err
    assert run_verb.calls == 0


def test_without_optuna_the_extra_is_named(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    done = run("study", "status", str(tmp_path / "s.db"))
    assert done.status == 2
    assert "pip install 'secateur[study]'" in done.err
