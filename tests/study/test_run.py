"""Running a study with trials that answer at once: the loop, the storage, and what a kill or Ctrl-C leaves."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sqlite3
from pathlib import Path

import optuna
import pytest

from secateur.corpus.load import DEFAULT_PROMPT
from secateur.errors import Interrupted, StudyError
from secateur.measure.energy import find_meter
from secateur.study import run_study, study_status
from secateur.study.speed import NEW_TOKENS
from secateur.study.trial import Outcome
from secateur.study_result import StudyResult
from secateur.verbs.calibration import load_tokenizer
from secateur.verbs.report import report
from tests.formats.tokenizers import ROWS, byte_level
from tests.models import save_tiny
from tests.study.studies import StandIn, write_study


def run(place: Path, **changes) -> StudyResult:
    return run_study(write_study(place, **changes))


def test_a_grid_is_tried_once_each_and_the_finalists_are_measured_on_the_test_text(place, trials):
    result = run(place, finalists=2)
    assert [trial.settings["sparsity"] for trial in result.trials] == [0.2, 0.4, 0.6]
    assert {trial.state for trial in result.trials} == {"complete"}
    assert (result.finished, result.planned, result.front) == (True, 3, [0, 1, 2])
    assert result.recommended in result.front
    assert "chord" in result.recommended_by
    (dense,) = result.baselines
    assert (dense.number, dense.name) == (-1, "dense")
    assert len(result.finalists) == 2
    # The stand-in's models are the dense one, so on the test text they are exactly as good, unlike on choice.
    assert {trial.values["perplexity"] for trial in result.finalists} == {dense.values["test_perplexity"]}
    assert all(trial.values["sparsity"] == result.trials[trial.number].values["sparsity"] for trial in result.finalists)
    kept = sorted(path.name for path in (place / "tiny").iterdir())
    assert kept == sorted(f"trial-{trial.number:04d}" for trial in result.finalists)
    assert [trial.out != "" for trial in result.trials] == [trial.number in {f.number for f in result.finalists}
                                                            for trial in result.trials]  # fmt: skip
    assert json.loads((place / "tiny.json").read_text()) == result.to_dict()
    assert study_status(place / "tiny.db").to_dict() == study_status(place / "tiny.yaml").to_dict() == result.to_dict()


def test_the_dense_model_in_other_formats_stands_beside_the_trials(place, trials):
    folder = save_tiny(place / "wide", "llama", vocab_size=ROWS, hidden_size=64, intermediate_size=96, head_dim=16)
    byte_level().save_pretrained(folder)
    result = run(place, model="wide", baselines=["bfloat16", "q8_0", "q4_0"], finalists=1)
    dense, half, eight, four = result.baselines
    assert [one.name for one in result.baselines] == ["dense", "bfloat16", "q8_0", "q4_0"]
    assert [one.number for one in result.baselines] == [-1, -2, -3, -4]
    sizes = [one.values["bytes_disk"] for one in result.baselines]
    assert sizes[0] > sizes[1]
    assert sizes[2] > sizes[3]
    for one in (half, eight, four):
        assert one.values["nll_per_token"] == pytest.approx(dense.values["nll_per_token"], abs=0.05)
        assert one.values["flops_per_token"] == dense.values["flops_per_token"]
    assert eight.command == f"secateur export {folder} -o baseline-q8_0.gguf --quantize q8_0"


def test_baselines_and_finalists_are_timed_though_nothing_asks_for_speed(place, trials):
    result = run(place, finalists=1, speed="finalists")
    (finalist,) = result.finalists
    (dense,) = result.baselines
    name = "decode_tokens_per_second"
    assert dense.values[name] > 0
    assert finalist.values[name] == pytest.approx(dense.values[name] * finalist.values["decode_ratio"])
    low, high = finalist.intervals[name]
    assert 0 < low <= high
    assert not any(name in trial.values for trial in result.trials)
    found = report([place / "tiny.json"])
    same = [model for model in found.models if model.name.startswith(f"{finalist.number}:")]
    assert len(same) == 2
    for model in same:
        assert model.values["decode_speedup"] == pytest.approx(finalist.values["decode_ratio"])
    for trial in (dense, finalist):
        assert 0 < trial.values["bytes_resident"] < 1e9
        if find_meter()[0] is None:
            assert trial.values["joules_per_token"] is None
            assert trial.missing["joules_per_token"] == find_meter()[1]


def test_energy_is_weighed_where_there_is_a_meter(place, monkeypatch):
    """A meter that counts one joule each time it is read, so that a token's energy is known."""
    for module in ("speed", "setup"):
        monkeypatch.setattr(f"secateur.study.{module}.find_meter", lambda device: (Meter(), ""))
    changes = {"space": {"method": "magnitude", "sparsity": [0.2, 0.4]}, "baselines": ["bfloat16"], "finalists": 1}
    result = run(place, objectives={"perplexity": "minimize", "joules_per_token": "minimize"}, **changes)
    tokens = len(load_tokenizer(place / "model")(DEFAULT_PROMPT, add_special_tokens=False)["input_ids"]) + NEW_TOKENS
    for trial in [*result.baselines, *result.trials, *result.finalists]:
        assert trial.values["joules_per_token"] == pytest.approx(1 / tokens)
    found = report([place / "tiny.json"])
    assert any(front.axis == "joules_per_token" for comparison in found.comparisons for front in comparison.fronts)


