"""Norms over hidden channels: what an RMSNorm and a LayerNorm are with fewer of them; alone and in whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur
from secateur.errors import UnsupportedModelError
from secateur.structured.channel_norms import gain_of
from tests import models
from tests.coverage.check import load
from tests.coverage.narrower import answers
from tests.coverage.tiny import answer
from tests.models import FAMILIES, calibration_for, save_tiny

IDS = {"input_ids": torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(5))}
KEEP = torch.tensor([channel for channel in range(32) if channel % 4 != 1])


def _meta(kind: type[nn.Module], **options: Any) -> tuple[nn.Module, nn.Module]:
    with torch.device("meta"):
        return kind(32, **options), kind(len(KEEP), **options)


def _misfit(kind: type[nn.Module], *, filled: bool) -> float:
    """What the best weight and bias of each channel leave between the norm of all channels, those that go at zero or at
    the mean of the others, and that of those that stay, over many tokens with means of their own."""
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x += torch.randn(400, 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    given = x[:, KEEP].mean(dim=1, keepdim=True).repeat(1, 32) if filled else torch.zeros_like(x)
    given[:, KEEP] = x[:, KEEP]
    with torch.no_grad():
        wide = kind(32, dtype=torch.float64)(given)[:, KEEP]
        narrow = kind(len(KEEP), dtype=torch.float64)(x[:, KEEP])
    left = 0.0
    for ours, theirs in zip(narrow.T, wide.T, strict=True):
        design = torch.stack([ours, torch.ones_like(ours)], dim=1)
        left += float((design @ torch.linalg.lstsq(design, theirs[:, None]).solution - theirs[:, None]).square().sum())
    return (left / float(wide.square().sum())) ** 0.5


@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=["weight and bias", "weight"])
def test_a_layer_norm_sees_the_mean_of_what_stays(options: dict[str, Any]) -> None:
    """No weight and no bias make up for zeros among the channels of a mean; for their mean in that place one does."""
    assert _misfit(nn.LayerNorm, filled=False) > 0.05
    assert _misfit(nn.LayerNorm, filled=True) < 1e-4
    found = gain_of(*_meta(nn.LayerNorm, **options), "blocks.0.norm", KEEP)
    assert found is not None
    leaf, gain = found
    assert (leaf, gain.centred, gain.offset) == ("weight", True, 0.0)
    assert gain.bias == ("blocks.0.norm.bias" if not options else None)
    assert gain.unit == pytest.approx(1.0, abs=1e-4)


def test_an_rms_norm_sees_zeros() -> None:
    assert _misfit(nn.RMSNorm, filled=False) < 1e-4  # of the epsilon
    found = gain_of(*_meta(nn.RMSNorm), "blocks.0.norm", KEEP)
    assert found is not None
    leaf, gain = found
    assert leaf == "weight"
    assert gain.unit == pytest.approx(1.0, abs=1e-4)
    assert (gain.offset, gain.centred, gain.bias) == (0.0, False, None)


def _prune(family: str, config: str, model: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(models.FAMILIES, family, (config, model, FAMILIES["qwen2"][2]))
    made = save_tiny(folder / "model", family)
    return secateur.prune(
        made, folder / "out", structure="hidden", sparsity=0.25, round_to=4, verify=False, evaluate=False,
        compute_dtype="float32", calibration=calibration_for(family),
    )  # fmt: skip


@pytest.mark.parametrize("family", ["Cohere", "Nemotron", "Starcoder2"])
def test_models_with_layer_norms(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their heads have sizes of their own, so channels can go alone; with their norms seeing what stays."""
    result = _prune(family, f"{family}Config", f"{family}ForCausalLM", tmp_path, monkeypatch)
    assert result.channels_kept is not None
    before, after = load(tmp_path / "model"), load(tmp_path / "out")
    assert any(
        torch.allclose(answer(after.model, IDS), found, rtol=1e-4, atol=1e-4 * float(found.abs().max()))
        for found in answers(before.model, after.model, result, IDS)
    )


def test_a_norm_without_a_weight_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it can be scaled: the forward through the whole model finds it out."""
    with pytest.raises(UnsupportedModelError, match="computes something else without hidden channels"):
        _prune("olmo", "OlmoConfig", "OlmoForCausalLM", tmp_path, monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
