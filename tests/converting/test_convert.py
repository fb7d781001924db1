"""Whole conversions of tiny models: identity settings, what is loaded afterwards, resuming, and what other verbs do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import secateur
from secateur.checkpoint.ledger import Ledger
from secateur.checkpoint.reader import CheckpointReader
from secateur.errors import Interrupted, UnsupportedModelError
from secateur.measure.model import load_model
from secateur.pages.commands import command_of
from secateur.pages.inputs import read_inputs
from secateur.result import ConvertResult
from tests.converting.models import family_of, logits, tuned
from tests.models import calibration_for, save_tiny

SOURCE = Path(secateur.__file__).parent.parent
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 20


def convert(model: Path, out: Path, to: str, **options: Any) -> Any:
    options = {"evaluate": False, "verify": False, **options}
    if to == "factorized" and options.get("weighting") != "none":
        options.setdefault("calibration", calibration_for("llama"))
    return secateur.convert(model, out, to=to, **options)


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return family_of(tmp_path_factory.mktemp("models"), "llama")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])  # plain, stored the other way round, with biases
@pytest.mark.parametrize("cores", [2, 3])
def test_full_rank_is_the_identity(family, cores, tmp_path):
    model = save_tiny(tmp_path / "model", family)
    result = convert(model, tmp_path / "out", "factorized", rank="full", cores=cores)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), atol=1e-5, rtol=1e-5)
    assert all(matrix.error < 1e-9 for matrix in result.matrices)
    assert "nothing is saved" in " ".join(result.verdict)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_full_rank_of_one_model_is_that_model(family, tmp_path):
    base, one, _ = family_of(tmp_path, family)
    result = convert(base, tmp_path / "out", "fused", models=(str(one),), rank="full")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(one), atol=1e-5, rtol=1e-5)
    assert result.models[0]["sha256"]


def test_a_budget_is_met_and_recorded_matrix_by_matrix(models, tmp_path):
    result = convert(models[0], tmp_path / "out", "factorized", budget="parameters=0.6")
    assert 0.55 < sum(matrix.parameters for matrix in result.matrices) / 15_360 <= 0.6
    kinds = {matrix.kind for matrix in result.matrices}
    assert kinds == {"dense", "low_rank"}
    with CheckpointReader(tmp_path / "out") as reader:
        stored = sum(reader.info(key).numel for key in reader.keys)
    with CheckpointReader(models[0]) as reader:
        whole = sum(reader.info(key).numel for key in reader.keys)
    assert whole - stored == 15_360 - sum(matrix.parameters for matrix in result.matrices)
    assert result.after.parameters == stored
    loaded = load_model(tmp_path / "out")
    for matrix in result.matrices:
        layer = loaded.get_submodule(matrix.name.removesuffix(".weight"))
        assert sum(p.numel() for p in layer.parameters()) == matrix.parameters


def test_errors_are_those_of_the_layers_that_were_written(models, tmp_path):
    first = convert(models[0], tmp_path / "out", "factorized", rank=6)
    plain = convert(models[0], tmp_path / "plain", "factorized", rank=6, weighting="none")
    source, made = load_model(models[0]), load_model(tmp_path / "plain")
    for matrix in plain.matrices:
        old = source.get_submodule(matrix.name.removesuffix(".weight")).weight.detach()
        new = made.get_submodule(matrix.name.removesuffix(".weight")).weight.detach()
        share = float((old - new).square().sum() / old.square().sum())
        assert matrix.error == pytest.approx(share, abs=1e-6)
        assert torch.linalg.matrix_rank(new) == 6
    assert [matrix.rank for matrix in first.matrices] == [6] * len(first.matrices)


def test_tied_middle_tensors_are_one_tensor_in_the_file_and_in_memory(models, tmp_path):
    result = convert(models[0], tmp_path / "out", "factorized", cores=3, rank="full", share_central=True, verify=True)
    assert result.verified
    assert result.needs_training
    assert any("no use until it is trained" in line for line in result.verdict)
    loaded = load_model(tmp_path / "out")
    layers = [loaded.get_submodule(f"model.layers.{block}.mlp.up_proj") for block in (0, 1)]
    assert layers[0].cores[1] is layers[1].cores[1]
    assert layers[0].cores[0] is not layers[1].cores[0]
    with CheckpointReader(tmp_path / "out") as reader:
        assert "model.layers.0.mlp.up_proj.cores.1" in reader
        assert "model.layers.1.mlp.up_proj.cores.1" not in reader
    assert loaded.num_parameters() == result.after.parameters
    loaded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(tmp_path / "again"), logits(tmp_path / "out"), atol=0, rtol=0)


def test_fused_models_count_exactly_and_verify_in_a_fresh_process(models, tmp_path):
    base, one, two = models
    result = convert(base, tmp_path / "out", "fused", models=(str(one), str(two)), rank=4, router_rank=2, verify=True)
    sizes = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    assert result.after.parameters - result.before.parameters == 2 * sum(2 * (4 * (o + i) + 2 * i) for o, i in sizes)
    assert result.verified
    assert result.verification["loader"].startswith("transformers")
    assert any("--rest mean" in warning for warning in result.warnings)


def test_what_no_model_changed_stays_the_base(models, tmp_path):
    base, _, _ = models
    result = convert(base, tmp_path / "out", "fused", models=(str(base), str(base)), rank=4)
    assert result.after.parameters == result.before.parameters
    torch.testing.assert_close(logits(tmp_path / "out"), logits(base), atol=0, rtol=0)


def test_the_rest_is_of_the_base_or_the_mean(models, tmp_path):
    base, one, two = models
    weights = [load_model(folder).model.norm.weight for folder in models]
    for rest, expected in (("base", weights[0]), ("mean", (weights[1] + weights[2]) / 2)):
        convert(base, tmp_path / rest, "fused", models=(str(one), str(two)), rank=4, rest=rest)
        torch.testing.assert_close(load_model(tmp_path / rest).model.norm.weight, expected)


def test_a_delta_applied_to_its_base_is_the_model_again(tmp_path):
    base, one, _ = family_of(tmp_path, "gpt2")
    made = convert(base, tmp_path / "delta", "fused", models=(str(one),), rank="full", format="delta")
    assert {path.name for path in (tmp_path / "delta").iterdir()} == {"delta.safetensors", "secateur.json", "README.md"}
    assert made.after.bytes_disk == (tmp_path / "delta" / "delta.safetensors").stat().st_size
    back = convert(tmp_path / "delta", tmp_path / "back", "fused", base=str(base), verify=True)
    assert back.verified
    torch.testing.assert_close(logits(tmp_path / "back"), logits(one), atol=1e-5, rtol=1e-5)
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    small = convert(base, tmp_path / "small", "fused", models=(str(one),), rank=2, format="delta")
    assert small.after.bytes_disk < made.after.bytes_disk


@pytest.mark.parametrize(("to", "options"), [
    ("factorized", {"rank": 6}), ("factorized", {"budget": "parameters=0.7"}),
    ("factorized", {"cores": 3, "rank": "full", "share_central": True}), ("fused", {"rank": 4, "router_rank": 2}),
])  # fmt: skip
def test_a_run_that_was_stopped_goes_on_and_ends_the_same(to, options, models, tmp_path, monkeypatch):
    base, one, two = models
    if to == "fused":
        options = {**options, "models": (str(one), str(two))}
    convert(base, tmp_path / "whole", to, **options)
    append = Ledger.append

    def stop(self: Ledger, step: Any) -> None:
        append(self, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "append", stop)
        with pytest.raises(Interrupted):
            convert(base, tmp_path / "out", to, **options)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").is_dir()
    resumed = convert(base, tmp_path / "out", to, resume=True, **options)
    for path in (tmp_path / "whole").iterdir():
        if path.name not in ("secateur.json", "README.md"):
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    told = json.loads((tmp_path / "whole" / "secateur.json").read_text())["matrices"]
    assert [vars(matrix) for matrix in resumed.matrices] == told


def test_other_verbs_open_the_result(models, tmp_path):
    base, one, two = models
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    convert(base, tmp_path / "chain", "factorized", cores=3, rank="full")
    convert(base, tmp_path / "fused", "fused", models=(str(one), str(two)), rank=4)
    dense = secateur.evaluate(base, data=str(text), sequence_length=64)
    same = secateur.evaluate(tmp_path / "chain", data=str(text), sequence_length=64)
    assert same.perplexity == pytest.approx(dense.perplexity, rel=1e-4)
    for name in ("chain", "fused"):
        found = secateur.inspect(tmp_path / name)
        with CheckpointReader(tmp_path / name) as reader:
            assert found.parameters == sum(reader.info(key).numel for key in reader.keys)
        assert found.architecture == "LlamaForCausalLM"
        assert secateur.generate(tmp_path / name, "The", new_tokens=4) is not None
    assert secateur.inspect(tmp_path / "chain").prunable == 0


@pytest.mark.parametrize(("to", "options"), [
    ("fused", {"rank": 4}), ("factorized", {"rank": 8}), ("factorized", {"cores": 3, "rank": 8}),
])  # fmt: skip
def test_decoding_with_the_cache_is_the_same_as_without(to, options, models, tmp_path):
    base, one, two = models
    convert(base, tmp_path / "out", to, **options, **({"models": (str(one), str(two))} if to == "fused" else {}))
    model, prompt = load_model(tmp_path / "out"), calibration_for("llama")[:1, :8]
    with torch.no_grad():
        found = [
            model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=cached, pad_token_id=0)
            for cached in (True, False)
        ]
    assert found[0].tolist() == found[1].tolist()


def test_training_reaches_the_factors(models, tmp_path):
    convert(models[0], tmp_path / "out", "factorized", rank=4)
    model, ids = load_model(tmp_path / "out"), calibration_for("llama")[:4]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in model.model.layers[0].mlp.up_proj.parameters())


def test_recover_trains_tied_tensors_and_keeps_them_tied(models, tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT * 3)
    convert(models[0], tmp_path / "out", "factorized", cores=3, rank="full", share_central=True)
    trained = secateur.recover(
        tmp_path / "out", tmp_path / "trained", dense=True, data=str(tmp_path / "text.txt"), tokens=1500,
        evaluate=False, verify=False,
    )  # fmt: skip
    assert trained.training["held_out_loss"] < trained.training["held_out_loss_before"]
    loaded = load_model(tmp_path / "trained", dtype="bfloat16")
    layers = [loaded.get_submodule(f"model.layers.{block}.mlp.up_proj") for block in (0, 1)]
    assert layers[0].cores[1] is layers[1].cores[1]
    assert layers[0].cores[1].dtype == torch.bfloat16


def test_what_was_trained_after_a_conversion_is_still_a_converted_model(models, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 3)
    convert(models[0], tmp_path / "out", "factorized", rank=4)
    lesson = {"data": str(tmp_path / "text.txt"), "loss": "lm", "tokens": 64, "sequence_length": 32, "dense": True,
              "evaluate": False, "verify": False}  # fmt: skip
    for before, after in (("out", "once"), ("once", "twice")):
        trained = secateur.recover(tmp_path / before, tmp_path / after, **lesson)
        assert trained.student["conversion"] == "factorized"
        (model,) = (one for one in secateur.report([tmp_path / after]).models if one.kind != "dense")
        assert model.kind == "converted"
        assert f"-o {after} --dense " in model.command
        assert "a converted model" in (tmp_path / after / "README.md").read_text()
    dense = secateur.recover(models[0], tmp_path / "dense", **lesson)
    assert "conversion" not in dense.student


def test_the_report_has_a_converted_model_with_its_command(models, tmp_path):
    convert(models[0], tmp_path / "out", "factorized", rank=4, targets=["*mlp*"])
    secateur.report([tmp_path / "out"], tmp_path / "page.html")
    found = read_inputs([tmp_path / "out"])[0].result
    assert isinstance(found, ConvertResult)
    assert command_of(found, "X").endswith("-o X --to factorized --rank 4 --targets '*mlp*'")


def test_without_secateur_the_stock_loader_refuses_and_with_it_it_opens(models, tmp_path):
    out = tmp_path / "out"
    convert(models[0], out, "factorized", rank=4)
    load = f"transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})"
    refused = f"""
