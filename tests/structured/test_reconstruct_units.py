"""Blocks that lost units and are trained afterwards: against a loop of its own over the smaller stock model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import secateur
from secateur.result import PruneResult
from tests.models import calibration_for, save_tiny
from tests.naive_blocks import naive_step, stopped_at_the_second_block

RATE = 3e-3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "llama", "llama")


def pruned(model: Path, out: Path, way: str, family: str = "llama", **settings: Any) -> PruneResult:
    settings = {"structure": ("ffn",), "sparsity": 0.25, "round_to": 4, "compute_dtype": "float32",
                "calibration": calibration_for(family, rows=128), "verify": False, **settings}  # fmt: skip
    if way != "none":
        settings |= {"reconstruct": way, "reconstruct_options": {"learning_rate": RATE, **settings.pop("options", {})}}
    return secateur.prune(model, out, evaluate=False, **settings)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("structure", [("ffn",), ("ffn", "kv-groups")])
def test_one_step_is_that_of_the_naive_loop_over_the_smaller_model(
    model: Path, tmp_path: Path, structure: tuple[str, ...]
) -> None:
    ids = calibration_for("llama", rows=64)  # two batches of 1,024 tokens
    settings = {"method": "magnitude", "update": False, "calibration": ids, "structure": structure}
    pruned(model, tmp_path / "start", "none", **settings)
    result = pruned(model, tmp_path / "out", "block", **settings, verify=len(structure) > 1)
    oracle, told = naive_step(model, tmp_path / "start", ids, RATE)
    found = [matrix.held_out_error for matrix in result.matrices if matrix.name.endswith("down_proj.weight")]
    assert found == [pytest.approx(pair, rel=1e-4) for pair in told]
    assert all(after < before for before, after in told), "the step was taken"
    made = weights_of(tmp_path / "out")
    assert {name: weight.shape for name, weight in made.items()} == {n: w.shape for n, w in oracle.items()}
    for name, weight in made.items():
        # Where a gradient is next to nothing, its sign decides: a step either way.
        wrong = (weight - oracle[name]).abs() > 1e-5
        assert float(wrong.float().mean()) < 0.01, name


def test_halves_learn_one_after_the_other_and_only_where_units_went(model: Path, tmp_path: Path) -> None:
    dense = weights_of(model)
    result = pruned(model, tmp_path / "both", "half-block", structure=("ffn", "kv-groups"), options={"passes": 2})
    errors = {tuple(matrix.held_out_error or ()) for matrix in result.matrices}
    assert len(errors) == 4
    assert all(after < before for before, after in errors)
    pruned(model, tmp_path / "plain", "none")
    pruned(model, tmp_path / "half", "half-block", options={"passes": 2})
    plain = weights_of(tmp_path / "plain")
    for name, weight in weights_of(tmp_path / "half").items():
        second = ".mlp." in name  # the norm before it counts as the first half
        assert torch.equal(weight, plain[name]) != (".layers." in name and second), name
        if "self_attn" in name:  # as it was
            assert torch.equal(weight, dense[name])


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "qwen3_moe", "vit"])
def test_other_families_are_reconstructed(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family)
    settings = {"calibration": calibration_for(family, rows=96), "sparsity": 0.1}
    settings["options"] = {"learning_rate": 3e-4, "passes": 2}
    result = pruned(folder, tmp_path / "out", "half-block", family, **settings)
    pairs = [matrix.held_out_error for matrix in result.matrices if matrix.held_out_error]
    assert all(after <= before for before, after in pairs)
    assert any(after < before for before, after in pairs)


def test_a_resumed_run_ends_like_one_that_went_through(model: Path, tmp_path: Path) -> None:
    settings = {"structure": ("ffn", "kv-groups"), "options": {"passes": 2}}
    whole = pruned(model, tmp_path / "whole", "half-block", **settings)
    with stopped_at_the_second_block():
        pruned(model, tmp_path / "out", "half-block", **settings)
    result = pruned(model, tmp_path / "out", "half-block", **settings, resume=True)
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    assert [one.held_out_error for one in result.matrices] == [one.held_out_error for one in whole.matrices]
    assert [one.zeros for one in result.matrices] == [0] * len(result.matrices)


def test_a_budget_is_split_first_and_then_reconstructed(model: Path, tmp_path: Path) -> None:
    settings = {"structure": ("ffn", "kv-groups"), "sparsity": None, "budget": "parameters=0.8", "round_to": 1}
    result = pruned(model, tmp_path / "out", "block", **settings, verify=True)
    assert result.budget is not None
    assert result.shape_changes
    pairs = [matrix.held_out_error for matrix in result.matrices if matrix.held_out_error]
    assert pairs
    assert all(after <= before for before, after in pairs)


def test_no_pass_is_no_reconstruction(model: Path, tmp_path: Path) -> None:
    pruned(model, tmp_path / "plain", "none")
    result = pruned(model, tmp_path / "out", "block", options={"passes": 0})
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    assert all(matrix.held_out_error is None for matrix in result.matrices)