class Meter:
    sees_processor = True
    source = "a test"

    def start(self):
        self.started = True

    def joules(self):
        assert self.started
        return 1.0


def test_a_format_that_cannot_hold_the_model_is_left_out_and_told(place, trials):
    result = run(place, baselines=["q4_0"], finalists=1)  # its tokenizer is none that llama.cpp knows
    assert [one.name for one in result.baselines] == ["dense"]
    assert any("baseline q4_0 is left out" in warning for warning in result.warnings)


def test_optuna_opens_the_same_file(place, trials):
    run(place)
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{place / 'tiny.db'}")
    assert study.metric_names == ["perplexity", "nonzero"]
    assert [trial.params for trial in study.trials] == [{"sparsity": 0.2}, {"sparsity": 0.4}, {"sparsity": 0.6}]
    assert study.trials[1].values == pytest.approx([100 * 1.4**2, 0.6e6])
    assert len(study.best_trials) == 3


def test_all_models_stay_when_that_is_asked(place, trials):
    run(place, finalists=1, keep="all")
    assert sorted(path.name for path in (place / "tiny").iterdir()) == [f"trial-000{n}" for n in range(3)]


def test_a_finished_study_does_nothing_more_and_takes_no_larger_budget(place, trials):
    first = run(place, budget={"trials": 2})
    assert len(first.trials) == 2
    assert "grid has 3 settings" in " ".join(first.warnings)
    again = run(place, budget={"trials": 2})
    assert len(trials.tasks) == 2
    assert [trial.to_dict() for trial in again.finalists] == [trial.to_dict() for trial in first.finalists]
    with pytest.raises(StudyError, match="test text was used once"):
        run(place, budget={"trials": 3})


def test_constraints_decide_who_is_on_the_front(place, trials):
    result = run(place, constraints=["sparsity >= 0.3", "nonzero <= 700000"])
    assert [trial.meets for trial in result.trials] == [False, True, True]
    assert result.front == [1, 2]
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{place / 'tiny.db'}")
    assert study.trials[0].constraints["nonzero <= 700000"] == pytest.approx(1 / 7)


def test_nobody_is_recommended_when_nobody_meets_the_constraints(place, trials):
    result = run(place, constraints=["perplexity <= 0.0001x"])
    assert (result.front, result.recommended, result.finalists) == ([], None, [])
    assert any("no complete trial meets" in warning for warning in result.warnings)
    assert result.finished
    assert not any(name.startswith("test_") for name in result.baselines[0].values)  # for nobody it is not looked at


def test_a_failing_trial_is_recorded_and_the_others_go_on(place, trials, monkeypatch):
    def answer(task):
        if task.recipe["sparsity"] == 0.4:
            return Outcome("failed", reason="out of luck", seconds=1.0)
        return StandIn.answer(trials, task)

    monkeypatch.setattr(trials, "answer", answer)
    result = run(place)
    assert [trial.state for trial in result.trials] == ["complete", "failed", "complete"]
    assert result.trials[1].reason == "out of luck"
    assert result.front == [0, 2]
    assert any("1 of 3 trials failed" in warning for warning in result.warnings)


def test_ctrl_c_stops_and_the_same_call_goes_on(place, trials, monkeypatch):
    def answer(task):
        if len(trials.tasks) == 2:
            raise KeyboardInterrupt
        return StandIn.answer(trials, task)

    monkeypatch.setattr(trials, "answer", answer)
    with pytest.raises(Interrupted, match="1 so far") as raised:
        run(place)
    assert raised.value.exit_code == 130
    looked = study_status(place / "tiny.db")
    assert [trial.state for trial in looked.trials] == ["complete", "running"]
    assert any("nobody runs this study" in warning for warning in looked.warnings)
    result = run(place)
    assert [task.number for task in trials.tasks] == [0, 1, 1, 2]
    assert [trial.number for trial in result.trials] == [0, 1, 2]
    assert result.trials[1].tries == 1  # stopping is no failure


def _run_and_die(place: Path, number: int) -> None:
    """In a process of its own: kill -9 in the middle of one trial."""

    class Deadly(StandIn):
        def answer(self, task):
            if task.number == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().answer(task)

    import secateur.study.workers

    secateur.study.workers.run_trial = Deadly()
    run(place)


