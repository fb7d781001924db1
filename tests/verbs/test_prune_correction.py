"""``error_correction`` of the recipe: against a loop of its own, and what is told and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import secateur
from secateur.correction import DAMPING
from secateur.errors import RecipeError, SecateurError, UsageError
from secateur.plugins import Target, make_method
from secateur.recipe import Recipe
from secateur.statistics import InputStatistics
from tests.models import calibration_for, save_tiny, tiny_model

ORDER = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",),
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "llama", "llama")


def pruned(model: Path, out: Path, **settings: Any) -> secateur.PruneResult:
    settings = {"calibration": calibration_for("llama"), "compute_dtype": "float32", **settings}
    return secateur.prune(model, out, verify=False, evaluate=False, **settings)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def inputs_of(model: Any, name: str, ids: torch.Tensor) -> torch.Tensor:
    caught = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return caught[0].reshape(-1, caught[0].shape[-1])


def naive(folder: Path, ids: torch.Tensor, beta: float) -> dict[str, torch.Tensor]:
    """Every matrix in its order, with whole forwards through both models before each."""
    dense, made = (transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    method = make_method("sparsegpt")
    for number in range(dense.config.num_hidden_layers):
        for group in ORDER:
            place = f"model.layers.{number}.{group[0]}"
            x, wanted = inputs_of(made, place, ids), inputs_of(dense, place, ids)
            stats = InputStatistics(x.shape[1], "gram")
            stats.update(x)
            gram = x.double().t() @ x.double()
            gram += DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
            change = torch.linalg.inv(gram) @ x.double().t() @ (wanted - x).double()
            for leaf in group:
                parameter = made.get_parameter(f"model.layers.{number}.{leaf}.weight")
                weight = parameter.data
                corrected = (weight.double() + beta * (change @ weight.double().t()).t()).float()
                solved = method.solve(corrected, stats, Target(0.5), generator=torch.Generator().manual_seed(0))
                parameter.data = solved.weight
    return made.state_dict()


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_it_is_the_naive_loop(model: Path, tmp_path: Path, beta: float) -> None:
    pruned(model, tmp_path / "out", method="sparsegpt", refit=False, error_correction=str(beta))
    ours, oracle = weights_of(tmp_path / "out"), naive(model, calibration_for("llama"), beta)
    for name, weight in ours.items():
        same = (weight == 0) == (oracle[name] == 0)
        assert float(same.float().mean()) > 0.995, name  # ties of rounding may fall either way
        torch.testing.assert_close(weight[same], oracle[name][same], rtol=2e-2, atol=5e-3 * float(weight.abs().max()))


def test_share_zero_is_no_correction(model: Path, tmp_path: Path) -> None:
    for name, asked in (("off", "off"), ("zero", "0")):
        pruned(model, tmp_path / name, method="sparsegpt", error_correction=asked)
    ours, other = weights_of(tmp_path / "zero"), weights_of(tmp_path / "off")
    assert all(torch.equal(ours[name], other[name]) for name in other)


def test_outputs_come_nearer_to_the_dense_ones(model: Path, tmp_path: Path) -> None:
    ids, dense = calibration_for("llama", rows=64), tiny_model("llama")
    errors = {}
    for asked in ("off", "1"):
        pruned(model, tmp_path / asked, method="sparsegpt", error_correction=asked, calibration=ids)
        one = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / asked, dtype=torch.float32)
        with torch.no_grad():
            errors[asked] = float((one.model(ids)[0] - dense.model(ids)[0]).square().mean())
    assert errors["1"] < errors["off"]


def test_the_share_is_told(model: Path, tmp_path: Path) -> None:
    ids = calibration_for("llama", rows=256)
    result = pruned(model, tmp_path / "out", error_correction="auto", calibration=ids)
    shares = [matrix.beta for matrix in result.matrices]
    assert all(share is not None and 0 <= share <= 1 for share in shares)
    # Nothing is lost before the first block's first matrices.
    assert shares[:3] == [0.0, 0.0, 0.0]
    assert any(0 < share < 1 for share in shares[3:] if share is not None)
    assert any("Errors of earlier matrices were corrected in" in sentence for sentence in result.verdict)
    assert result.sparsity == pytest.approx(0.5, abs=1e-3)


def test_spilled_activations_change_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.engine.activations.MINIMUM_BYTES", 0)
    for name, memory in (("kept", "auto"), ("spilled", "1KB")):
        pruned(model, tmp_path / name, error_correction="1", activation_memory=memory)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("kept", "spilled")]
    assert weights[0] == weights[1]


def test_too_few_batches_to_choose_by_are_told(model: Path, tmp_path: Path) -> None:
    ids = calibration_for("llama", rows=3)
    result = pruned(model, tmp_path / "out", error_correction="auto", calibration=ids)
    assert any("too few to choose the error correction" in warning for warning in result.warnings)
    assert {matrix.beta for matrix in result.matrices} == {0.5}


def test_a_matrix_that_stays_dense_is_not_touched(model: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    overrides = ({"match": name, "sparsity": 0.0},)
    result = pruned(model, tmp_path / "out", error_correction="1", overrides=overrides)
    assert torch.equal(weights_of(tmp_path / "out")[name], weights_of(model)[name])
    assert next(matrix.beta for matrix in result.matrices if matrix.name == name) is None


def test_stacked_experts_are_told_to_be_left_out(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "mixture", "qwen3_moe")
    result = pruned(folder, tmp_path / "out", error_correction="1")
    experts = [matrix for matrix in result.matrices if ".experts." in matrix.name]
    assert experts
    assert all(matrix.beta is None for matrix in experts)
    assert all(any("not corrected" in note for note in matrix.notes) for matrix in experts)
    assert all(matrix.beta == 1 for matrix in result.matrices if ".experts." not in matrix.name)


def test_it_needs_a_gram_matrix(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs the Gram matrix"):
        pruned(model, tmp_path / "out", method="wanda", error_correction="auto")
    assert not (tmp_path / "out").exists()
    result = pruned(model, tmp_path / "out", method="wanda", refit=True, error_correction="auto")
    assert any(matrix.beta for matrix in result.matrices)


@pytest.mark.parametrize("asked", ["1.5", "-0.1", "nan", "yes", ""])
def test_a_share_that_is_none_is_refused(asked: str) -> None:
    with pytest.raises(RecipeError, match="error_correction"):
        Recipe(error_correction=asked)


def test_yaml_may_say_off_or_a_number() -> None:
    assert Recipe.from_dict({"error_correction": False}).correction == "off"
    assert Recipe.from_dict({"error_correction": 0.5}).correction == 0.5


def test_units_have_no_error_correction(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="error_correction"):
        pruned(model, tmp_path / "out", structure=("ffn",), error_correction="auto")
