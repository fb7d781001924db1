"""A whole study of classifiers on a tiny encoder: fine-tuned once, pruned, recovered, measured in turn, finalists."""

from __future__ import annotations

import functools
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import secateur
from secateur.cli.app import main
from secateur.errors import Interrupted, StudyError
from secateur.measure.energy import find_meter
from secateur.measure.sentences import Reading
from secateur.study import run_study, study_status
from secateur.study.trial import Outcome
from tests.study.labelled import write_model_and_splits, write_study

RECOVERY = {"loss": "kd", "epochs": 1, "learning_rate": 1e-3, "held_out": 0.0}


def clock(folders, texts, *, batches, **others):
    """The smaller the file, the faster; larger batches are faster."""
    assert len(texts) == 24
    sizes = [(folder / "model.safetensors").stat().st_size for folder in folders]
    return [
        {batch: Reading([(1 + batch) * 1e9 / size * (1 + step / 100) for step in range(6)]) for batch in batches}
        for size in sizes
    ]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = write_model_and_splits(tmp_path_factory.mktemp("labels"))
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECATEUR_CACHE", str(folder / "cache"))
        # Proofs and clocks in fresh processes have tests of their own, and take most of the time of a tiny model.
        for module in ("share", "baselines"):
            patch.setattr(f"secateur.study.{module}.prune", functools.partial(secateur.prune, verify=False))
        for module in ("trial", "base"):
            patch.setattr(f"secateur.study.{module}.recover", functools.partial(secateur.recover, verify=False))
        patch.setattr("secateur.study.speed.measure_sentences", clock)
        path = write_study(
            folder,
            space=[
                {"method": "magnitude", "sparsity": 0.3},
                {"structure": "ffn", "sparsity": 0.2, "recovery": RECOVERY},
            ],
            objectives={"sentences_per_second": "maximize", "sentences_per_second_batch_32": "maximize"},
            constraints=["accuracy >= dense - 0.9"], stop={"evaluate": 8, "factor": 50}, keep="all",
            baselines=["bfloat16"], fixed={"round-to": 8},
        )  # fmt: skip
        yield folder, run_study(path)


def test_it_comes_to_its_end(study):
    folder, result = study
    assert [trial.state for trial in result.trials] == ["complete", "complete"], result.trials
    assert [one.name for one in result.baselines] == ["dense", "bfloat16"]
    assert result.finished
    assert not result.trials[1].warnings  # the dense classifier was trained, not pruned: it is a teacher like another
    assert study_status(folder / "tiny.db").to_dict() == result.to_dict()


def test_accuracy_is_that_of_evaluate_with_its_interval(study):
    folder, result = study
    base = next((folder / "tiny").glob("base-*"))
    for trial in [result.baselines[0], *result.trials]:
        found = secateur.evaluate(base if trial.name else trial.out, data=None, files=[folder / "tiny-dev.jsonl"])
        assert trial.values["accuracy"] == found.accuracy["tiny-dev.jsonl"]
        assert trial.intervals["accuracy"] == found.accuracy_interval["tiny-dev.jsonl"]
    for trial in result.finalists:
        found = secateur.evaluate(trial.out, data=None, files=[folder / "tiny-test.jsonl"])
        assert trial.values["accuracy"] == found.accuracy["tiny-test.jsonl"]
        lost = trial.values["accuracy"] - result.baselines[0].values["test_accuracy"]
        assert trial.values["accuracy_difference"] == pytest.approx(lost, abs=1e-12)


def test_speed_is_a_multiple_of_the_dense_with_an_interval(study):
    _, result = study
    sizes = {trial.number: trial.values["bytes_disk"] for trial in [*result.baselines, *result.trials]}
    names = ("sentences_per_second", "sentences_per_second_batch_32")
    for trial in [result.baselines[1], *result.trials]:
        for name in names:
            ratio = sizes[-1] / sizes[trial.number]
            assert trial.values[name] == pytest.approx(ratio * result.baselines[0].values[name])
            assert trial.intervals[name] == pytest.approx([trial.values[name]] * 2)
    assert result.best == dict.fromkeys(names, 1)  # the only one from which whole units went


