"""Rows that a gate multiplies: found by the flow of data, refitted, and carried on with by the forwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import secateur
from secateur.checkpoint.reader import CheckpointReader
from secateur.engine.binding import Binding
from secateur.engine.blocks import find_structure
from secateur.engine.skeleton import build_skeleton
from secateur.structured.couplings import Coupling, Cut
from secateur.structured.plan import couplings_of_blocks
from secateur.structured.row_refit import Rows, Shown, go_on, put_rows, refit, running_rows
from tests.models import FAMILIES, calibration_for, save_tiny, tiny_model

GATED = {"gemma3", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"}
"""Families (of those in the tests) whose feed-forward networks are gated, in matrices of their own or in one."""


class Gated(nn.Module):
    """down(silu(gate(x)) * up(x)), in float32."""

    def __init__(self, width: int, units: int, *, bias: bool) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, units, bias=bias), nn.Linear(width, units, bias=bias)
        self.down = nn.Linear(units, width, bias=bias)

    def units(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.gate(x)) * self.up(x)


def network(*, bias: bool) -> tuple[Gated, list[Tensor]]:
    torch.manual_seed(0)
    made = Gated(8, 12, bias=bias).requires_grad_(False)
    mix = torch.randn(8, 8)
    return made, [torch.randn(1, 50, 8) @ mix for _ in range(3)]


def transposed(linear: nn.Linear) -> Tensor:
    """W^T, with the bias as a last row."""
    weight = linear.weight.t().double()
    return weight if linear.bias is None else torch.cat([weight, linear.bias[None].double()])


@pytest.mark.parametrize("bias", [False, True])
def test_refitted_rows_bring_the_output_nearer(bias: bool) -> None:
    made, batches = network(bias=bias)
    columns = torch.tensor([0, 2, 3, 5, 6, 8, 9, 11])
    shown = [(x[0], made.units(x)[0]) for x in batches]
    h, y = torch.cat([made.units(x)[0] for x in batches]), torch.cat([made.down(made.units(x))[0] for x in batches])
    whole = transposed(made.down)
    design = torch.cat([h[:, columns], torch.ones(len(h), 1)], dim=1) if bias else h[:, columns]
    first = torch.zeros_like(whole)
    stays = [*columns.tolist(), *([12] if bias else [])]
    first[stays] = torch.linalg.lstsq(design.double(), y.double()).solution
    rows = Rows(made.up.weight[columns], made.up.bias[columns] if bias else None)
    found = refit(shown, rows, columns, whole, first, damping=1e-4, steps=8, rounded=lambda rows: rows)

    def error(following: Tensor, rows: Rows) -> float:
        inputs = torch.cat([x[0] for x in batches])
        units = nn.functional.silu(made.gate(inputs))[:, columns] * rows.of(inputs)
        units = torch.cat([units, torch.ones(len(units), 1)], dim=1) if bias else units
        return float((units.double() @ following[stays] - y.double()).square().sum() / y.square().sum())

    assert error(found.following, found.rows) < 0.9 * error(first, rows)
    assert found.loss == pytest.approx(error(found.following, found.rows), rel=1e-3)
    gone = [unit for unit in range(12) if unit not in columns]
    assert not found.following[gone].any()


@pytest.mark.parametrize("bias", [False, True])
def test_nothing_removed_changes_nothing(bias: bool) -> None:
    made, batches = network(bias=bias)
    shown = [(x[0], made.units(x)[0]) for x in batches]
    rows = Rows(made.up.weight, made.up.bias if bias else None)
    whole = transposed(made.down)
    found = refit(shown, rows, torch.arange(12), whole, whole, damping=0.01, steps=4, rounded=lambda rows: rows)
    assert torch.allclose(found.rows.joined(), rows.joined(), atol=1e-4)
    assert torch.allclose(found.following, whole, atol=1e-4)
    assert found.loss < 1e-9


def test_a_forward_goes_on_as_if_the_new_rows_had_been_there() -> None:
    made, batches = network(bias=True)
    columns = torch.tensor([1, 4, 7])
    old = Rows(made.up.weight[columns].clone(), made.up.bias[columns].clone())
    new = Rows(torch.randn(3, 8), torch.randn(3))
    shown = Shown(batches[0], made.units(batches[0]))
    made.up.weight[columns], made.up.bias[columns] = new.weight, new.bias
    go_on(shown, columns, old, new)
    assert torch.allclose(shown.here, made.units(batches[0]), atol=1e-4)


def test_a_unit_that_gives_exactly_zero_stays_so() -> None:
    before, here = torch.zeros(1, 4, 3), torch.zeros(1, 4, 2)
    go_on(Shown(before, here), torch.tensor([0, 1]), Rows(torch.randn(2, 3), None), Rows(torch.randn(2, 3), None))
    assert torch.equal(here, torch.zeros(1, 4, 2))


@pytest.mark.parametrize("count", [1, 7, 50, 400])
def test_tokens_are_spread_over_a_forward(count: int) -> None:
    shown = Shown(torch.arange(100.0).reshape(2, 50, 1), torch.arange(200.0).reshape(2, 50, 2))
    before, here = shown.rows(count)
    assert 1 <= len(before) <= max(1, count)
    assert len(before) >= min(100, count) / 2
    assert torch.equal(here[:, 0], 2 * before[:, 0])
    before += 1
    assert float(shown.before.sum()) == 4950.0  # copies


@pytest.mark.parametrize("dim", [0, 1])
def test_rows_are_put_where_they_came_from(dim: int) -> None:
    weight, bias = torch.randn(10, 6), torch.randn(10)
    tensors = {"w": weight.t().contiguous() if dim else weight, "b": bias}
    number = torch.arange(5)
    linear = Cut("w", dim, (5 + number)[:, None])
    coupling = Coupling("ffn", "c", number[:, None], (), linear=linear)
    units = torch.tensor([0, 3])
    rows = running_rows(coupling, units, tensors, "b")
    assert torch.equal(rows.weight, weight[[5, 8]])
    assert rows.bias is not None
    assert torch.equal(rows.bias, bias[[5, 8]])
    changed = dict(tensors)
    put_rows(coupling, units, Rows(rows.weight + 1, rows.bias + 2), changed, "b")
    moved = changed["w"].t() if dim else changed["w"]
    expected = torch.zeros(10, 1)
    expected[[5, 8]] = 1
    assert torch.allclose(moved - weight, expected.expand(10, 6), atol=1e-6)
    assert torch.allclose(changed["b"] - bias, 2 * expected[:, 0], atol=1e-6)
    assert tensors["b"] is bias  # the others are copies


def _neurons(folder: Path) -> list[Coupling]:
    model = build_skeleton(folder)
    with CheckpointReader(folder) as reader:
        found = couplings_of_blocks(model, find_structure(model), Binding(model, reader.keys), reader)
    return [one for own in found.values() for one in own if one.kind == "ffn" and not one.experts]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_only_gated_networks_have_such_rows(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family)
    for coupling in _neurons(folder):
        assert (coupling.linear is not None) == (family in GATED)
        if coupling.linear is not None:
            first = 48 if family == "phi3" else 0  # gate and up in one matrix, the gate first
            assert ("gate_up" if family == "phi3" else "up_proj") in coupling.linear.name
            assert torch.equal(coupling.linear.indices[:, 0], first + torch.arange(48))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_rows_of_gates_stay(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family)
    made = [load_file(_prune(folder, tmp_path / f"out-{steps}", family, row_steps=steps).out / "model.safetensors")
            for steps in (0, 6)]  # fmt: skip
    first = ".0.mlp."  # later blocks choose other units
    changed = {name for name in made[0] if first in name and not torch.equal(made[0][name], made[1][name])}
    kept = len(made[0]["model.layers.0.mlp.gate_up_proj.weight"]) // 2 if family == "phi3" else 0
    names = {"llama": {"up_proj", "down_proj"}, "phi3": {"gate_up_proj", "down_proj"}, "gpt2": set()}[family]
    assert changed == {f"model.layers.0.mlp.{name}.weight" for name in names}
    if kept:
        gates = [tensors["model.layers.0.mlp.gate_up_proj.weight"][:kept] for tensors in made]
        assert torch.equal(*gates)


def _prune(folder: Path, out: Path, family: str, **changes: Any) -> Any:
    values = {"structure": "ffn", "sparsity": 0.15, "round_to": 4, "verify": True, "evaluate": False, **changes}
    return secateur.prune(folder, out, calibration=calibration_for(family), **values)


def test_the_model_is_nearer_to_the_whole_one(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    whole = tiny_model("llama")
    ids = calibration_for("llama")
    with torch.no_grad():
        wanted = whole(input_ids=ids).logits
        errors = []
        for steps in (0, 6):
            out = _prune(folder, tmp_path / f"out-{steps}", "llama", row_steps=steps).out
            cut = type(whole).from_pretrained(out, dtype=torch.float32).eval()
            errors.append(float((cut(input_ids=ids).logits - wanted).square().sum()))
    assert errors[1] < 0.9 * errors[0]
