"""ReLU in the place of other activations: an ordinary checkpoint, how sparse it is, training, and experts of it."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import secateur
from secateur.converting.activity import is_zero_below
from secateur.errors import Interrupted, SecateurError, SourceError, UnsupportedModelError, UsageError
from secateur.measure.model import load_model
from secateur.study.conversion import read_conversions, unfit_for
from tests.converting.models import logits
from tests.models import calibration_for, save_tiny

ENTRIES = {"llama": "hidden_act", "gpt2": "activation_function", "falcon": "activation"}
WORDS = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 60


def convert(model: Path, out: Path, **options: Any) -> Any:
    options = {"evaluate": False, "verify": False, "calibration": calibration_for("llama"), **options}
    return secateur.convert(model, out, to="relu", **options)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "base", "llama")


@pytest.fixture(scope="module")
def made(base: Path) -> Path:
    convert(base, base.parent / "relu")
    return base.parent / "relu"


def networks(model: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """Feed-forward networks by what they are called in these models, their activation and last matrix."""
    names = {"mlp.act_fn": "down_proj", "mlp.act": "c_proj"}
    owners = {path.rpartition(".")[0]: path for path, _ in model.named_modules() if path.endswith(tuple(names))}
    found = []
    for owner, path in owners.items():
        module = model.get_submodule(owner)
        down = "dense_4h_to_h" if hasattr(module, "dense_4h_to_h") else names[".".join(path.split(".")[-2:])]
        found.append((module, path.rpartition(".")[2], down))
    return found


@pytest.mark.parametrize("family", ENTRIES)
def test_the_result_is_an_ordinary_checkpoint_with_the_same_weights_and_another_activation(family, tmp_path):
    model = save_tiny(tmp_path / "model", family)
    result = convert(model, tmp_path / "out", verify=family == "llama")
    assert result.verified == (family == "llama")
    assert result.needs_training
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(before[key].equal(after[key]) for key in before)
    sides = [json.loads((folder / "config.json").read_text()) for folder in (model, tmp_path / "out")]
    assert sides[1] == {**sides[0], ENTRIES[family]: "relu", "dtype": sides[1]["dtype"]}
    assert f"({ENTRIES[family]} of the config)" in result.verdict[0]
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.config.model_type == family
    wanted = load_model(model, dtype="float32")
    for module, act, _ in networks(wanted):
        setattr(module, act, nn.ReLU())
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "out"), wanted(calibration_for("llama")[:3]).logits)


def keep(seen: list[torch.Tensor], module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    seen.append(args[0].flatten())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_zeros_are_those_that_a_plain_forward_has(family, tmp_path):
    model = save_tiny(tmp_path / "model", family)
    result = convert(model, tmp_path / "out")
    told = []
    for folder in (tmp_path / "out", model):
        loaded = load_model(folder, dtype="float32")
        seen: list[torch.Tensor] = []
        for module, _, down in networks(loaded):
            module.get_submodule(down).register_forward_pre_hook(functools.partial(keep, seen))
        with torch.no_grad():
            loaded(calibration_for("llama"))
        told.append(float((torch.cat(seen) == 0).float().mean()))
    assert told[1] == 0
    assert 0.3 < told[0] < 0.7
    found = re.search(r"([\d.]+)% of their activity is exactly zero", result.verdict[1])
    assert found is not None
    assert float(found[1]) == pytest.approx(100 * told[0], abs=0.11)  # as printed, and where rounding decides the sign
    assert result.verdict[1].endswith(", 0.0% before.")


def test_what_is_zero_below_zero_is_known_by_what_it_does():
    acts = {name: is_zero_below(make()) for name, make in (
        ("ReLU", nn.ReLU), ("ReLU6", nn.ReLU6), ("SiLU", nn.SiLU), ("GELU", nn.GELU), ("Tanh", nn.Tanh),
        ("Hardswish", nn.Hardswish), ("LeakyReLU", nn.LeakyReLU),
    )}  # fmt: skip
    assert [name for name, zero in acts.items() if zero] == ["ReLU", "ReLU6"]


def refused(kind: type[SecateurError], words: str, model: Path, out: Path, **options: Any) -> None:
    with pytest.raises(kind) as caught:
        convert(model, out, **options)
    assert words in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 2
    assert not out.exists()
    assert not out.with_name(out.name + ".partial").exists()


def test_models_that_cannot_have_another_activation_are_refused(base, made, tmp_path, monkeypatch):
    out = tmp_path / "out"
    refused(UnsupportedModelError, "is ReLU already", made, out)
    plain = save_tiny(tmp_path / "bert", "bert")
    refused(UnsupportedModelError, "has a plain feed-forward network", plain, out)
    refused(UsageError, "one activation for all blocks", base, out, targets=["*mlp*"])
    refused(SecateurError, "option of conversion relu", base, out, experts=3)
    monkeypatch.setattr("secateur.converting.relu.ACT2FN", {})
    words = "no entry of the config of LlamaForCausalLM says the activation of its feed-forward networks, which is SiLU"
    refused(UnsupportedModelError, words, base, out)


def test_other_modules_that_the_entry_names_are_told(tmp_path):
    model = save_tiny(tmp_path / "model", "qwen3_moe", decoder_sparse_step=1, mlp_only_layers=[0])
    result = convert(model, tmp_path / "out")  # one block has a plain network, the other a mixture of experts
    (told,) = (line for line in result.warnings if "other modules too" in line)
    assert "experts" in told
    assert "in 1 feed-forward networks" in result.verdict[0]


def test_a_run_that_was_stopped_goes_on(base, tmp_path, monkeypatch):
    def stop(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("secateur.converting.relu.write_config", stop)
        with pytest.raises(Interrupted):
            convert(base, tmp_path / "out")
    convert(base, tmp_path / "out", resume=True)
    assert logits(tmp_path / "out").isfinite().all()


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(WORDS)
    return str(tmp_path / "text.txt")


def test_it_learns_from_the_model_that_it_was_and_then_becomes_experts(base, made, text, tmp_path):
    trained = secateur.recover(
        made, tmp_path / "trained", dense=True, data=text, tokens=640, sequence_length=32, learning_rate=1e-3,
        evaluate=False, verify=False,
    )  # fmt: skip
    assert trained.protocol["teacher"] == base.name
    assert trained.student["conversion"] == "relu"
    assert trained.training["held_out_loss"] < trained.training["held_out_loss_before"]
    config = json.loads((tmp_path / "trained" / "config.json").read_text())
    assert (config["model_type"], config["hidden_act"]) == ("llama", "relu")
    result = secateur.convert(
        tmp_path / "trained", tmp_path / "experts", to="moe", experts=8, top_k=3, router="similarity",
        calibration=calibration_for("llama"), evaluate=False, verify=False,
    )  # fmt: skip
    (told,) = (line for line in result.verdict if "is exactly zero" in line)
    assert 30 < float(told.split("there ")[1].split(" %")[0]) < 70
    assert not any("not sparse" in line for line in result.verdict)


def test_a_model_is_still_not_its_own_teacher(made, text, tmp_path):
    with pytest.raises(UsageError, match="the model itself"):
        secateur.recover(made, tmp_path / "out", dense=True, data=text, teacher=str(made), sequence_length=32)


@pytest.mark.parametrize("mode", ["full", "lora", "norms-and-biases", "blocks", "adapter-moe"])
def test_what_a_study_refuses_of_recoveries_is_what_recover_refuses(mode, base, made, text, tmp_path):
    (conversion,) = read_conversions({"to": "relu"}, "x").values()
    settings = {"mode": mode, "loss": "auto" if mode == "blocks" else "lm", "tokens": 64, "sequence_length": 32}

    def recover() -> Any:
        return secateur.recover(made, tmp_path / "out", dense=True, verify=False, evaluate=False, data=text, **settings)

    if unfit_for(mode, conversion, all_matrices=True):
        with pytest.raises(SourceError, match="mlp.act_fn is SiLU.* in the teacher and ReLU"):
            recover()
    else:
        recover()