def test_energy_without_a_meter_is_null_with_the_reason(study):
    _, result = study
    meter, why = find_meter()
    name = "joules_per_thousand_sentences"
    for trial in [result.baselines[0], *result.trials]:
        if meter is None:
            assert trial.values[name] is None
            assert trial.missing[name] == why != ""


def test_the_printed_command_makes_the_same_classifier(study, tmp_path, monkeypatch, capsys):
    _, result = study
    monkeypatch.chdir(tmp_path)
    trial = result.trials[1]
    for part in trial.command.split(" && "):
        assert main([*shlex.split(part)[1:], "--no-verify", "--quiet"]) == 0, capsys.readouterr().err
    made = (tmp_path / Path(trial.out).name / "model.safetensors").read_bytes()
    assert made == (Path(trial.out) / "model.safetensors").read_bytes()
    assert result.baselines[0].command.startswith("secateur recover")


def test_a_stopped_study_goes_on_with_the_classifier_that_was_made_once(study, tmp_path, monkeypatch):
    folder, _ = study
    for path in [folder / "model", *folder.glob("*.jsonl")]:
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.setenv("SECATEUR_CACHE", str(folder / "cache"))
    monkeypatch.setattr("secateur.study.base.recover", None)  # the other study has made it
    tried: list[str] = []

    def trial(task, reporter=None):
        tried.append(task.model)
        if len(tried) == 2:
            raise KeyboardInterrupt
        shutil.copytree(task.dense, task.out)
        return Outcome("complete", {"accuracy": 0.5 + len(tried) / 10, "nonzero": 10.0}, seconds=1.0, proxy=0.4)

    monkeypatch.setattr("secateur.study.workers.run_trial", trial)
    path = write_study(tmp_path, name="other")
    with pytest.raises(Interrupted):
        run_study(path)
    result = run_study(path)
    assert len(tried) == 3
    assert len(set(tried)) == 1
    assert Path(tried[0]).parent == tmp_path / "other"
    assert [one.values["accuracy"] for one in result.trials] == pytest.approx([0.6, 0.8])
    assert result.recommended == 1
    # The stand-in's models are the dense one, so on the test texts they are exactly as good.
    assert {one.values["accuracy"] for one in result.finalists} == {result.baselines[0].values["test_accuracy"]}
    assert {one.values["accuracy_difference"] for one in result.finalists} == {0.0}
    with pytest.raises(StudyError, match="fine_tune"):
        run_study(write_study(tmp_path, name="other", **{"fine-tune": {"epochs": 7}}))


def test_the_report_ranks_accuracy_upwards_and_names_the_fastest(study, tmp_path, capsys):
    folder, result = study
    assert main(["report", str(folder / "tiny.json"), "--format", "json"]) == 0
    page = json.loads(capsys.readouterr().out)
    choice = next(one for one in page["comparisons"] if "test: " not in one["protocol"])
    assert (choice["quality"], choice["better"]) == ("accuracy", "maximize")
    assert {front["axis"] for front in choice["fronts"]} >= {"sentences_speedup", "sentences_speedup_batch_32"}
    tested = next(one for one in page["comparisons"] if "test: " in one["protocol"])
    dense = next(page["models"][number] for number in tested["models"] if page["models"][number]["kind"] == "dense")
    assert dense["values"]["accuracy"] == result.baselines[0].values["test_accuracy"]
    (fastest,) = [line for line in page["answer"] if "astest" in line]
    assert f"{result.best['sentences_per_second']}:" in fastest
    assert "batch 32" in fastest
    assert "bfloat16 without pruning" in fastest  # the faster one here, and it must not be kept silent
