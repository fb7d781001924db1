"""Experts of a network that has learned something: perplexity by the number of experts and by the router."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur.layers.moe import MoeFfn
from secateur.measure.model import load_model
from tests.models import save_tiny, tiny_tokenizer

WORDS, EXPERTS = 24, 8


def sentences(count: int, seed: int) -> torch.Tensor:
    """Token ids (count, 32) in which the last two say what comes next: one of two, most often the first."""
    follow = torch.randint(1, WORDS, (WORDS, WORDS, 2), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, WORDS, (count, 32), generator=generator)
    for place in range(2, 32):
        other = (torch.rand(count, generator=generator) < 0.1).long()
        ids[:, place] = follow[ids[:, place - 2], ids[:, place - 1], other]
    return ids


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ReLU network that has learned such sentences; without training no neuron says anything."""
    folder = save_tiny(tmp_path_factory.mktemp("trained") / "model", "llama", hidden_act="relu", intermediate_size=128)
    model = load_model(folder, dtype="float32").train()
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        ids = sentences(32, step + 1)
        adam.zero_grad()
        model(ids, labels=ids).loss.backward()
        adam.step()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def loss(folder: Path, change: Any = None) -> float:
    """Mean loss in nats on sentences that nobody has seen."""
    model = load_model(folder, dtype="float32")
    for layer in (module for module in model.modules() if isinstance(module, MoeFfn)):
        if change is not None:
            change(layer)
    ids = sentences(200, 10_000)
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def chance(layer: MoeFfn) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("router_in", "router_out"):
        matrix = layer.get_parameter(name)
        matrix.data = torch.randn(matrix.shape, generator=generator)


def test_more_experts_cost_no_quality_and_the_oracle_is_best_and_chance_worst(trained, tmp_path):
    def made(router: str, top: int) -> Path:
        out = tmp_path / f"{router}-{top}"
        secateur.convert(
            trained, out, to="moe", experts=EXPERTS, top_k=top, router=router, split="activations",
            calibration=sentences(100, 20_000), evaluate=False, verify=False,
        )  # fmt: skip
        return out

    oracle = {top: loss(made("oracle", top)) for top in (1, 2, 4, 8)}
    learned = made("mlp", 2)
    dense = loss(trained)
    assert oracle[1] > oracle[2] > oracle[4] >= oracle[8] - 1e-4
    assert oracle[8] == pytest.approx(dense, abs=1e-4)
    assert dense < oracle[2] < loss(learned) < loss(learned, chance)