import transformers
try:
    {load}
except ValueError as error:
    print("refused:", "model type `secateur`" in str(error))
import secateur
print(type({load}.model.layers[0].mlp.up_proj).__name__)
"""
    done = python(refused)
    assert done.stdout.split() == ["refused:", "True", "LowRank"], done.stderr
    done = python(f"import secateur, transformers\nprint(type({load}.model.layers[0].mlp.up_proj).__name__)")
    assert done.stdout.split() == ["LowRank"], done.stderr


def test_config_and_card_say_what_was_done(models, tmp_path):
    convert(models[0], tmp_path / "out", "factorized", rank=4, targets=["*mlp*"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["secateur_model_type"] == "llama"
    assert sorted(config["quantization_config"]["modules"]) == sorted(
        f"model.layers.{block}.mlp.{name}_proj" for block in (0, 1) for name in ("up", "gate", "down")
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`import secateur` first" in card
    assert isinstance(transformers.AutoConfig.from_pretrained(tmp_path / "out"), transformers.LlamaConfig)


def test_a_converted_model_is_not_converted_again_nor_exported(models, tmp_path):
    convert(models[0], tmp_path / "out", "factorized", rank=4)
    with pytest.raises(UnsupportedModelError, match="converted already"):
        convert(tmp_path / "out", tmp_path / "again", "factorized", rank=2)
    for name, format in (("out.gguf", "gguf"), ("packed", "sparse"), ("plain", "hf")):
        with pytest.raises(UnsupportedModelError, match="is a converted model"):
            secateur.export(tmp_path / "out", tmp_path / name, format=format)
        assert not (tmp_path / name).exists()
    with pytest.raises(UnsupportedModelError, match="is a converted model"):
        convert(models[0], tmp_path / "fused", "fused", models=(str(tmp_path / "out"),))
    assert not (tmp_path / "fused").exists()


def test_fusing_serves_each_text_better_than_the_mean(tmp_path):
    """Two models whose differences read other directions: the router tells their inputs apart."""
    base = save_tiny(tmp_path / "base", "llama")
    one, two = (tuned(tmp_path / name, "llama", seed, 0.01) for name, seed in (("one", 1), ("two", 2)))
    convert(base, tmp_path / "out", "fused", models=(str(one), str(two)), rank="full", router_rank=8, rest="mean")
    with torch.no_grad():
        mean = load_model(one)
        other = dict(load_model(two).named_parameters())
        for name, parameter in mean.named_parameters():
            parameter.copy_((parameter + other[name]) / 2)
    layer, inputs = load_model(tmp_path / "out").model.layers[0].mlp.up_proj, torch.randn(200, 32)
    with torch.no_grad():
        wanted = [load_model(folder).model.layers[0].mlp.up_proj(inputs) for folder in (one, two)]
        nearest = torch.stack([(layer(inputs) - w).norm(dim=1) for w in wanted]).amin(0)
        averaged = torch.stack([(mean.model.layers[0].mlp.up_proj(inputs) - w).norm(dim=1) for w in wanted]).amin(0)
    assert float(nearest.max()) < 1e-4  # each token has one of the models whole
    assert float(averaged.min()) > 1e-3