def killed(place: Path, number: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=_run_and_die, args=(place, number))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_study_goes_on_and_counts_each_trial_once(place, trials):
    killed(place, 1)
    result = run(place)
    assert [task.number for task in trials.tasks] == [1, 2]
    assert [(trial.number, trial.state, trial.tries) for trial in result.trials] == [
        (0, "complete", 1), (1, "complete", 2), (2, "complete", 1),
    ]  # fmt: skip
    assert [trial.settings["sparsity"] for trial in result.trials] == [0.2, 0.4, 0.6]


def test_a_trial_that_kills_its_process_three_times_is_given_up(place, trials):
    for _ in range(3):
        killed(place, 0)
    result = run(place)
    assert [trial.state for trial in result.trials] == ["failed", "complete", "complete"]
    assert "begun 3 times" in result.trials[0].reason
    assert [task.number for task in trials.tasks] == [1, 2]


def test_the_test_text_is_never_measured_twice(place, trials, monkeypatch):
    import secateur.study.finals as finals

    real, measured = finals.quality, []

    def quality(folder, windows, **others):
        if len(measured) == 1:
            measured.append("interrupted")
            raise KeyboardInterrupt
        measured.append(folder.name)
        return real(folder, windows, **others)

    monkeypatch.setattr(finals, "quality", quality)
    with pytest.raises(Interrupted):
        run(place)
    result = run(place)
    run(place)
    names = [name for name in measured if name != "interrupted"]
    assert len(names) == len(set(names)) == 3 == len(result.finalists)
    assert len(trials.tasks) == 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"space": {"method": "wanda", "sparsity": [0.2, 0.3]}}, "space"),
        ({"objectives": {"perplexity": "minimize"}}, "objectives"),
        ({"data": {"samples": 7, "sequence-length": 32, "windows": 6}}, "data"),
        ({"name": "other", "storage": "tiny.db"}, "belongs to study 'tiny', not 'other'"),
    ],
)
def test_the_storage_of_another_study_is_refused_and_stays_as_it_is(changes, named, place, trials):
    run(place, budget={"trials": 1})
    before = study_status(place / "tiny.db").to_dict()
    with pytest.raises(StudyError, match="belongs to") as raised:
        run(place, **changes)
    assert named in raised.value.message
    assert study_status(place / "tiny.db").to_dict() == before


def test_another_text_or_model_under_the_same_name_is_noticed(place, trials):
    run(place, budget={"trials": 1})
    old = (place / "choice.txt").read_text()
    (place / "choice.txt").unlink()
    (place / "choice.txt").write_text(old + "one more line\n")
    with pytest.raises(StudyError, match="texts_sha256"):
        run(place, budget={"trials": 1})


def test_files_that_are_no_storage_are_refused(place, trials):
    (place / "tiny.db").write_text("not a database, though it is long enough to be one" * 20)
    with pytest.raises(StudyError, match=r"tiny\.db is no storage"):
        run(place)
    with pytest.raises(StudyError, match="no storage"):
        study_status(place / "missing.db")
    sqlite3.connect(place / "empty.db").execute("create table t (x)").connection.close()
    with pytest.raises(StudyError):
        study_status(place / "empty.db")


def test_two_processes_do_not_run_one_study(place, trials, monkeypatch):
    def answer(task):
        with pytest.raises(StudyError, match="another process runs"):
            run(place)
        return StandIn.answer(trials, task)

    monkeypatch.setattr(trials, "answer", answer)
    assert run(place, budget={"trials": 1}).finished


def test_a_budget_too_small_for_the_baselines_says_how_much_is_needed(place, trials):
    with pytest.raises(StudyError, match=r"too small: the baselines took .* at least .* are needed") as raised:
        run(place, budget={"minutes": 1e-6})
    assert raised.value.exit_code == 2
    assert trials.tasks == []
    assert run(place, budget={"minutes": 60}).finished  # what was measured is kept


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_samplers_try_each_setting_once_and_end(sampler, place, trials):
    space = {"method": ["wanda", "magnitude"], "sparsity": {"low": 0.1, "high": 0.4, "step": 0.1}}
    result = run(place, sampler=sampler, space=space, budget={"trials": 30}, seed=5)
    settings = [tuple(sorted(trial.settings.items())) for trial in result.trials]
    assert len(set(settings)) == len(settings)
    assert 5 <= len(settings) <= 8
    assert {trial.settings["sparsity"] for trial in result.trials} <= {0.1, 0.2, 0.3, 0.4}
    if len(result.trials) >= 8:
        assert set(result.importances) == {"perplexity", "nonzero"}
        assert sum(result.importances["perplexity"].values()) == pytest.approx(1)
