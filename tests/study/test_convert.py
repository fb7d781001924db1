"""Conversions as trials: how a space names them, what is refused, and a study on a tiny model from end to end."""

from __future__ import annotations

import functools
import hashlib
import shlex
from pathlib import Path

import pytest
import torch
import yaml

import secateur
from secateur.cli.app import main
from secateur.engine.skeleton import build_skeleton
from secateur.errors import RunError, SecateurError, StudyError, UnknownNameError
from secateur.measure.flops import count_flops
from secateur.measure.model import load_model
from secateur.progress import Recorder
from secateur.recipe import Recipe
from secateur.study import run_study, study_status
from secateur.study.conversion import FIELDS, read_conversions, unfit_for
from secateur.study.read import load_study, read_study
from secateur.study.setup import converter, set_up
from secateur.study.share import made_name
from secateur.study.stopping import Bar
from secateur.study.trial import Task, run_trial
from secateur.verbs.convert import SETTINGS
from secateur.verbs.report import report
from tests.docs.fences import ROOT, fences
from tests.study.studies import StandIn, link_to, plain, write_study

FACTORS = {"to": "factorized", "budget": "parameters=0.8"}
EXPERTS = {"to": "moe", "experts": 8, "top-k": 4}
TIED = {"to": "shared", "groups": 1}
RECOVERY = {"mode": "full", "loss": "lm", "tokens": 128, "sequence_length": 32}


def study(**changes):
    return read_study(plain(**changes), Path(), "s.yaml")


# The space


def test_a_name_says_what_is_not_the_default_however_it_is_written():
    found = read_conversions([FACTORS, {**EXPERTS, "router": "similarity"}, TIED], "x")
    assert list(found) == [
        "factorized budget parameters=0.8", "moe experts 8, top_k 4, router similarity", "shared groups 1",
    ]  # fmt: skip
    same = [
        {"to": "moe", "top_k": "4", "experts": 8.0, "router": "mlp"}, {"split": "weights", **EXPERTS, "to": "moe"},
    ]  # fmt: skip
    for one in same:
        assert read_conversions(one, "x") == read_conversions(EXPERTS, "x")
        with pytest.raises(StudyError, match="twice"):
            read_conversions([EXPERTS, one], "x")
    same = [
        {"to": "factorized", "budget": "Parameters = 0.80", "cores": 2}, {**FACTORS, "share-central": "false"},
    ]  # fmt: skip
    assert all(read_conversions(one, "x") == read_conversions(FACTORS, "x") for one in same)


def test_a_grid_has_every_conversion_with_its_recoveries_in_a_row():
    spec = study(space=[
        {"method": "wanda", "sparsity": 0.5},
        {"convert": [FACTORS, EXPERTS], "recovery": ["none", RECOVERY], "dtype": ["auto", "bfloat16"]},
        {"convert": FACTORS, "recovery": RECOVERY},
    ])  # fmt: skip
    first, *others = spec.grid()
    assert spec.conversion(first) is None
    assert [one["convert"].split()[0] for one in others] == ["factorized"] * 4 + ["moe"] * 4
    assert [one["dtype"] for one in others] == ["auto", "auto", "bfloat16", "bfloat16"] * 2
    assert all({**one, "recovery": "none"} == before for before, one in zip(others[::2], others[1::2], strict=True))
    assert spec.conversion(others[-1]) == {"to": "moe", "experts": 8, "top_k": 4}
    assert spec.skipped == 1  # the third space is in the second
    assert spec.recipe(others[-1]).dtype == "bfloat16"


def test_fixed_fields_go_to_the_conversions_that_look_at_them():
    assert {*FIELDS} == {*SETTINGS} - {"calibration", "samples", "sequence_length", "seed", "dtype"}
    spec = study(space={"convert": [FACTORS, TIED]}, fixed={"ignore": "*q_proj*", "device": "cpu"}, seed=3)
    factors, tied = map(spec.recipe, spec.grid())
    assert (factors.ignore, tied.ignore) == (("*q_proj*",), ())
    assert {factors.device, tied.device} == {"cpu"}
    assert {factors.seed, tied.seed} == {3}


def test_the_study_of_the_document_is_one():
    (body,) = [fence.body for fence in fences(ROOT / "docs" / "study.md") if "convert:" in fence.body]
    spec = read_study(yaml.safe_load(body), Path(), "both.yaml")
    assert {spec.conversion(one)["to"] for one in spec.grid() if "convert" in one} == {"factorized", "moe", "shared"}


