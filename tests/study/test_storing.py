"""Models of a study in the sparse format: what is measured is what is on the disk, and the command makes it again."""

from __future__ import annotations

import functools
import shlex
from pathlib import Path

import pytest
import torch

import secateur
from secateur.cli.app import main
from secateur.errors import MissingExtraError
from secateur.formats.torchao import is_installed
from secateur.study.run import run_study
from tests.study.labelled import write_model_and_splits
from tests.study.labelled import write_study as labelled_study
from tests.study.studies import link_to, write_model_and_texts, write_study

RECOVERY = {"mode": "full", "tokens": 128, "sequence_length": 32}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """One real study of zeros and of fewer neurons, in ordinary folders and in few bits."""
    root = write_model_and_texts(tmp_path_factory.mktemp("texts"))
    folder = link_to(tmp_path_factory.mktemp("storing"), root)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECATEUR_CACHE", str(root / "cache"))
        patch.setattr("secateur.study.share.prune", functools.partial(secateur.prune, verify=False))
        patch.setattr("secateur.study.trial.recover", functools.partial(secateur.recover, verify=False))
        patch.setattr("secateur.study.trial.export", functools.partial(secateur.export, verify=False))
        path = write_study(
            folder,
            space=[
                {"method": "wanda", "sparsity": 0.5, "recovery": ["none", RECOVERY],
                 "format": ["hf", "sparse-16", "sparse-8"]},
                {"structure": "ffn", "sparsity": 0.3, "format": ["hf", "sparse-8"]},
                {"method": "magnitude", "sparsity": 0.02, "format": "sparse-8"},  # too few zeros to leave out
            ],
            fixed={"round-to": 8}, objectives={"perplexity": "minimize", "bytes_disk": "minimize"},
            stop={"evaluate": 2, "factor": 50}, keep="all", finalists=2,
        )  # fmt: skip
        yield folder, run_study(path)


