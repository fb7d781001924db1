"""``refit`` of the recipe, from the call to the result and its sentences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import secateur
from tests.models import calibration_for, save_tiny, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "llama", "llama")


def pruned(model: Path, out: Path, **settings):
    return secateur.prune(
        model, out, calibration=calibration_for("llama"), compute_dtype="float32", verify=False, evaluate=False,
        **settings,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "asked", "done"),
    [("sparsegpt", None, True), ("sparsegpt", False, False), ("wanda", None, False), ("wanda", True, True),
     ("magnitude", True, True), ("random", None, False)],
)  # fmt: skip
def test_what_is_done_is_told(model: Path, tmp_path: Path, method: str, asked: bool | None, done: bool) -> None:
    result = pruned(model, tmp_path / "out", method=method, refit=asked)
    assert result.recipe["refit"] is asked
    assert all(matrix.sparsity == 0.5 for matrix in result.matrices)
    said = [sentence for sentence in result.verdict if "solved anew by least squares" in sentence]
    assert len(said) == done
    for matrix in result.matrices:
        assert (matrix.loss_before_refit is not None) == done
        if matrix.loss_before_refit is not None:
            assert matrix.loss is not None
            assert matrix.loss <= matrix.loss_before_refit
    assert ("Kept weights were not solved anew (--no-refit)." in result.verdict) == (asked is False)
    if method == "wanda":
        assert "none" not in str(result.protocol["calibration"])


def test_a_refit_keeps_the_first_mask_and_brings_outputs_nearer(model: Path, tmp_path: Path) -> None:
    weights = {}
    for asked in (True, False):
        out = tmp_path / str(asked)
        pruned(model, out, method="magnitude", refit=asked)
        weights[asked] = type(tiny_model("llama")).from_pretrained(out).eval()
    for name, one in weights[True].state_dict().items():
        assert torch.equal(one == 0, weights[False].state_dict()[name] == 0), name
    ids, dense = calibration_for("llama"), tiny_model("llama")
    with torch.no_grad():
        wanted = dense(ids).logits
        errors = {asked: float((one(ids).logits - wanted).square().mean()) for asked, one in weights.items()}
    assert errors[True] < 0.8 * errors[False]


def test_experts_without_tokens_stay_as_the_fallback_made_them(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "mixture", "qwen3_moe")
    result = secateur.prune(
        folder, tmp_path / "out", method="sparsegpt", calibration=calibration_for("llama", rows=1, length=2),
        verify=False, evaluate=False,
    )  # fmt: skip
    assert any("no calibration token" in note for matrix in result.matrices for note in matrix.notes)
    assert result.sparsity == pytest.approx(0.5, abs=0.01)
