"""An accelerator gives what the CPU gives: every method, structure, allocation, recovery; conversions in their shapes.

Skipped where torch sees none. Forwards are float32 on both sides, so that only the order of sums differs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import secateur
from secateur import plugins
from tests.models import FAMILIES, calibration_for, save_tiny, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(not torch.accelerator.is_available(), reason="torch sees no accelerator here")

LONG = calibration_for("llama", rows=96)
"""More than one batch."""
FLOAT32: dict[str, Any] = {"compute_dtype": "float32", "verify": False, "evaluate": False}


def _device() -> str:
    accelerator = torch.accelerator.current_accelerator()

    assert accelerator is not None
    return accelerator.type


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny(root / name, name) for name in sorted(FAMILIES)}


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _both(source: Path, root: Path, family: str = "llama", **settings: Any) -> tuple[dict[str, torch.Tensor], ...]:
    made = []
    for device in ("cpu", _device()):
        secateur.prune(
            source,
            root / device,
            device=device,
            **{"calibration": calibration_for(family), **FLOAT32, **settings},
        )
        made.append(_tensors(root / device))
    return tuple(made)


def _alike(cpu: dict[str, torch.Tensor], other: dict[str, torch.Tensor], *, masks: float = 0.99) -> None:
    """The same shapes and numbers of zeros; nearly the same zeros, and where they agree nearly the same weights."""
    assert cpu.keys() == other.keys()
    for key, tensor in cpu.items():
        found = other[key]
        assert tensor.shape == found.shape, key
        assert int((tensor == 0).sum()) == int((found == 0).sum()), key
        same = (tensor == 0) == (found == 0)
        assert float(same.float().mean()) >= masks, key
        size = float(tensor.float().abs().mean())
        assert float((tensor - found)[same].abs().float().mean()) <= 0.05 * size, key


def test_inputs_are_put_in_another_order_on_it_too(models: dict[str, Path], tmp_path: Path) -> None:
    settings = {**FLOAT32, "verify": True, "calibration": LONG, "method": "wanda", "pattern": "2:4", "permute": True}
    result = secateur.prune(models["llama"], tmp_path / "out", device=_device(), **settings)
    shares = [one.saliency_kept for one in result.matrices if one.saliency_kept is not None]
    assert len(shares) == 4
    assert all(after > before for before, after in shares)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("method", [name for name in plugins.available("methods") if name != "random"])
def test_methods(method: str, pattern: str, models: dict[str, Path], tmp_path: Path) -> None:
    _alike(*_both(models["llama"], tmp_path, method=method, pattern=pattern))


def test_chance_is_the_same(models: dict[str, Path], tmp_path: Path) -> None:
    cpu, other = _both(models["llama"], tmp_path, method="random")
    assert all(torch.equal(tensor, other[key]) for key, tensor in cpu.items())


@pytest.mark.parametrize("settings", [
    {"method": "best"},
    {"method": "best", "pattern": "2:4"},
    {"method": "sparsegpt", "refit": True, "error_correction": 0.5},
    {"method": "sparsegpt", "bits": 4, "group_size": 64},
    {"method": "alps", "bits": 8, "group_size": 64},
    {"method": "wanda", "refit": True},
], ids=lambda settings: " ".join(map(str, settings.values())))  # fmt: skip
def test_solvers(settings: dict[str, Any], tmp_path: Path) -> None:
    wide = save_tiny(tmp_path / "wide", "llama", hidden_size=64, intermediate_size=64, head_dim=16)
    rounded = (
        settings["method"] == "alps" and "bits" in settings
    )  # what is rounded otherwise is searched otherwise after
    _alike(*_both(wide, tmp_path, **settings), masks=0.9 if rounded else 0.97)


@pytest.mark.parametrize("scope", ["block", "half-block"])
def test_reconstruction(scope: str, models: dict[str, Path], tmp_path: Path) -> None:
    cpu, other = _both(models["llama"], tmp_path, method="wanda", reconstruct=scope, calibration=LONG)
    for key, tensor in cpu.items():
        assert torch.equal(tensor == 0, other[key] == 0) or ".0." not in key, key
        assert float((tensor - other[key]).abs().mean()) <= 0.1 * float(tensor.abs().mean()), key


@pytest.mark.parametrize("allocation", list(plugins.available("allocation")))
def test_allocations(allocation: str, models: dict[str, Path], tmp_path: Path) -> None:
    cpu, other = _both(models["llama"], tmp_path, method="wanda", allocation=allocation)
    for key, tensor in cpu.items():
        if tensor.ndim == 2:
            share = [float((side == 0).float().mean()) for side in (tensor, other[key])]
            assert abs(share[0] - share[1]) <= 0.05, (key, share)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families(family: str, models: dict[str, Path], tmp_path: Path) -> None:
    _alike(*_both(models[family], tmp_path, family, method="sparsegpt"), masks=0.98)


def _cut_alike(cpu: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert {key: tensor.shape for key, tensor in cpu.items()} == {key: tensor.shape for key, tensor in other.items()}
    for key, tensor in cpu.items():
        assert float((tensor - other[key]).abs().mean()) <= 0.02 * float(tensor.abs().mean()) + 1e-6, key


@pytest.mark.parametrize("settings", [
    {"structure": "depth", "depth_by": "greedy", "sparsity": 0.5},
    {"structure": "depth", "depth_by": "influence", "sparsity": 0.5},
    {"structure": "depth", "depth_by": "angular", "sparsity": 0.5},
    *({"structure": "ffn", "sparsity": 0.5, "round_to": 8, "method": name} for name in plugins.available("criteria")),
    {"structure": "ffn", "sparsity": 0.5, "round_to": 8, "reconstruct": "block", "calibration": LONG},
    {"structure": "kv-groups", "sparsity": 0.2},
    {"structure": "kv-groups", "sparsity": 0.2, "reconstruct": "half-block", "calibration": LONG},
    {"structure": "heads", "sparsity": 0.2},
    {"structure": "hidden", "sparsity": 0.25, "round_to": 8},
    {"structure": "kv-groups,hidden", "sparsity": 0.5, "round_to": 8},
    {"budget": "parameters=0.8", "round_to": 8},
], ids=lambda settings: " ".join(map(str, settings.values())))  # fmt: skip
def test_structures(settings: dict[str, Any], models: dict[str, Path], tmp_path: Path) -> None:
    if settings["structure" if "structure" in settings else "budget"] == "kv-groups,hidden":
        settings = {**settings, "method": "wanda"}
    _cut_alike(*_both(models["llama"], tmp_path, **settings))


@pytest.mark.parametrize("method", list(plugins.available("expert_criteria")))
def test_experts(method: str, models: dict[str, Path], tmp_path: Path) -> None:
    _cut_alike(*_both(models["qwen3_moe"], tmp_path, "qwen3_moe", structure="experts", sparsity=0.25, method=method))


def test_spilled_activations_and_a_pruned_model_in_memory(models: dict[str, Path], tmp_path: Path) -> None:
    device = _device()
    common = {"method": "sparsegpt", "calibration": calibration_for("llama"), "device": device, **FLOAT32}
    secateur.prune(models["llama"], tmp_path / "whole", **common)
    secateur.prune(models["llama"], tmp_path / "spilled", activation_memory="1KB", **common)
    model = tiny_model("llama").to(device)
    secateur.prune(model, None, tokenizer=tiny_tokenizer(), **common)
    expected, own = _tensors(tmp_path / "whole"), model.state_dict()
    for key, tensor in _tensors(tmp_path / "spilled").items():
        assert torch.equal(tensor, expected[key]), key
        assert own[key].device.type == device
        assert torch.equal(own[key].cpu() == 0, tensor == 0), key


@pytest.mark.parametrize("settings", [
    {"mode": "full", "loss": "kd+lm"},
    {"mode": "full", "loss": "lm"},
    {"mode": "full", "loss": "kd+hidden"},
    {"mode": "lora", "loss": "kd"},
    {"mode": "blocks"},
    {"mode": "norms-and-biases"},
], ids=lambda settings: " ".join(settings.values()))  # fmt: skip
def test_recovery(settings: dict[str, Any], models: dict[str, Path], tmp_path: Path) -> None:
    secateur.prune(models["llama"], tmp_path / "pruned", method="magnitude", device="cpu", **FLOAT32)
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 60, encoding="utf-8")
    made = []
    for device in ("cpu", _device()):
        secateur.recover(
            tmp_path / "pruned", tmp_path / device, data=str(text), sequence_length=32, batch_size=2, tokens=512,
            device=device, verify=False, evaluate=False, compute_dtype="float32", **settings,
        )  # fmt: skip
        made.append(_tensors(tmp_path / device))
    pruned = _tensors(tmp_path / "pruned")
    for key, tensor in made[0].items():
        assert torch.equal(tensor == 0, made[1][key] == 0), key
        moved = float((tensor - pruned[key]).abs().mean())
        assert float((tensor - made[1][key]).abs().mean()) <= 0.25 * moved + 1e-6, key


@pytest.mark.parametrize("settings", [
    {"to": "factorized", "rank": 8, "weighting": "activations"},
    {"to": "moe", "experts": 4, "top_k": 2, "router": "mlp"},
    {"to": "moe", "experts": 4, "top_k": 2, "router": "similarity", "split": "activations"},
    {"to": "shared", "groups": 1},
], ids=lambda settings: " ".join(map(str, settings.values())))  # fmt: skip
def test_conversions(settings: dict[str, Any], models: dict[str, Path], tmp_path: Path) -> None:
    made = []
    for device in ("cpu", _device()):
        secateur.convert(
            models["llama"], tmp_path / device, calibration=calibration_for("llama"), device=device,
            **{**FLOAT32, **settings},
        )  # fmt: skip
        found = {}
        for file in sorted((tmp_path / device).glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                found.update({key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
        made.append(found)
    assert {key: tensor.shape for key, tensor in made[0].items()} == {k: t.shape for k, t in made[1].items()}


def test_the_whole_way(models: dict[str, Path], tmp_path: Path) -> None:
    """Prune, verify and measure; evaluate; generate; all on the accelerator, and the same words as on the CPU."""
    out = tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 60, encoding="utf-8")
    result = secateur.prune(
        models["llama"], out, calibration=str(text), samples=8, sequence_length=32, data=str(text), device=_device(),
        compute_dtype="float32",
    )  # fmt: skip
    assert result.verified
    found = [
        secateur.evaluate(out, data=str(text), sequence_length=32, samples=8, device=device).perplexity
        for device in ("cpu", _device())
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    words = [secateur.generate(out, prompt="It was", new_tokens=12, device=device) for device in ("cpu", _device())]
    assert words[0] == words[1]
