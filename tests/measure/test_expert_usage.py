"""Use of experts: who is chosen is who changes the output; shares add up; what is shown is what was counted."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import secateur
from secateur.cli.usage_table import TITLES, histogram, usage_table
from secateur.layers.adapter_moe import AdapterMoe
from secateur.layers.fused import Fused
from secateur.layers.moe import MoeFfn
from secateur.measure.expert_usage import WINDOWS, expert_usage
from secateur.measure.model import load_model
from tests.models import calibration_for, save_tiny


def converted(tmp_path: Path, to: str, **options: Any) -> Path:
    base = save_tiny(tmp_path / "base", "llama")
    text = {"calibration": calibration_for("llama")} if to == "moe" else {}
    secateur.convert(base, tmp_path / "out", to=to, evaluate=False, verify=False, **text, **options)
    return tmp_path / "out"


def changed_by(layer: torch.nn.Module, parts: list[torch.Tensor], *args: torch.Tensor) -> torch.Tensor:
    """Which tokens see an expert, (tokens, experts): those whose output changes when its part is another."""
    found = []
    with torch.no_grad():
        before = layer(*args).clone()
        for part in parts:
            kept = part.clone()
            part.add_(1)
            found.append((layer(*args) != before).any(dim=-1))
            part.copy_(kept)
    return torch.stack(found, dim=-1)


@pytest.mark.parametrize("router", ["mlp", "similarity"])
def test_the_experts_of_a_network_that_are_chosen_are_those_that_count(router, tmp_path):
    model = load_model(converted(tmp_path, "moe", experts=8, top_k=3, router=router))
    layer = next(one for one in model.modules() if isinstance(one, MoeFfn))
    rows = torch.randn(20, layer.in_features, generator=torch.Generator().manual_seed(0))
    parts = list(layer.down.data.chunk(8))
    chosen = layer.chosen(rows)
    assert torch.equal(chosen, changed_by(layer, parts, rows))
    assert chosen.sum(dim=1).tolist() == [3] * 20


def test_the_adapters_that_are_chosen_are_those_that_count():
    torch.manual_seed(0)
    layer = AdapterMoe(5, 2, 3, 6, torch.zeros(1)).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    rows, z = torch.randn(20, 6), torch.randn(20, 6)
    assert torch.equal(layer.chosen(rows), changed_by(layer, list(layer.up.data), rows, z))


def test_the_models_in_one_that_are_chosen_are_those_that_count():
    torch.manual_seed(0)
    layer = Fused(torch.nn.Linear(6, 4), 3, 2, 2, 1).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    rows = torch.randn(20, 6)
    assert layer.expert_bias is not None
    assert torch.equal(layer.chosen(rows), changed_by(layer, list(layer.expert_bias.data), rows))


def test_shares_add_up_and_nothing_stays_behind(tmp_path):
    model = load_model(converted(tmp_path, "moe", experts=8, top_k=3))
    windows = torch.randint(0, model.config.vocab_size, (WINDOWS + 2, 16), generator=torch.Generator().manual_seed(1))
    found = expert_usage(model, windows)
    assert list(found) == [name for name, one in model.named_modules() if isinstance(one, MoeFfn)]
    assert all(len(shares) == 8 and sum(shares) == pytest.approx(3) for shares in found.values())
    assert found == expert_usage(model, windows[:WINDOWS])  # no more are looked at
    assert not any(one._forward_pre_hooks for one in model.modules())
    first = next(one for one in model.modules() if isinstance(one, MoeFfn))
    seen: list[torch.Tensor] = []
    hook = first.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        for row in windows[:WINDOWS]:
            model(input_ids=row[None])
    hook.remove()
    rows = torch.cat(seen)
    with torch.no_grad():
        by_hand = [sum(expert in first.scores(row[None])[0].topk(3).indices for row in rows) for expert in range(8)]
    assert next(iter(found.values())) == pytest.approx([count / len(rows) for count in by_hand])


def test_evaluate_tells_it_and_has_nothing_to_tell_of_others(tmp_path):
    folder = converted(tmp_path, "moe", experts=8, top_k=3)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 20)
    found = secateur.evaluate(folder, data=str(text), sequence_length=64)
    assert len(found.expert_usage) == 2
    assert secateur.evaluate(tmp_path / "base", data=str(text), sequence_length=64).expert_usage == {}
    secateur.convert(
        tmp_path / "base", tmp_path / "all", to="moe", experts=8, top_k=8, evaluate=False, verify=False,
        calibration=calibration_for("llama"),
    )  # fmt: skip
    assert secateur.evaluate(tmp_path / "all", data=str(text), sequence_length=64).expert_usage == {}


@given(st.lists(st.lists(st.floats(0, 1), min_size=2, max_size=6).filter(any), min_size=1, max_size=4))
def test_every_expert_is_in_one_bin(layers):
    usage = {str(number): shares for number, shares in enumerate(layers)}
    assert sum(histogram(usage)) == sum(map(len, layers))
    assert histogram(usage)[0] == sum(shares.count(0) for shares in layers)


def test_the_histogram_shows_what_was_counted():
    usage = {"a.mlp": [0.0, 2.0, 0.5, 0.5], "b.mlp": [0.75, 0.75, 0.75, 0.75]}
    assert dict(zip(TITLES, histogram(usage), strict=True)) == {
        "never": 1, "below 1/4": 0, "1/4 to 1/2": 0, "1/2 to 1": 2, "1 to 2": 4, "2 to 4": 1, "4 and more": 0,
    }  # fmt: skip
    stream = io.StringIO()
    Console(file=stream, width=100).print(usage_table(usage))
    shown = stream.getvalue()
    assert "8 experts in 2 layers" in shown
    assert "no token of this text chose 1 experts: a.mlp" in shown
