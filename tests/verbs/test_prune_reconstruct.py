"""``reconstruct`` of the recipe: against a loop of its own, what stays as it was, and what is told and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import secateur
from secateur.engine.blocks import find_structure
from secateur.engine.reconstruct import Reconstructing, held_out, second_half
from secateur.errors import RecipeError, UnknownNameError, UsageError
from secateur.recipe import Recipe
from tests.models import calibration_for, save_tiny, tiny_model
from tests.naive_blocks import block_in_and_out, error, naive_step, stopped_at_the_second_block

RATE = 3e-3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "llama", "llama")


def pruned(model: Path, out: Path, way: str, options: dict[str, Any] | None = None, **settings: Any) -> Any:
    plain = {"method": "sparsegpt", "calibration": calibration_for("llama", rows=128), "compute_dtype": "float32"}
    settings = {**plain, **settings}
    settings |= {"reconstruct": way, "reconstruct_options": options or {}} if way != "none" else {}
    return secateur.prune(model, out, verify=False, evaluate=False, **settings)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def same_bytes(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_one_step_is_that_of_the_naive_loop(model: Path, tmp_path: Path) -> None:
    ids = calibration_for("llama", rows=64)  # two batches of 1,024 tokens
    pruned(model, tmp_path / "start", "none", method="magnitude", calibration=ids)
    options = {"passes": 1, "learning_rate": RATE}
    result = pruned(model, tmp_path / "out", "block", options, method="magnitude", calibration=ids)
    oracle, told = naive_step(model, tmp_path / "start", ids, RATE)
    found = [matrix.held_out_error for matrix in result.matrices if matrix.name.endswith("down_proj.weight")]
    assert found == [pytest.approx(pair, rel=1e-4) for pair in told]
    assert all(after < before for before, after in told), "the step was taken"
    for name, weight in weights_of(tmp_path / "out").items():
        # Where a gradient is next to nothing, its sign decides: a step either way.
        wrong = (weight - oracle[name]).abs() > 1e-5
        assert float(wrong.float().mean()) < 0.01, name


@pytest.mark.parametrize("way", ["block", "half-block"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_masks_stay_and_errors_fall(model: Path, tmp_path: Path, way: str, pattern: str) -> None:
    pruned(model, tmp_path / "plain", "none", method="magnitude", pattern=pattern)
    options = {"passes": 2, "learning_rate": RATE}
    result = pruned(model, tmp_path / "out", way, options, method="magnitude", pattern=pattern)
    before, after, dense = weights_of(tmp_path / "plain"), weights_of(tmp_path / "out"), weights_of(model)
    prunable = {matrix.name for matrix in result.matrices}
    for name, weight in after.items():
        if name in prunable:
            assert torch.equal(weight == 0, before[name] == 0), name
            assert not bool(torch.signbit(weight[weight == 0]).any()), name
            assert not torch.equal(weight, before[name]), name
        else:
            assert torch.equal(weight, dense[name]) != ("norm" in name and ".layers." in name), name
    assert result.sparsity == pytest.approx(0.5, abs=1e-3)
    errors = [matrix.held_out_error for matrix in result.matrices]
    assert len({tuple(pair) for pair in errors}) == (2 if way == "block" else 4)
    assert all(after < before for before, after in errors)
    assert any("Blocks were reconstructed" in sentence for sentence in result.verdict)


def test_the_error_is_that_of_what_was_written(model: Path, tmp_path: Path) -> None:
    """Learned in float32, judged as it is rounded: the number is found again in the folder, by the stock model."""
    ids = calibration_for("llama", rows=96)
    result = pruned(model, tmp_path / "out", "block", {"learning_rate": RATE}, dtype="bfloat16", calibration=ids)
    dense, made = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (model, tmp_path / "out")
    )
    for weight in dense.parameters():
        weight.data.copy_(weight.to(torch.bfloat16))  # both sides are rounded as they are written
    for number in range(2):
        given, wanted = block_in_and_out(made, number, ids[64:])[0], block_in_and_out(dense, number, ids[64:])[1]
        with torch.no_grad():
            found = float(error(made.model.layers[number], given, wanted))
        told = next(m.held_out_error for m in result.matrices if m.name.startswith(f"model.layers.{number}."))
        assert found == pytest.approx(told[1], rel=1e-4)
        assert told[1] < told[0]


@pytest.mark.parametrize("way", ["block", "half-block"])
@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_no_pass_is_no_reconstruction(model: Path, tmp_path: Path, way: str, method: str) -> None:
    pruned(model, tmp_path / "plain", "none", method=method)
    result = pruned(model, tmp_path / "out", way, {"passes": 0}, method=method)
    # A method that sees the dense block sees it anew for each half, the first of which is pruned then.
    if way == "block" or method == "sparsegpt":
        assert same_bytes(tmp_path / "plain", tmp_path / "out")
    assert all(matrix.held_out_error is None for matrix in result.matrices)


def test_what_does_not_help_is_taken_back(model: Path, tmp_path: Path) -> None:
    pruned(model, tmp_path / "plain", "none", method="sparsegpt")
    result = pruned(model, tmp_path / "out", "block", {"passes": 3, "learning_rate": 0.9}, method="sparsegpt")
    assert same_bytes(tmp_path / "plain", tmp_path / "out")
    errors = [matrix.held_out_error for matrix in result.matrices]
    assert all(before == after for before, after in errors)
    assert any("2 stayed as they were" in sentence for sentence in result.verdict)


def test_a_training_that_goes_astray_changes_nothing_and_is_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned(model, tmp_path / "plain", "none", method="sparsegpt")
    original = Reconstructing._error

    def astray(self: Any, *given: Any) -> torch.Tensor:
        found = original(self, *given)
        return found * float("nan") if torch.is_grad_enabled() else found

    monkeypatch.setattr(Reconstructing, "_error", astray)
    result = pruned(model, tmp_path / "out", "block", method="sparsegpt")
    assert same_bytes(tmp_path / "plain", tmp_path / "out")
    assert any("went astray" in warning for warning in result.warnings)


def test_dense_matrices_are_not_touched(model: Path, tmp_path: Path) -> None:
    result = pruned(model, tmp_path / "out", "block", {"learning_rate": RATE}, sparsity=0.0)
    assert all(torch.equal(weight, weights_of(model)[name]) for name, weight in weights_of(tmp_path / "out").items())
    assert all(matrix.held_out_error is None for matrix in result.matrices)
    result = pruned(model, tmp_path / "some", "half-block", {"learning_rate": RATE}, ignore="*q_proj*",
                    overrides=({"match": "*layers.1.*", "sparsity": 0.0},))  # fmt: skip
    dense = weights_of(model)
    changed = {name for name, weight in weights_of(tmp_path / "some").items() if not torch.equal(weight, dense[name])}
    assert changed
    assert all(".layers.0." in name and "q_proj" not in name for name in changed)


@pytest.mark.parametrize(("way", "correction"), [("block", "off"), ("half-block", "1")])
def test_a_resumed_run_ends_like_one_that_went_through(model: Path, tmp_path: Path, way: str, correction: str) -> None:
    options = {"learning_rate": RATE, "passes": 2}
    whole = pruned(model, tmp_path / "whole", way, options, error_correction=correction)
    with stopped_at_the_second_block():
        pruned(model, tmp_path / "out", way, options, error_correction=correction)
    result = pruned(model, tmp_path / "out", way, options, error_correction=correction, resume=True)
    assert same_bytes(tmp_path / "whole", tmp_path / "out")
    assert [one.held_out_error for one in result.matrices] == [one.held_out_error for one in whole.matrices]


def test_a_model_in_memory_takes_over_norms_as_well(model: Path, tmp_path: Path) -> None:
    pruned(model, tmp_path / "out", "half-block", {"learning_rate": RATE})
    held = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = calibration_for("llama", rows=128)
    settings = {"method": "sparsegpt", "calibration": ids, "compute_dtype": "float32"}
    secateur.prune(held, reconstruct="half-block", reconstruct_options={"learning_rate": RATE}, verify=False,
                   evaluate=False, **settings)  # fmt: skip
    wanted = weights_of(tmp_path / "out")
    assert all(torch.equal(weight, wanted[name]) for name, weight in held.state_dict().items())


def test_spilled_activations_change_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"error_correction": "1"}
    pruned(model, tmp_path / "kept", "half-block", {"learning_rate": RATE}, **settings)
    monkeypatch.setattr("secateur.engine.activations.MINIMUM_BYTES", 0)
    pruned(model, tmp_path / "spilled", "half-block", {"learning_rate": RATE}, **settings, activation_memory="1KB")
    assert same_bytes(tmp_path / "kept", tmp_path / "spilled")


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "qwen3_moe"])
def test_other_families_are_reconstructed(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family)
    ids = calibration_for(family, rows=96)
    result = pruned(folder, tmp_path / "out", "half-block", {"learning_rate": RATE}, calibration=ids)
    errors = [matrix.held_out_error for matrix in result.matrices]
    assert all(after <= before for before, after in errors)
    assert any(after < before for before, after in errors)


HALVES = {
    "llama": ("self_attn", "mlp"), "gpt2": ("attn", "mlp"), "opt": ("self_attn", "fc"), "bert": ("attention", "dense"),
    "t5": ("layer.0", "layer."), "mixtral": ("self_attn", "mlp"),
}  # fmt: skip


@pytest.mark.parametrize("family", HALVES)
def test_the_first_half_is_attention(family: str) -> None:
    first, second = HALVES[family]
    for block in find_structure(tiny_model(family)).blocks:
        later = second_half(block)
        assert later
        for matrix in block.matrices:
            inside = matrix.name.removeprefix(f"{block.name}.")
            assert inside.startswith(second if matrix.name.startswith(later) else first) or family == "bert"
            assert matrix.name.startswith(later) != inside.startswith(first)


@pytest.mark.parametrize(("batches", "wanted"), [(2, [1]), (7, [6]), (16, [15]), (32, [15, 31]), (31, [15])])
def test_one_in_sixteen_is_held_out(batches: int, wanted: list[int]) -> None:
    assert held_out(batches) == wanted


def test_one_batch_is_too_few(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 2 calibration batches"):
        pruned(model, tmp_path / "out", "block", calibration=calibration_for("llama", rows=8))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [({"passes": -1}, "passes"), ({"batch": 0}, "batch"), ({"learning_rate": 0}, "learning_rate"),
     ({"learning_rate": 2}, "learning_rate"), ({"passes": "many"}, "passes"), ({"pases": 1}, "did you mean 'passes'")],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(
    model: Path, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError) as refused:
        pruned(model, tmp_path / "out", "block", options)
    assert named in f"{refused.value.message} {refused.value.hint}"
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="blok"):
        Recipe(reconstruct="blok")
    with pytest.raises(RecipeError, match="reconstruct_options"):
        Recipe(reconstruct_options={"passes": 1})
    for structure in (("depth",), ("hidden",), ("experts",), ("heads", "hidden")):
        with pytest.raises(RecipeError, match="reconstruct needs --structure ffn, kv-groups, heads"):
            Recipe(structure=structure, reconstruct="block")
