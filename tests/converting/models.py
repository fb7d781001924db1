"""Tiny models for tests of conversions: a base, and models that were changed from it as training changes them."""

from __future__ import annotations

from pathlib import Path

import torch

from secateur.measure.model import load_model
from tests.models import calibration_for, save_tiny, tiny_model, tiny_tokenizer


def tuned(folder: Path, family: str, seed: int, spread: float = 0.03) -> Path:
    """A model of the family with every weight moved a little."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=spread)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def family_of(root: Path, family: str) -> tuple[Path, Path, Path]:
    """A base and two models that come of it."""
    return save_tiny(root / "base", family), tuned(root / "one", family, 1), tuned(root / "two", family, 2)


def logits(folder: Path) -> torch.Tensor:
    """What a folder's model answers to fixed tokens, float32."""
    with torch.no_grad():
        found: torch.Tensor = load_model(folder, dtype="float32")(calibration_for("llama")[:3]).logits
    return found
