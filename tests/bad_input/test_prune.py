"""Bad input to a whole run: one clear line, exit status 2, nothing written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import secateur
from secateur.checkpoint import folder as folder_module
from secateur.errors import (
    CalibrationError,
    CheckpointError,
    DiskSpaceError,
    OutputError,
    PatternError,
    RecipeError,
    RunError,
    SecateurError,
    SourceError,
    SparsityError,
    TargetError,
    UnknownNameError,
    UnsafeCheckpointError,
    UnsupportedModelError,
    UsageError,
    WeightValueError,
)
from secateur.plugins import make_method
from secateur.recipe import Recipe
from tests.models import save_tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("whole") / "model", "llama")


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def _listing(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


ALPS = {"refit_steps": 0}


def refused(kind: type[SecateurError], words: str, model: Any, out: Path, **options: Any) -> SecateurError:
    """Exactly this error, one line, with a hint, exit status 2, and no file made or changed anywhere near."""
    root = out.parent
    before = _listing(root)
    options = {"evaluate": False, "samples": 4, "sequence_length": 32, **options}
    with pytest.raises(SecateurError) as caught:
        secateur.prune(model, out, **options)
    error = caught.value
    assert type(error) is kind, error
    for word in words.split("|"):
        assert word in error.message + " " + error.hint, error.message
    assert error.exit_code == 2
    assert "\n" not in error.message + error.hint
    assert error.hint
    assert _listing(root) == before
    return error


def test_model_that_is_not_there(tmp_path: Path) -> None:
    refused(SourceError, "no such file", tmp_path / "nothing", tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "words", "options"),
    [
        (SparsityError, "1.0|[0, 1)", {"sparsity": 1.0}),
        (SparsityError, "-0.1", {"sparsity": -0.1}),
        (SparsityError, "nan", {"sparsity": float("nan")}),
        (SparsityError, "2:4|0.5", {"sparsity": 0.7, "pattern": "2:4"}),
        (PatternError, "3:2", {"pattern": "3:2"}),
        (PatternError, "2-4", {"pattern": "2-4"}),
        (PatternError, "3:5|32 inputs|divide", {"pattern": "3:5"}),
        (UnknownNameError, "wandaa|did you mean 'wanda'", {"method": "wandaa"}),
        (UnknownNameError, "option|dampening", {"method_options": {"dampening": 1}}),
        (UnknownNameError, "allocation|unifrom|uniform", {"allocation": "unifrom"}),
        (RecipeError, "refit|true or false", {"refit": "yes"}),
        (RecipeError, "refit has no meaning with --structure", {"refit": True, "structure": "ffn"}),
        (
            UsageError,
            "refit_steps=0|contradict",
            {"refit": True, "method": "alps", "method_options": {"refit_steps": 0}},
        ),
        (TargetError, "*nope*", {"targets": ["*nope*"]}),
        (TargetError, "*nope*", {"ignore": ["*nope*"]}),
        (TargetError, "override|*nope*", {"overrides": [{"match": "*nope*", "sparsity": 0.1}]}),
        (TargetError, "lm_head|cannot be pruned", {"targets": ["lm_head*"]}),
        (TargetError, "no matrix", {"ignore": ["*"]}),
        (RecipeError, "sparsty|did you mean 'sparsity'", {"sparsty": 0.5}),
        (RecipeError, "samples", {"samples": 0}),
        (UsageError, "sequence length 300|256", {"sequence_length": 300}),
        (UsageError, "device", {"device": "warp"}),
        (UsageError, "dtype", {"dtype": "int3"}),
        (UsageError, "compute_dtype", {"compute_dtype": "int3"}),
        (UsageError, "activation_memory", {"activation_memory": "lots"}),
        (CalibrationError, "missing.txt", {"calibration": "missing.txt"}),
        (CalibrationError, "too short|tokens", {"samples": 10**6}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_request_that_makes_no_sense(
    model: Path, tmp_path: Path, kind: type[SecateurError], words: str, options: dict[str, Any]
) -> None:
    refused(kind, words, model, tmp_path / "out", **options)


@pytest.mark.parametrize(("text", "words"), [("", "empty"), ("x" * 100, "128|100")])
def test_calibration_text_that_is_too_short(model: Path, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "text.txt").write_text(text)
    refused(CalibrationError, words, model, tmp_path / "out", calibration=tmp_path / "text.txt")


def test_calibration_of_the_wrong_kind(tmp_path: Path, model: Path) -> None:
    refused(CalibrationError, "integers", model, tmp_path / "out", calibration=torch.zeros(3, 4))
    refused(CalibrationError, "empty", model, tmp_path / "out", calibration=[])
    images = save_tiny(tmp_path / "vit", "vit")
    refused(CalibrationError, "images|magnitude", images, tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(model: Path, tmp_path: Path, value: float) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refused(WeightValueError, "model.layers.1.mlp.up_proj.weight", model, tmp_path / "out")


def test_model_files_that_are_damaged(model: Path, tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    refused(CheckpointError, "model.safetensors", model, tmp_path / "out")
    weights.unlink()
    torch.save({}, model / "pytorch_model.bin")
    refused(UnsafeCheckpointError, "pytorch_model.bin", model, tmp_path / "out")
    weights.write_bytes(content)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    refused(UnsafeCheckpointError, "auto_map", model, tmp_path / "out")
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused(CheckpointError, "model.layers.2", model, tmp_path / "out")
    (model / "config.json").unlink()
    refused(SourceError, "config.json", model, tmp_path / "out")


def test_output_folder_that_cannot_be(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("precious")
    refused(OutputError, "there|exists", model, tmp_path / "there")
    refused(OutputError, "there", model, tmp_path / "there" / "file")
    refused(OutputError, "inside", model, model / "out")
    monkeypatch.setattr(folder_module.os, "access", lambda *a, **k: False)
    refused(OutputError, "writ", model, tmp_path / "out")


def test_disk_that_is_too_small_before_work_starts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(DiskSpaceError, "1,000", model, tmp_path / "out")


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_disk_that_fills_up_during_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    calls = [0]
    original: Callable[..., Any] = os.pwrite if call == "write" else os.fsync

    def full(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] > 12:
            raise OSError(28, "No space left on device")
        return original(*args)

    monkeypatch.setattr(os, "pwrite" if call == "write" else "fsync", full)
    options: dict[str, Any] = {"method": "magnitude", "verify": False, "evaluate": False}
    if call == "fsync":
        calls[0] = 10
    with pytest.raises(SecateurError) as caught:
        secateur.prune(model, tmp_path / "out", **options)
    assert caught.value.exit_code == 1
    assert "--resume" in caught.value.hint
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    secateur.prune(model, tmp_path / "out", resume=True, **options)
    secateur.prune(model, tmp_path / "whole", **options)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_activation_that_is_not_finite_is_named(model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][:] = 3e38  # finite, but not for long
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CalibrationError, match=r"model\.layers\.0\.mlp\.down_proj\.weight"):
        secateur.prune(model, tmp_path / "out", method="sparsegpt", samples=4, sequence_length=32, evaluate=False)
    assert not (tmp_path / "out").exists()


def test_measuring_text_that_is_not_there(model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "magnitude", "evaluate": True}
    refused(CalibrationError, "no such data file", model, tmp_path / "out", data="missing.txt", **options)
    (tmp_path / "empty.txt").write_text("")
    refused(CalibrationError, "empty", model, tmp_path / "out", data=str(tmp_path / "empty.txt"), **options)


def test_what_cannot_be_measured_does_not_cost_the_result(model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("x")
    result = secateur.prune(model, tmp_path / "out", method="magnitude", verify=False, data=str(tmp_path / "short.txt"))
    assert any("quality of the source was not measured" in warning for warning in result.warnings)
    assert result.after.perplexity is None
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["write_json", "write_card"])
def test_disk_that_is_full_at_the_very_end(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "out.partial" / "file"))

    options: dict[str, Any] = {"method": "magnitude", "verify": False, "evaluate": False}
    monkeypatch.setattr(f"secateur.verbs.prune.{name}", full)
    with pytest.raises(RunError, match="No space left") as caught:
        secateur.prune(model, tmp_path / "out", **options)
    assert "--resume" in caught.value.hint
    monkeypatch.undo()
    secateur.prune(model, tmp_path / "out", resume=True, **options)


def test_an_adapter_beside_the_weights(model: Path, tmp_path: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    refused(UnsupportedModelError, "adapter|merge", model, tmp_path / "out", method="magnitude")


def test_images_without_their_processor(tmp_path: Path) -> None:
    images = save_tiny(tmp_path / "vit", "vit")
    (images / "preprocessor_config.json").unlink(missing_ok=True)
    (tmp_path / "images").mkdir()
    refused(CalibrationError, "preprocessor_config", images, tmp_path / "out", calibration=str(tmp_path / "images"))


def test_settings_that_nothing_looks_at_are_named(model: Path, tmp_path: Path) -> None:
    """Those of a calibration that is not needed, and what was given to measure with where nothing is measured."""
    common: dict[str, Any] = {"evaluate": False, "verify": False}
    (tmp_path / "pairs.jsonl").write_text('{"good": "a cat", "bad": "a act"}')
    unread = {"calibration": "missing.txt", "samples": 4, "sequence_length": 32, "compute_dtype": "float32",
              "activation_memory": "1GB"}  # fmt: skip
    measuring = {"data": "missing.txt", "files": [tmp_path / "pairs.jsonl"], "prompt": "Once"}
    for number, (options, named) in enumerate(
        [
            ({"method": "magnitude"}, set()),
            ({"method": "magnitude", **unread}, {*unread}),
            ({"method": "magnitude", **measuring}, {*measuring}),
            ({"method": "magnitude", "calibration": torch.ones(2, 8, dtype=torch.int64)}, {"calibration"}),
            ({"method": "wanda", "samples": 4, "sequence_length": 32, "compute_dtype": "float32"}, set()),
            (
                {
                    "structure": "heads",
                    "method": "magnitude",
                    "update": False,
                    "round_to": 8,
                    "samples": 4,
                    "sparsity": 0.134,
                },
                {"round_to", "samples"},
            ),
            ({"structure": "depth", "depth_by": "influence", "samples": 4, "sequence_length": 32}, set()),
        ]
    ):  # fmt: skip
        told = secateur.prune(model, tmp_path / f"out-{number}", **{**common, **options}).warnings
        assert {line.split()[0] for line in told if "no effect" in line} == {
            "--" + name.replace("_", "-") for name in named
        }


class Quiet:
    """A method of a caller that does not say whether it draws."""

    statistics = "none"

    def solve(self, weight: torch.Tensor, stats: Any, target: Any, *, generator: torch.Generator) -> Any:
        return make_method("magnitude").solve(weight, stats, target, generator=generator)


def test_a_seed_that_changes_nothing_is_named(model: Path, tmp_path: Path) -> None:
    """Only where it was given for this run, and only where nothing is drawn."""
    text = tmp_path / "text.txt"
    text.write_text("some words of text " * 200)
    common: dict[str, Any] = {"evaluate": False, "verify": False, "calibration": str(text), "samples": 2,
                              "sequence_length": 16}  # fmt: skip
    batches = [{"input_ids": torch.arange(8)[None] + number} for number in range(3)]
    evolve = {"allocation": "evolve", "allocation_options": {"generations": 0}}
    for number, (options, named) in enumerate(
        [
            ({"method": "wanda", "seed": 3}, "method wanda draws"),
            ({"method": "wanda", "seed": 0}, "method wanda draws"),
            ({"seed": 3}, "method alps draws"),
            ({"method": "wanda"}, None),
            ({"recipe": Recipe(method="wanda", seed=3)}, None),
            ({"method": "random", "seed": 3}, None),
            ({"method": "random", "refit": True, "seed": 3}, None),
            ({"method": Quiet(), "seed": 3}, None),
            ({"method": "wanda", "refit": True, "seed": 3}, "method wanda draws"),
            ({"method": "magnitude", "allocation": "alpha", "seed": 3}, "method magnitude with allocation alpha draws"),
            ({"method": "magnitude", **evolve, "seed": 3}, "method magnitude with allocation evolve draws"),
            ({"method": "magnitude", "allocation": "sensitivity", "allocation_options": {"solver": "random"},
              "seed": 3}, None),
            ({"method": "wanda", "reconstruct": "block", "calibration": batches, "seed": 3}, None),
            ({"structure": "heads", "sparsity": 0.134, "seed": 3}, "method mixed draws"),
            ({"structure": "depth", "sparsity": 0.5, "seed": 3}, "the choice of blocks draws"),
        ]
    ):  # fmt: skip
        told = secateur.prune(model, tmp_path / f"out-{number}", **{**common, **options}).warnings
        found = [line for line in told if line.startswith("--seed")]
        assert found == ([] if named is None else [f"--seed has no effect: {named} nothing at random"]), options


def test_texts_to_measure_with_that_the_model_cannot_use_are_named(tmp_path: Path) -> None:
    encoder = save_tiny(tmp_path / "encoder", "bert")
    body = transformers.BertModel.from_pretrained(encoder)
    shutil.copytree(encoder, tmp_path / "body", ignore=shutil.ignore_patterns("*.safetensors"))
    body.save_pretrained(tmp_path / "body")
    (tmp_path / "text.txt").write_text("some text " * 50)
    told = secateur.prune(
        tmp_path / "body", tmp_path / "out", method="magnitude", verify=False, data=str(tmp_path / "text.txt"),
        prompt="Once",
    ).warnings  # fmt: skip
    assert any(line.startswith("--data has no effect on a BertModel") for line in told)
    assert any(line.startswith("--prompt has no effect on a BertModel") for line in told)
