"""Folders of torchao: what is in the file against rounding done here, and opened by transformers without secateur."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import secateur
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.source import open_source
from secateur.cli.app import main
from secateur.errors import MissingExtraError, UnsupportedModelError, VerificationError, WeightValueError
from secateur.formats import torchao
from secateur.progress import Reporter
from tests.models import save_tiny, tiny_model, tiny_tokenizer

pytestmark = [
    pytest.mark.torchao,
    pytest.mark.skipif(not torchao.is_installed(), reason="torchao is not installed; make test runs this apart"),
]

IDS = torch.arange(3, 35).reshape(2, 16)


def save(folder, family="llama", dtype=torch.float32, **changes):
    """A tiny model with half of its weights zero."""
    model = tiny_model(family, **changes)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("torchao")
    folder = save(root / "dense")
    return folder, root / "made", secateur.export(folder, root / "made", format="torchao")


def test_every_linear_layer_is_rounded_by_rows_and_the_rest_is_as_it_was(exported):
    folder, out, result = exported
    dense, made = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    rounded = [key for key in dense if "_proj" in key]
    assert result.tensors == {"8 bits": len(rounded), "plain": len(dense) - len(rounded)}
    for key, weight in dense.items():
        if key not in rounded:
            assert torch.equal(made[key], weight)
            continue
        scale = weight.abs().amax(1, keepdim=True) / 127
        numbers = made[key.replace("weight", "_weight_qdata")]
        assert numbers.dtype == torch.int8
        assert int((numbers - (weight / scale).round()).abs().max()) <= 1  # the library's scale may be a little wider
        assert bool((numbers[weight == 0] == 0).all())
    assert result.zeros == sum(int((weight == 0).sum()) for weight in dense.values() if weight.ndim > 1)
    assert result.zeros_lost == 0
    assert result.verification["largest_difference"]["8 bits"] <= 0.51 / 127
    assert 0 < result.runtime["output_difference"] < 0.05
    assert result.bytes_disk < result.bytes_folder


def test_stock_transformers_opens_it_in_a_fresh_process(exported, tmp_path):
    _, out, _ = exported
    script = (
        "import sys, torch, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})\n"
        "assert 'secateur' not in sys.modules\n"
        f"print(float(model(torch.tensor({IDS.tolist()})).logits.abs().max()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert float(done.stdout.split()[-1]) > 0
    assert (out / "tokenizer_config.json").is_file()
    assert json.loads((out / "secateur.json").read_text())["format"] == "torchao"
    assert "pip install torchao" in (out / "README.md").read_text()


def test_evaluating_it_is_near_the_model_it_was_made_from(exported):
    folder, out, _ = exported
    given = {"sequence_length": 32, "max_samples": 4}
    dense, rounded = (secateur.evaluate(one, **given).nll_per_token for one in (folder, out))
    assert rounded == pytest.approx(dense, abs=0.02)
    assert rounded != dense


def test_generating_goes_on_from_it(exported):
    _, out, _ = exported
    assert secateur.generate(out, "abc", new_tokens=3)


def test_without_the_library_a_folder_of_it_says_so(exported, monkeypatch):
    _, out, _ = exported
    monkeypatch.setattr("secateur.measure.model.is_installed", lambda: False)
    with pytest.raises(MissingExtraError, match="torchao, which is not installed"):
        secateur.evaluate(out)


@pytest.mark.parametrize(("family", "dtype"), [("bert", torch.float32), ("qwen2", torch.bfloat16)])
def test_other_families_and_number_formats(family, dtype, tmp_path):
    folder = save(tmp_path / "dense", family, dtype)
    result = secateur.export(folder, tmp_path / "made", format="torchao")
    assert result.tensors["8 bits"] > 0
    assert result.runtime["output_difference"] < 0.1
    with CheckpointReader(tmp_path / "made") as reader:
        kinds = {str(reader.info(key).dtype) for key in reader.keys if "norm" in key.lower()}
    assert kinds == {str(dtype)}


def test_a_model_without_linear_layers_is_refused(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "gpt2", "gpt2")
    with pytest.raises(UnsupportedModelError, match="no linear layer of PyTorch"):
        secateur.export(folder, tmp_path / "made", format="torchao")
    assert not (tmp_path / "made").exists()


def test_weights_that_are_not_finite_are_refused(tmp_path):
    folder = save(tmp_path / "dense")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightValueError, match="up_proj"):
        secateur.export(folder, tmp_path / "made", format="torchao")


def test_without_the_library_the_way_to_it_is_said(tmp_path, monkeypatch, capsys):
    folder = save(tmp_path / "dense")
    monkeypatch.setattr(torchao, "is_installed", lambda: False)
    with pytest.raises(MissingExtraError, match="needs torchao") as raised:
        secateur.export(folder, tmp_path / "made", format="torchao")
    assert raised.value.hint == "pip install 'secateur[torchao]'"
    assert main(["export", str(folder), "-o", str(tmp_path / "made"), "--format", "torchao"]) == 2
    assert "secateur[torchao]" in capsys.readouterr().err


def test_what_is_quantised_is_neither_pruned_nor_exported_again(exported, tmp_path):
    _, out, _ = exported
    with pytest.raises(UnsupportedModelError, match=r"quantised \(torchao\)"):
        secateur.prune(out, tmp_path / "pruned", method="magnitude", sparsity=0.5)
    with pytest.raises(UnsupportedModelError, match=r"quantised \(torchao\)"):
        secateur.export(out, tmp_path / "again", format="torchao")


@pytest.mark.parametrize("change", ["number", "scale", "plain", "missing"])
def test_a_file_that_is_not_the_model_fails_its_check(change, exported, tmp_path):
    folder, out, _ = exported
    plan = torchao.TorchAO().plan(open_source(folder), Reporter())
    tensors = load_file(out / "model.safetensors")
    (tmp_path / "config.json").write_text((out / "config.json").read_text())
    name = "model.layers.0.mlp.up_proj."
    if change == "number":
        tensors[f"{name}_weight_qdata"][3, 5] += 3
    elif change == "scale":
        tensors[f"{name}_weight_scale"] *= 1.5
    elif change == "plain":
        tensors["model.norm.weight"][0] += 1
    else:
        del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match="norm" if change in ("plain", "missing") else "up_proj"):
        plan.check(tmp_path, Reporter())


def test_transformers_is_as_loud_as_before(exported, tmp_path):
    folder, _, _ = exported
    before = transformers.utils.logging.is_progress_bar_enabled()
    secateur.export(folder, tmp_path / "made", format="torchao", verify=False)
    assert transformers.utils.logging.is_progress_bar_enabled() == before
