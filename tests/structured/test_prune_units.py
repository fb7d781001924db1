"""Whole units removed end to end: against the stock class with the same units at zero, for every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import secateur
from secateur.cli.app import main
from secateur.engine.inputs import output_tensor
from secateur.errors import Interrupted, RecipeError, SparsityError, UnknownNameError, UnsupportedModelError, UsageError
from secateur.progress import Reporter
from secateur.result import PruneResult
from tests.models import FAMILIES, calibration_for, save_tiny

CANNOT = {
    # Where a structure is refused, and the words that say why.
    ("bloom", "ffn"): "config of BloomForCausalLM has no entries",
    ("falcon", "kv-groups"): "no block has key-value groups",
    ("falcon", "heads"): "config of FalconForCausalLM has no entries",
    **{
        (family, "kv-groups"): "has no entries"
        for family in ("bert", "bloom", "distilbert", "gpt2", "gpt_neox", "opt", "roberta")
    },
    ("t5", "kv-groups"): "cannot be run with fewer key-value groups",  # all blocks add the biases that the first has
    **{
        (family, "heads"): "no block has query heads"
        for family in ("bert", "bloom", "distilbert", "gpt2", "gpt_neox", "opt", "roberta", "t5", "vit")
    },
}
SHARES = {"ffn": 0.15, "kv-groups": 0.2, "heads": 0.13}
SMALLER = {"mixtral": 2.8, "qwen3_moe": 1.2}
"""Families whose attention is a smaller part of the whole: half of it is that much less."""


def _stock(folder: Path) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32).eval()


def _prune(folder: Path, out: Path, family: str, **changes: Any) -> PruneResult:
    values = {"round_to": 4, "verify": False, "evaluate": False, "calibration": calibration_for(family), **changes}
    return secateur.prune(folder, out, **values)


def _inputs(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))}
    ids = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    return request.param, save_tiny(folder, request.param)


@pytest.mark.parametrize("structure", ["ffn", "kv-groups", "heads"])
def test_removed_is_what_zeroed_would_compute(family: tuple[str, Path], structure: str, tmp_path: Path) -> None:
    """Without a refit: the stock class of the result answers like the stock class of the source with zero columns."""
    name, folder = family
    out = tmp_path / "out"
    share = SHARES[structure] / SMALLER.get(name, 1)
    run = {"structure": structure, "sparsity": share, "method": "magnitude", "update": False}
    if (name, structure) in CANNOT:
        with pytest.raises(UnsupportedModelError, match=CANNOT[name, structure]):
            _prune(folder, out, name, **run)
        assert not out.exists()
        return
    result = _prune(folder, out, name, **run)
    before, after = _stock(folder), _stock(out)
    gone = 0
    for matrix in result.matrices:
        whole = before.get_parameter(matrix.name).data
        turned = type(before.get_submodule(matrix.name.rpartition(".")[0])).__name__ == "Conv1D"
        stacked = zip(whole, matrix.units, strict=True) if whole.ndim == 3 else [(whole, matrix.units)]
        for single, stay in stacked:
            columns = single if turned else single.T  # (in, out), a view
            groups = getattr(before.config, "num_key_value_heads", 4)
            units = {"ffn": len(columns), "kv-groups": groups, "heads": 4}[structure]
            each = columns.view(units, -1, columns.shape[1])
            removed = [unit for unit in range(units) if unit not in stay]
            assert removed
            each[removed] = 0
            gone += len(removed)
    assert gone
    with torch.no_grad():
        expected, found = (output_tensor(model(**_inputs(model))) for model in (before, after))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    saved = before.num_parameters() - after.num_parameters()
    assert saved > 0
    assert result.before.parameters - result.after.parameters == saved
    assert result.sparsity == pytest.approx(share, abs=0.12)


@pytest.mark.parametrize("method", ["mixed", "obs", "magnitude", "wanda", "flap"])
def test_every_criterion_refits_and_passes_its_verification(method: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "qwen2")
    result = _prune(folder, tmp_path / "out", "qwen2", structure="ffn", sparsity=0.2, method=method, verify=True)
    assert result.verified
    assert result.verification["output_difference"] <= 1e-4
    assert len({len(matrix.units) for matrix in result.matrices}) == 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == len(
        result.matrices[0].units
    )


def test_parameters_that_go_are_those_of_the_units(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama", intermediate_size=64, num_hidden_layers=3)
    prunable = 3 * (3 * 32 * 64 + 2 * 32 * 32 + 2 * 32 * 16)
    result = _prune(folder, tmp_path / "out", "llama", structure="ffn", sparsity=3 * 3 * 32 * 16 / prunable)
    assert result.before.parameters - result.after.parameters == 3 * 3 * 32 * 16
    assert result.sparsity == pytest.approx(3 * 3 * 32 * 16 / prunable, abs=1e-9)
    assert {tuple(matrix.shape) for matrix in result.matrices} == {(32, 48)}


def test_the_refit_brings_the_outputs_nearer(tmp_path: Path) -> None:
    """On the calibration data: refitted to the dense block's outputs, then less, then not at all."""
    folder = save_tiny(tmp_path / "model", "llama", intermediate_size=64)
    ids = calibration_for("llama")
    distances = {}
    with torch.no_grad():
        dense = _stock(folder).model(ids).last_hidden_state
        for update in (True, False):
            _prune(folder, tmp_path / str(update), "llama", structure=("ffn", "heads"), sparsity=0.3, update=update)
            made = _stock(tmp_path / str(update)).model(ids).last_hidden_state
            distances[update] = float((made - dense).square().sum())
    assert distances[True] < 0.7 * distances[False]