def weights(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.safetensors"))}


def test_all_come_to_their_end_and_leave_one_folder_each(real):
    folder, result = real
    assert [trial.state for trial in result.trials] == ["complete"] * 9, [trial.reason for trial in result.trials]
    formats = [trial.settings["format"] for trial in result.trials]
    assert formats == ["hf", "sparse-16", "sparse-8"] * 2 + ["hf", "sparse-8", "sparse-8"]
    assert [path.name for path in sorted((folder / "tiny").glob("trial-*"))] == [f"trial-{n:04d}" for n in range(9)]
    assert result.spent["shared_models"] == 6  # pruned once for six trials, and once for two


def test_bytes_and_perplexity_are_those_of_the_packed_file(real):
    folder, result = real
    for trial in result.trials:
        assert trial.values["bytes_disk"] == sum(map(len, weights(trial.out).values()))
        found = secateur.evaluate(trial.out, data=folder / "choice.txt", sequence_length=32, max_samples=6)
        assert trial.values["perplexity"] == pytest.approx(found.perplexity, rel=1e-5)
    plain, half, eight, *_, narrow, rounded, _ = (trial.values for trial in result.trials)
    assert eight["bytes_disk"] < half["bytes_disk"] < plain["bytes_disk"]
    assert rounded["bytes_disk"] < narrow["bytes_disk"] < plain["bytes_disk"]
    for name in ("parameters", "nonzero", "sparsity", "flops_per_token"):  # what is in the model, not how it is stored
        assert eight[name] == half[name] == plain[name]


@pytest.mark.parametrize("number", [2, 5, 7])
def test_the_printed_command_makes_the_same_bytes(number, real, tmp_path, monkeypatch, capsys):
    _, result = real
    trial = result.trials[number]
    monkeypatch.chdir(tmp_path)
    assert trial.command.endswith("--format sparse --bits 8 --force")
    for part in trial.command.split(" && "):
        words = shlex.split(part)
        assert main([*words[1:], "--no-verify", "--quiet"]) == 0, capsys.readouterr().err
    assert weights(str(tmp_path / f"trial-000{number}")) == weights(trial.out)


def test_a_report_runs_finalists_as_they_are_stored(real):
    folder, result = real
    found = secateur.report([folder / "tiny.json"], text=folder / "choice.txt", sequence_length=32, samples=2)
    stored = [trial for trial in result.finalists if trial.settings["format"] == "sparse-8"]
    assert stored, [trial.settings for trial in result.finalists]
    examined = {each.model: each for each in found.examined}
    for trial in stored:
        name = next(one for one in examined if one.startswith(f"{trial.number}:"))
        assert not examined[name].skipped
        assert examined[name].continued


def test_a_classifier_in_few_bits_is_read_as_it_is_stored(tmp_path, monkeypatch):
    """An encoder that keeps fewer neurons, in 8 bits: there are no zeros to leave out."""
    folder = write_model_and_splits(tmp_path)
    monkeypatch.setenv("SECATEUR_CACHE", str(folder / "cache"))
    for module in ("share", "baselines"):
        monkeypatch.setattr(f"secateur.study.{module}.prune", functools.partial(secateur.prune, verify=False))
    for module in ("trial", "base"):
        monkeypatch.setattr(f"secateur.study.{module}.recover", functools.partial(secateur.recover, verify=False))
    monkeypatch.setattr("secateur.study.trial.export", functools.partial(secateur.export, verify=False))
    path = labelled_study(
        folder, space={"structure": "ffn", "sparsity": 0.3, "format": ["hf", "sparse-8"]}, fixed={"round-to": 8},
        objectives={"accuracy": "maximize", "bytes_disk": "minimize"}, keep="all", finalists=2, speed="asked",
    )  # fmt: skip
    plain, rounded = run_study(path).trials
    assert (plain.state, rounded.state) == ("complete", "complete"), (plain.reason, rounded.reason)
    assert rounded.values["bytes_disk"] == sum(map(len, weights(rounded.out).values())) < plain.values["bytes_disk"]
    found = secateur.evaluate(rounded.out, files=[folder / "tiny-dev.jsonl"])
    assert rounded.values["accuracy"] == pytest.approx(next(iter(found.accuracy.values())))


@pytest.mark.torchao
@pytest.mark.skipif(not is_installed(), reason="torchao is not installed; make test runs this apart")
def test_a_classifier_in_eight_bits_of_torchao_is_a_trial_and_a_baseline(tmp_path, monkeypatch):
    folder = write_model_and_splits(tmp_path)
    monkeypatch.setenv("SECATEUR_CACHE", str(folder / "cache"))
    for module in ("share", "trial", "baselines"):
        name = "prune" if module == "share" else "export"
        quick = functools.partial(getattr(secateur, name), verify=False)
        monkeypatch.setattr(f"secateur.study.{module}.{name}", quick)
    result = run_study(
        labelled_study(
            folder, space={"structure": "ffn", "sparsity": 0.3, "format": ["hf", "torchao-8"]}, keep="all",
            baselines=["torchao-8"], fixed={"round-to": 8}, speed="asked",
        )
    )  # fmt: skip
    dense, whole = result.baselines
    plain, rounded = result.trials
    assert [trial.state for trial in result.trials] == ["complete"] * 2, [trial.reason for trial in result.trials]
    assert whole.values["bytes_disk"] < dense.values["bytes_disk"]
    assert rounded.values["bytes_disk"] < min(plain.values["bytes_disk"], whole.values["bytes_disk"])
    for name in ("parameters", "nonzero", "sparsity", "flops_per_token"):
        assert whole.values[name] == dense.values[name]
        assert rounded.values[name] == plain.values[name]
    assert whole.values["accuracy"] >= dense.values["accuracy"] - 0.1
    assert whole.command.endswith("-o baseline-torchao-8 --format torchao")
    assert rounded.command.endswith("-o trial-0001 --format torchao")
    assert rounded.values["bytes_disk"] == sum(map(len, weights(rounded.out).values()))


def test_a_study_that_needs_torchao_is_refused_without_it(tmp_path, monkeypatch):
    folder = write_model_and_splits(tmp_path)
    monkeypatch.setattr("secateur.formats.torchao.is_installed", lambda: False)
    for asked in (
        {"baselines": ["torchao-8"]},
        {"space": {"method": "magnitude", "sparsity": 0.3, "format": "torchao-8"}},
    ):
        with pytest.raises(MissingExtraError, match="torchao-8 needs torchao"):
            run_study(labelled_study(folder, **asked))
    assert not (folder / "tiny.db").exists()
