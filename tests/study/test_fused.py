"""Models in one as trials: paths from the study file, what is refused before work starts, and known by content."""

from __future__ import annotations

import functools
import hashlib
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import secateur
from secateur.cli.app import main
from secateur.errors import SecateurError, StudyError
from secateur.measure.model import load_model
from secateur.progress import Recorder
from secateur.study import run_study
from secateur.study.conversion import read_conversions, unfit_for
from secateur.study.read import load_study, read_study
from secateur.study.setup import set_up
from secateur.study.share import made_name
from tests.converting.models import tuned
from tests.models import save_tiny
from tests.study.studies import link_to, plain, write_study

BOTH = {"to": "fused", "models": ["one", "two"], "rank": 4, "router-rank": 2}
RECOVERY = {"mode": "full", "loss": "lm", "tokens": 128, "sequence_length": 32}


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Two models that were changed from the model of the tests, one of another shape, and one of another origin."""
    folder = tmp_path_factory.mktemp("members")
    tuned(folder / "one", "llama", 1)
    tuned(folder / "two", "llama", 2)
    save_tiny(folder / "wide", "llama", intermediate_size=64)
    tuned(folder / "stranger", "llama", 5, spread=1.0)
    return folder


@pytest.fixture
def family(place, members):
    """The folder of a study with these beside its model."""
    for path in members.iterdir():
        (place / path.name).symlink_to(path)
    return place


def test_paths_start_at_the_study_file_and_two_ways_to_write_the_same_are_one(family):
    found = read_conversions(BOTH, "x", family)
    (name,) = found
    assert found[name]["models"] == tuple(str((family / one).resolve()) for one in ("one", "two"))
    assert name == "fused models one two, rank 4, router_rank 2"
    again = {"to": "fused", "models": ["./one", str(family / "two")], "router_rank": "2", "rank": 4.0}
    assert read_conversions(again, "x", family) == found
    (family / "link").symlink_to(family / "two")
    for same in (again, {**BOTH, "models": ["one", "link"]}):
        with pytest.raises(StudyError, match="twice"):
            read_conversions([BOTH, same], "x", family)
    other = read_conversions({**BOTH, "models": ["two", "one"]}, "x", family)
    assert other.keys() != found.keys()
    hub = read_conversions({"to": "fused", "models": "someone/tuned"}, "x", family)
    assert hub == {"fused models someone/tuned": {"to": "fused", "models": ("someone/tuned",)}}


@pytest.mark.parametrize(("one", "words"), [
    ({"models": []}, "models of fused is []"),
    ({"models": [1]}, "models of fused is [1]"),
    ({"models": {"a": "b"}}, "models of fused is"),
    ({"models": "one", "format": "delta"}, "writes a difference"),
    ({"base": "one"}, "is the model of the study"),
])  # fmt: skip
def test_what_names_no_models_or_makes_none_is_refused_when_it_is_read(one, words, family):
    with pytest.raises(StudyError) as raised:
        read_study(plain(space={"convert": {"to": "fused", **one}}), family, "s.yaml")
    assert words in raised.value.message
    assert raised.value.hint


def test_a_classifier_that_is_made_first_has_no_descendants(family):
    texts = {"calibration": "a.jsonl", "choice": "b.jsonl", "test": "c.jsonl"}
    with pytest.raises(StudyError, match="nothing descends from the classifier"):
        read_study(
            plain(task="labels", fine_tune={"epochs": 1}, data=texts, objectives={"accuracy": "maximize"},
                  space={"convert": BOTH}), family, "s.yaml",
        )  # fmt: skip


@pytest.mark.parametrize(("one", "words"), [
    ({"models": ["one", "wide"]}, "model.layers.0.mlp.gate_proj.weight is (48, 32) in model and (64, 32) in"),
    ({"models": "stranger"}, "was not fine-tuned from model: model."),
    ({"rank": 17}, "--rank 17 is more than model.layers.0.self_attn.k_proj.weight (16 x 32) has"),
    ({"models": "./nowhere"}, "no such file or folder: ./nowhere"),
    ({"top": 3}, "--top 3 of 2 models"),
])  # fmt: skip
def test_what_cannot_be_fused_is_refused_before_work_starts(one, words, family):
    with pytest.raises(StudyError) as raised:
        set_up(load_study(write_study(family, space={"convert": {**BOTH, **one}})), Recorder())
    assert words in raised.value.message
    assert raised.value.exit_code == 2
    assert not (family / "tiny").exists()


def test_models_are_known_by_what_is_in_them_not_by_their_place(family):
    def of(models):
        found = set_up(load_study(write_study(family, space={"convert": {**BOTH, "models": models}})), Recorder())
        (settings,) = found.spec.grid()
        recipe, reads_text = found.recipe(settings)
        assert not reads_text
        return [*found.identity["models_sha256"].values()], made_name("x", recipe, found.content(settings), 1)

    shutil.copytree(family / "one", family / "copy")
    first = of(["one", "two"])
    assert of(["copy", "two"]) == first
    assert of(["two", "one"])[1] != first[1]
    tuned(family / "copy", "llama", 3)
    changed = of(["copy", "two"])
    assert changed[0] != first[0]
    assert changed[1] != first[1]
    pruned = set_up(load_study(write_study(family)), Recorder())
    assert "models_sha256" not in pruned.identity


@pytest.mark.parametrize("mode", ["full", "lora", "norms-and-biases", "blocks", "adapter-moe"])
def test_what_is_refused_of_recoveries_is_what_recover_refuses(mode, family, made):
    (conversion,) = read_conversions(BOTH, "x", family).values()
    settings = {"mode": mode, "loss": "auto" if mode == "blocks" else "lm", "tokens": 64, "sequence_length": 32}
    if mode == "blocks":
        settings["teacher"] = str(family / "model")

    def recover():
        secateur.recover(made, family / "out", dense=True, verify=False, evaluate=False,
                         data=str(family / "calibration.txt"), **settings)  # fmt: skip

    if unfit_for(mode, conversion, all_matrices=True):
        with pytest.raises(SecateurError):
            recover()
    else:
        recover()


@pytest.fixture(scope="module")
def made(root, members, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "model"
    models = [str(members / name) for name in BOTH["models"]]
    secateur.convert(root / "model", folder, to="fused", models=models, rank=4, verify=False, evaluate=False)
    return folder


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_a_study_makes_them_and_its_commands_make_the_same_bits(root, members, tmp_path, monkeypatch, capsys):
    folder = link_to(tmp_path, root)
    for name in BOTH["models"]:
        (folder / name).symlink_to(members / name)
    torch.set_num_threads(1)
    monkeypatch.setenv("SECATEUR_CACHE", str(root / "cache"))
    monkeypatch.setattr("secateur.study.share.convert", functools.partial(secateur.convert, verify=False))
    monkeypatch.setattr("secateur.study.trial.recover", functools.partial(secateur.recover, verify=False))
    spaces = [{"convert": BOTH, "recovery": ["none", RECOVERY]}, {"sparsity": 0.5, "method": "magnitude"}]
    result = run_study(write_study(folder, space=spaces, keep="all"))
    fused, recovered, _ = result.trials
    assert [trial.state for trial in result.trials] == ["complete"] * 3, [trial.reason for trial in result.trials]
    assert fused.settings["convert"] == recovered.settings["convert"]
    sizes = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    more = 2 * sum(2 * (4 * (out + inner) + 2 * inner) for out, inner in sizes)
    assert fused.values["parameters"] == result.baselines[0].values["parameters"] + more
    assert load_model(Path(fused.out)).num_parameters() == fused.values["parameters"]
    # Each token goes through one of the two differences, and through both routers.
    assert fused.values["active_parameters"] == fused.values["parameters"] - 2 * sum(4 * sum(size) for size in sizes)
    products = 2 * sum(4 * (out + inner) + 2 * 2 * inner for out, inner in sizes)
    assert fused.values["flops_per_token"] == result.baselines[0].values["flops_per_token"] + 2 * products
    assert digest(Path(fused.out)) != digest(Path(recovered.out))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # nothing in a command is relative to the study
    for trial in (fused, recovered):
        for part in trial.command.split(" && "):
            assert main([*shlex.split(part)[1:], "--no-verify", "--quiet"]) == 0, capsys.readouterr().err
        assert digest(Path(Path(trial.out).name)) == digest(Path(trial.out))