def test_different_models_have_different_names():
    conversions = [None, *read_conversions([FACTORS, {**EXPERTS, "top-k": 2}, EXPERTS, TIED], "x").values()]
    recipes = [Recipe(seed=0), Recipe(seed=1)]
    names = {made_name("hash", recipe, one, 1) for recipe in recipes for one in conversions}
    assert len(names) == len(conversions) * len(recipes)
    again = {made_name("hash", recipe, None if one is None else dict(one), 1)
             for recipe in recipes for one in conversions}  # fmt: skip
    assert again == names


def converted(one, **beside):
    return {"space": {"convert": one, **beside}}


BAD = {
    "unknown conversion": (converted({"to": "factorised"}), UnknownNameError, "did you mean 'factorized'"),
    "unknown option": (converted({**EXPERTS, "expert": 8}), UnknownNameError, "did you mean 'experts'"),
    "option of another": (converted({**TIED, "experts": 8}), UnknownNameError, "option of conversion shared"),
    "no conversion named": (converted({"experts": 8}), StudyError, "for example convert"),
    "a name alone": (converted("factorized"), StudyError, "for example convert"),
    "no conversions": (converted([]), StudyError, "empty"),
    "several values": (converted({**EXPERTS, "top-k": [2, 4]}), StudyError, "a list of conversions"),
    "no value": (converted({**EXPERTS, "top-k": None}), StudyError, "give one value"),
    "budget of no share": (converted({"to": "factorized", "budget": "80%"}), SecateurError, "KEY=VALUE"),
    "beside a method": (converted(FACTORS, method="wanda"), StudyError, "method has no meaning beside convert"),
    "beside a structure": (converted(FACTORS, structure="ffn"), StudyError, "structure has no meaning beside"),
    "beside a pattern": (converted(FACTORS, pattern="2:4"), StudyError, "pattern has no meaning beside"),
    "beside a sparsity": (converted(FACTORS, sparsity=0.5), StudyError, "sparsity has no meaning beside"),
    "fixed method": ({**converted(FACTORS), "fixed": {"method": "wanda"}}, StudyError, "no meaning beside"),
    "fixed for nobody": ({**converted(TIED), "fixed": {"ignore": "*"}}, StudyError, "with convert shared groups 1"),
    "unknown dtype": (converted(FACTORS, dtype="float8"), UnknownNameError, "dtype"),
    "blocks": (converted(EXPERTS, recovery={"mode": "blocks"}), StudyError, "reads the dense weights"),
    "adapters": (converted(FACTORS, recovery={"mode": "adapter-moe"}), StudyError, "no adapters"),
    "lora of what is tied": (converted(TIED, recovery={"mode": "lora"}), StudyError, "several blocks share"),
    "lora of chains": (
        converted({"to": "factorized", "cores": 3, "rank": 4}, recovery=[None, {"mode": "lora"}]), StudyError, "chains",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_conversions_are_refused_when_they_are_read(case):
    changes, kind, words = BAD[case]
    with pytest.raises(kind) as raised:
        study(**changes)
    assert words in raised.value.message + raised.value.hint
    assert raised.value.exit_code == 2


UNFIT = {
    "experts that do not divide": (
        {**EXPERTS, "experts": 7},
        "convert moe experts 7, top_k 4: 7 experts do not",
    ),
    "more than there are": ({**EXPERTS, "top-k": 9}, "--top-k 9 of 8"),
    "groups that do not divide": ({"to": "shared", "groups": 3}, "3 groups do not divide 2 blocks"),
    "neither rank nor budget": ({"to": "factorized"}, "needs --rank or --budget"),
    "rank beyond the matrix": ({"to": "factorized", "rank": 64}, "rank 64 is more than"),
    "steps of a model that shares nothing": ({"to": "shared", "iterations": 1}, "shares nothing"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_cannot_be_done_to_the_model_is_refused_before_work_starts(case, place):
    one, words = UNFIT[case]
    with pytest.raises(StudyError) as raised:
        set_up(load_study(write_study(place, space=[{"sparsity": 0.5}, {"convert": one}])), Recorder())
    assert words in raised.value.message
    assert raised.value.exit_code == 2
    assert not (place / "tiny").exists()


@pytest.mark.parametrize("one", [{"to": "factorized", "rank": 8}, {"to": "factorized", "cores": 3, "rank": 4}, TIED])
@pytest.mark.parametrize("mode", ["full", "lora", "norms-and-biases", "blocks", "adapter-moe"])
def test_what_is_refused_of_recoveries_is_what_recover_refuses(one, mode, place, made):
    (conversion,) = read_conversions(one, "x").values()
    settings = {"mode": mode, "loss": "auto" if mode == "blocks" else "lm", "tokens": 64, "sequence_length": 32}
    if mode == "blocks":
        settings["teacher"] = str(place / "model")
    refused = unfit_for(mode, conversion, all_matrices=True)
    folder = made(conversion)

    def recover():
        secateur.recover(folder, place / "out", dense=True, verify=False, evaluate=False,
                         data=str(place / "calibration.txt"), **settings)  # fmt: skip

    if refused:
        with pytest.raises(SecateurError):
            recover()
    else:
        recover()


@pytest.fixture(scope="module")
def made(root, tmp_path_factory):
    """Folder of the model of the tests, converted."""
    folders = {}

    def convert(conversion):
        name = str(conversion)
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("made") / "model"
            text = {} if conversion["to"] == "shared" else {"calibration": root / "calibration.txt", "samples": 2,
                                                            "sequence_length": 32}  # fmt: skip
            secateur.convert(root / "model", folders[name], **conversion, **text, verify=False, evaluate=False)
        return folders[name]

    return convert


def test_samplers_draw_conversions_once_each_and_end(place, monkeypatch):
    class Any(StandIn):
        def answer(self, task):
            task = Task(**{**vars(task), "recipe": {**task.recipe, "sparsity": 0.1 * (1 + task.number)}})
            return super().answer(task)

    trials = Any()
    monkeypatch.setattr("secateur.study.workers.run_trial", trials)
    result = run_study(write_study(
        place, sampler="tpe", space={"convert": [FACTORS, EXPERTS, TIED], "recovery": ["none", RECOVERY]},
        budget={"trials": 4}, finalists=1,
    ))  # fmt: skip
    settings = {(trial.settings["convert"], trial.settings["recovery"]) for trial in result.trials}
    assert len(settings) == len(result.trials) == 4
    assert [task.conversion["to"] for task in trials.tasks] == [
        trial.settings["convert"].split()[0] for trial in result.trials
    ]


# Real trials


@pytest.fixture(scope="module")
def real(root, tmp_path_factory):
    """One real study; proofs in fresh processes have tests of their own, and take most of the time of a tiny model."""
    folder = link_to(tmp_path_factory.mktemp("converting"), root)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECATEUR_CACHE", str(root / "cache"))
        for verb in ("prune", "convert"):
            patch.setattr(f"secateur.study.share.{verb}", functools.partial(getattr(secateur, verb), verify=False))
        patch.setattr("secateur.study.trial.recover", functools.partial(secateur.recover, verify=False))
        path = write_study(
            folder,
            space=[
                {"method": "magnitude", "sparsity": 0.5},
                {"convert": [FACTORS, EXPERTS], "recovery": ["none", RECOVERY]},
                {"convert": TIED, "recovery": RECOVERY},
            ],
            constraints=["perplexity <= 50x"], stop={"evaluate": 2, "factor": 50}, keep="all", finalists=2,
        )  # fmt: skip
        yield folder, run_study(path)


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_every_conversion_comes_to_its_end(real):
    folder, result = real
    assert [trial.state for trial in result.trials] == ["complete"] * 6, [trial.reason for trial in result.trials]
    assert not any(trial.warnings for trial in result.trials)
    assert result.finished
    assert result.spent["shared_models"] == 2  # both recoveries of the two that have two
    assert result.to_dict() == study_status(folder / "tiny.yaml").to_dict()


def test_what_is_counted_is_what_is_in_the_model(real):
    folder, result = real
    _, factors, recovered, experts, _, tied = result.trials
    dense = result.baselines[0].values
    for trial in result.trials[1:]:
        model = load_model(Path(trial.out))
        numbers = sum(parameter.numel() for parameter in model.parameters())
        assert trial.values["parameters"] == numbers
        assert trial.values["nonzero"] == sum(int(parameter.count_nonzero()) for parameter in model.parameters())
        assert trial.values["flops_per_token"] == count_flops(build_skeleton(Path(trial.out))).per_token
        assert trial.values["bytes_disk"] == (Path(trial.out) / "model.safetensors").stat().st_size
        assert trial.values["sparsity"] == 0
        assert trial.sparsity == {}
        found = secateur.evaluate(trial.out, data=folder / "choice.txt", sequence_length=32, max_samples=6)
        assert trial.values["perplexity"] == pytest.approx(found.perplexity, rel=1e-6)
    assert factors.values["parameters"] == recovered.values["parameters"] < dense["parameters"]
    assert digest(Path(factors.out)) != digest(Path(recovered.out))
    assert tied.values["flops_per_token"] == dense["flops_per_token"]
    network = 3 * 32 * 48
    block = load_model(Path(tied.out)).model.layers[0]
    assert tied.values["parameters"] == dense["parameters"] - sum(parameter.numel() for parameter in block.parameters())
    # Half of both networks is not computed for a token; the routers (8 x 32 and 8 x 8) are.
    assert experts.values["active_parameters"] == experts.values["parameters"] - network
    routers = 2 * (8 * 32 + 8 * 8)
    assert experts.values["flops_per_token"] == dense["flops_per_token"] - 2 * network + 2 * routers
    assert "active_parameters" not in factors.values


@pytest.mark.parametrize("number", [2, 3, 5])
def test_the_printed_command_makes_the_same_bits(number, real, tmp_path, monkeypatch, capsys):
    _, result = real
    trial = result.trials[number]
    monkeypatch.chdir(tmp_path)
    for part in trial.command.split(" && "):
        words = shlex.split(part)
        assert words[0] == "secateur"
        assert main([*words[1:], "--no-verify", "--quiet"]) == 0, capsys.readouterr().err
    assert digest(tmp_path / f"trial-000{number}") == digest(Path(trial.out))


def test_a_report_calls_them_converted_and_can_recommend_one(real):
    folder, result = real
    found = report([folder / "tiny.json"])
    kinds = {model.name.split(":")[0]: model.kind for model in found.models if ": " in model.name}
    assert kinds["0"] == "pruned"
    assert {kinds[str(number)] for number in range(1, 6)} == {"converted"}
    commands = {model.command for model in found.models}
    assert {trial.command for trial in result.trials} <= commands
    taken = found.models[found.recommended]
    assert found.answer[0].startswith({"converted": "Converting", "pruned": "Pruning"}[taken.kind])
    report([folder / "tiny.json"], out=folder / "page.html")
    page = (folder / "page.html").read_text()
    assert page.count("secateur convert") >= 5
    assert "active parameters" in page
    assert ">converted</text>" in page


@pytest.fixture
def task(place):
    """A trial that ties all blocks and recovers, whose model is made for real."""
    setup = set_up(load_study(write_study(place, space={"convert": TIED, "recovery": RECOVERY})), Recorder())
    (settings,) = setup.spec.grid()
    recipe, reads = setup.recipe(settings)
    assert not reads
    assert recipe.samples is None
    return Task(
        number=0, model=str(place / "model"), dense=str(place / "model"), recipe=recipe.to_dict(),
        training=setup.spec.training(settings).to_dict(), conversion=setup.spec.conversion(settings),
        out=str(place / "out" / "trial"), choice=str(setup.exam("choice")),
    )  # fmt: skip


def test_a_conversion_that_fails_is_recorded_and_leaves_no_model(task, monkeypatch):
    def broken(*arguments, **others):
        raise RunError("no space left", hint="free some")

    monkeypatch.setattr("secateur.study.share.convert", broken)
    outcome = run_trial(task)
    assert (outcome.state, outcome.reason) == ("failed", "no space left; free some")
    assert not any(Path(task.out).parent.glob("trial*"))


def test_what_is_of_no_use_before_training_is_looked_at_after_it(task, monkeypatch):
    """And is no rival of those that are looked at before."""
    asked = []

    def recover(model, out, **settings):
        asked.append((Path(model).name, settings["dense"]))
        return secateur.recover(model, out, verify=False, **settings)

    monkeypatch.setattr("secateur.study.trial.recover", recover)
    bar = Bar(2, 2.0, [("perplexity <= 3", 1.0)])
    outcome = run_trial(Task(**{**vars(task), "bar": vars(bar)}))
    assert asked == [("trial-converted", True)]
    assert outcome.state == "stopped"
    assert outcome.proxy is None
    assert outcome.values["proxy_perplexity"] > 3
    assert not any(Path(task.out).parent.glob("trial*"))


def test_a_converted_model_is_converted_no_more(place, made):
    (conversion,) = read_conversions({"to": "factorized", "rank": 8}, "x").values()
    path = write_study(place, model=str(made(conversion)), space={"convert": EXPERTS})
    with pytest.raises(StudyError, match="converted already"):
        set_up(load_study(path), Recorder())


def test_options_are_those_of_the_conversion():
    for one in (FACTORS, EXPERTS, TIED, {"to": "factorized", "cores": 3, "rank": "full", "share-central": True}):
        (conversion,) = read_conversions(one, "x").values()
        for name, value in one.items():
            if name != "to":
                assert getattr(converter(conversion), name.replace("-", "_")) == value