@pytest.mark.parametrize("structure", ["kv-groups", "heads"])
def test_generation_with_a_cache_is_generation_without(structure: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "qwen3", num_attention_heads=8, num_key_value_heads=4)
    _prune(folder, tmp_path / "out", "qwen3", structure=structure, sparsity=0.1)
    model = _stock(tmp_path / "out")
    ids = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(2))
    cached, plain = (model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


def test_identity_at_sparsity_zero(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "gpt2")
    _prune(folder, tmp_path / "out", "gpt2", structure="ffn", sparsity=0.0)
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )


def test_heads_go_evenly_from_each_group(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama", num_attention_heads=8, num_key_value_heads=2, head_dim=4)
    result = _prune(folder, tmp_path / "out", "llama", structure="heads", sparsity=0.13)
    for matrix in result.matrices:
        groups = [unit // 4 for unit in matrix.units]
        assert groups.count(0) == groups.count(1)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_key_value_heads"], config["head_dim"]) == (2, 4)


def test_a_number_of_heads_that_the_config_refuses_names_the_nearest(tmp_path: Path) -> None:
    """Llama wants a hidden size that its heads divide: of 8 heads 4 can stay, 6 cannot."""
    folder = save_tiny(tmp_path / "model", "llama", num_attention_heads=8, num_key_value_heads=2, head_dim=4)
    with pytest.raises(SparsityError, match="6 of 8 query heads are not legal") as caught:
        _prune(folder, tmp_path / "out", "llama", structure="heads", sparsity=0.06)
    assert "nearest numbers that are: 4" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_the_run_does_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(tmp_path / "model", "llama", intermediate_size=64)
    flags = ["prune", str(folder), "-o", str(tmp_path / "out"), "--structure", "ffn,kv-groups", "--sparsity", "0.3"]
    flags += ["--method", "magnitude", "--no-update", "--round-to", "8", "--json", "--quiet"]
    assert main([*flags, "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    assert main([*flags, "--no-evaluate", "--no-verify"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert plan["removed"] == pytest.approx(result["sparsity"])
    assert plan["shape_changes"] == result["shape_changes"]
    assert plan["weights_before"] - plan["weights_after"] == (
        result["before"]["parameters"] - result["after"]["parameters"]
    )
    assert main(["prune", str(folder), "-o", str(tmp_path / "out"), "--dry-run"]) == 2
    assert "a plan needs a structure" in capsys.readouterr().err


class StopAt(Reporter):
    """Ctrl-C after a block."""

    def __init__(self, blocks: int) -> None:
        self.left, self.on = blocks, False

    def stage(self, name: str, total: int) -> None:
        self.on = name == "pruning"

    def advance(self, detail: str = "") -> None:
        self.left -= self.on
        if self.on and not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("structure", ["ffn", "kv-groups"])
def test_resumed_is_the_uninterrupted_run(structure: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder = save_tiny(tmp_path / "model", "gemma3", num_hidden_layers=4, layer_types=["full_attention"] * 4)
    run = {"structure": structure, "sparsity": 0.2, "verify": True}
    _prune(folder, tmp_path / "whole", "gemma3", **run)
    with pytest.raises(Interrupted):
        _prune(folder, tmp_path / "out", "gemma3", reporter=StopAt(2), **run)
    _prune(folder, tmp_path / "out", "gemma3", resume=True, **run)
    names = ("whole", "out")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in names]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("kind", "words", "options"),
    [
        (UnknownNameError, "did you mean 'ffn'", {"structure": "fnn"}),
        (UnknownNameError, "did you mean 'wanda'", {"structure": "ffn", "method": "wnda"}),
        (RecipeError, "names one twice", {"structure": "ffn,ffn"}),
        (RecipeError, "same output projection", {"structure": "kv-groups,heads"}),
        (RecipeError, "pattern has no meaning with --structure", {"structure": "ffn", "pattern": "2:4"}),
        (RecipeError, "targets has no meaning", {"structure": "ffn", "targets": "*down*"}),
        (RecipeError, "round_to needs --structure", {"round_to": 8}),
        (UsageError, "method obs needs --structure", {"method": secateur.Obs()}),
        (UsageError, "has no meaning with --structure", {"method": secateur.Wanda(), "structure": "ffn"}),
        (SparsityError, "cannot stay", {"structure": "ffn", "sparsity": 0.001}),
        (SparsityError, "would have to go", {"structure": "ffn", "sparsity": 0.9}),
        (SparsityError, "would have to go", {"structure": "kv-groups", "sparsity": 0.9}),
    ],
)
def test_refused_before_work(
    kind: type[Exception], words: str, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    save_tiny(folder, "llama")
    options = {"round_to": 4, **options} if "structure" in options else options
    with pytest.raises(kind) as caught:
        secateur.prune(folder, tmp_path / "out", evaluate=False, calibration=calibration_for("llama"), **options)
    assert words in f"{caught.value} {caught.value.hint}"
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
