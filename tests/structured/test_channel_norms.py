"""Norms over hidden channels: a LayerNorm cannot lose some of them, an RMSNorm can; alone and in whole models."""

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
from tests.models import FAMILIES, calibration_for, save_tiny

KEEP = torch.tensor([channel for channel in range(32) if channel % 4 != 1])


def _meta(kind: type[nn.Module], **options: Any) -> tuple[nn.Module, nn.Module]:
    with torch.device("meta"):
        return kind(32, **options), kind(len(KEEP), **options)


def _misfit(kind: type[nn.Module]) -> float:
    """What the best weight and bias of each channel leave between the norm of all channels, those that go at zero, and
    that of those that stay, over many tokens with means of their own."""
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x += torch.randn(400, 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    zeroed = torch.zeros_like(x)
    zeroed[:, KEEP] = x[:, KEEP]
    with torch.no_grad():
        wide = kind(32, dtype=torch.float64)(zeroed)[:, KEEP]
        narrow = kind(len(KEEP), dtype=torch.float64)(x[:, KEEP])
    left = 0.0
    for ours, theirs in zip(narrow.T, wide.T, strict=True):
        design = torch.stack([ours, torch.ones_like(ours)], dim=1)
        left += float((design @ torch.linalg.lstsq(design, theirs[:, None]).solution - theirs[:, None]).square().sum())
    return (left / float(wide.square().sum())) ** 0.5


@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=["weight and bias", "weight"])
def test_a_layer_norm_is_refused_for_its_mean(options: dict[str, Any]) -> None:
    assert _misfit(nn.LayerNorm) > 0.05  # no weight and no bias can make up for the mean over other channels
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.norm \(LayerNorm\) subtracts the mean over all") as e:
        gain_of(*_meta(nn.LayerNorm, **options), "blocks.0.norm", KEEP)
    assert "--structure" in e.value.hint


def test_an_rms_norm_is_not() -> None:
    assert _misfit(nn.RMSNorm) < 1e-4  # of the epsilon
    found = gain_of(*_meta(nn.RMSNorm), "blocks.0.norm", KEEP)
    assert found is not None
    leaf, gain = found
    assert leaf == "weight"
    assert gain.unit == pytest.approx(1.0, abs=1e-4)
    assert gain.offset == 0.0


WHOLE = {
    "cohere": ("CohereConfig", "CohereForCausalLM", r"CohereLayerNorm\) subtracts the mean"),
    "nemotron": ("NemotronConfig", "NemotronForCausalLM", r"NemotronLayerNorm1P\) subtracts the mean"),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", r"LayerNorm\) subtracts the mean"),
    # Its norms have no weight that is cut: the forward through the whole model finds it out.
    "olmo": ("OlmoConfig", "OlmoForCausalLM", "computes something else without hidden channels"),
}


@pytest.mark.parametrize("family", WHOLE)
def test_a_model_with_such_norms_is_refused(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is in their way: heads have sizes of their own."""
    config, model, words = WHOLE[family]
    monkeypatch.setitem(models.FAMILIES, family, (config, model, FAMILIES["qwen2"][2]))
    folder = save_tiny(tmp_path / "model", family)
    with pytest.raises(UnsupportedModelError, match=words):
        secateur.prune(
            folder, tmp_path / "out", structure="hidden", sparsity=0.25, round_to=4, verify=False, evaluate=False,
            compute_dtype="float32", calibration=calibration_for(family),
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
