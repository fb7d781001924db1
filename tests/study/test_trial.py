"""Real trials on a tiny model: bit for bit what the printed command makes, shared work included, and early stopping."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import shlex
from pathlib import Path

import pytest
import torch

import secateur
from secateur.cli.app import main
from secateur.corpus.windows import windows
from secateur.measure.model import load_model
from secateur.measure.perplexity import perplexity
from secateur.recipe import Recipe
from secateur.study import run_study
from secateur.study.quality import Windows, save_windows
from secateur.study.stopping import Bar
from secateur.study.trial import Task, run_trial
from tests.models import tiny_tokenizer
from tests.study.studies import link_to, write_study

MAGNITUDE = Recipe(method="magnitude", sparsity=0.75)
RECOVERY = {"mode": "full", "loss": "lm", "tokens": 256, "sequence_length": 32}


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def study(root, tmp_path_factory):
    """One real study: a model pruned once, tried as it is and recovered."""
    folder = link_to(tmp_path_factory.mktemp("real"), root)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECATEUR_CACHE", str(root / "cache"))
        path = write_study(
            folder,
            space={"method": "wanda", "sparsity": 0.5, "recovery": ["none", RECOVERY]},
            constraints=["perplexity <= 5x"], stop={"evaluate": 2, "factor": 10}, keep="all",
        )  # fmt: skip
        yield folder, run_study(path)


def test_trials_end_as_they_should(study):
    _, result = study
    assert [trial.state for trial in result.trials] == ["complete", "complete"], result.trials
    assert [trial.values["sparsity"] for trial in result.trials] == [0.5, 0.5]
    assert result.spent["shared_models"] == 1
    assert result.spent["saved_seconds"] > 0
    assert result.finished


@pytest.mark.parametrize("number", [0, 1])
def test_the_printed_command_makes_the_same_bits(number, study, tmp_path, monkeypatch, capsys):
    folder, result = study
    trial = result.trials[number]
    monkeypatch.chdir(tmp_path)
    for part in trial.command.split(" && "):
        words = shlex.split(part)
        assert words[0] == "secateur"
        # The proof in a fresh process changes no bit, and takes most of the time of a tiny model.
        assert main([*words[1:], "--no-verify", "--quiet"]) == 0, capsys.readouterr().err
    assert digest(tmp_path / f"trial-000{number}") == digest(Path(trial.out))
    assert digest(folder / "tiny" / "trial-0000") != digest(folder / "tiny" / "trial-0001")


def test_values_are_those_of_evaluate(study):
    folder, result = study
    for trial in [result.baselines[0], *result.trials]:
        place = folder / "model" if trial.name else Path(trial.out)
        found = secateur.evaluate(place, data=folder / "choice.txt", sequence_length=32, max_samples=6)
        assert trial.values["perplexity"] == pytest.approx(found.perplexity, rel=1e-6)
        assert trial.values["bytes_disk"] == (place / "model.safetensors").stat().st_size
    for trial in result.finalists:
        found = secateur.evaluate(trial.out, data=folder / "test.txt", sequence_length=32, max_samples=6)
        assert trial.values["perplexity"] == pytest.approx(found.perplexity, rel=1e-6)


@pytest.fixture
def task(root, place, monkeypatch):
    """A trial whose model is pruned for real, without the proof in a fresh process, which takes most of the time."""
    monkeypatch.setattr("secateur.study.share.prune", functools.partial(secateur.prune, verify=False))
    cut = windows((root / "choice.txt").read_text(), tiny_tokenizer(), 32)[:4]
    return Task(
        number=7, model=str(place / "model"), dense=str(place / "model"), recipe=MAGNITUDE.to_dict(), training=None,
        out=str(place / "out" / "trial"), choice=str(save_windows(place / "out" / ".shared", "choice", cut)),
    )  # fmt: skip


def test_who_is_stopped_says_the_numbers_and_leaves_no_model(task):
    bar = Bar(2, 2.0, [("perplexity <= 3", math.log(3.0))])
    outcome = run_trial(dataclasses.replace(task, bar=dataclasses.asdict(bar)))
    assert outcome.state == "stopped"
    assert f"perplexity {outcome.proxy:,.4g} on the first 2 windows is more than 2 times the 3" in outcome.reason
    assert "perplexity" not in outcome.values
    assert outcome.values["sparsity"] == 0.75
    assert outcome.values["proxy_perplexity"] == outcome.proxy > 6
    assert not Path(task.out).exists()


def test_who_is_not_stopped_is_measured_on_all_windows(task):
    outcome = run_trial(dataclasses.replace(task, bar=dataclasses.asdict(Bar(2, 2.0, [("x", 50.0)]))))
    assert outcome.state == "complete", outcome.reason
    assert outcome.values == {**run_trial(task).values, "seconds": outcome.seconds}
    assert set(outcome.sparsity.values()) == {0.75}


def test_an_error_is_an_outcome_and_ctrl_c_is_not(task, monkeypatch):
    import secateur.study.trial as module

    def broken(*arguments, **others):
        raise raised

    monkeypatch.setattr(module, "measuring", broken)
    raised: BaseException = ValueError("a bug")
    outcome = run_trial(task)
    assert (outcome.state, outcome.reason) == ("failed", "ValueError: a bug")
    assert not Path(task.out).exists()
    raised = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run_trial(task)


def test_first_windows_and_the_rest_are_the_whole(root):
    model = load_model(root / "model")
    cut = windows((root / "choice.txt").read_text(), tiny_tokenizer(), 32)[:7]
    whole = perplexity(model, cut)
    measured = Windows(model, cut, 3)
    assert measured.first() == pytest.approx(perplexity(model, cut[:3]).nll_per_token, rel=1e-9)
    found = measured.all()
    assert found.values["nll_per_token"] == pytest.approx(whole.nll_per_token, rel=1e-6)
    assert math.isclose(Windows(model, cut, 99).all().values["nll_per_token"], whole.nll_per_token, rel_tol=1e-9)
