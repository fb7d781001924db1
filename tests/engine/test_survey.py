"""What allocation rules see of a model: against hooks and autograd on the whole model in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import secateur
from secateur.allocation import owl
from secateur.engine.blocks import find_structure
from secateur.engine.fisher import output_gradients
from secateur.errors import UnsupportedModelError
from secateur.progress import Reporter
from tests.models import calibration_for, save_tiny, tiny_model


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_gradients_of_outputs_are_those_of_autograd(family: str) -> None:
    model, ids = tiny_model(family), calibration_for(family, rows=2, length=12)
    specs = find_structure(model).matrices
    found = output_gradients(model, specs, [row[None] for row in ids], Reporter())
    assert all(parameter.grad is None for parameter in model.parameters())
    model = tiny_model(family)
    sums = {spec.name: torch.zeros(spec.out_features) for spec in specs}
    for row in ids:
        kept: dict[str, torch.Tensor] = {}
        handles = [
            model.get_submodule(spec.module).register_forward_hook(
                lambda module, inputs, output, kept=kept, name=spec.name: kept.__setitem__(name, output)
            )
            for spec in specs
        ]
        loss = 11 * F.cross_entropy(model(input_ids=row[None]).logits[0, :-1], row[1:])
        for name, gradient in zip(kept, torch.autograd.grad(loss, list(kept.values())), strict=True):
            sums[name] += gradient[0].square().sum(dim=0)
        for handle in handles:
            handle.remove()
    assert set(found) == set(sums)
    for name, total in sums.items():
        torch.testing.assert_close(found[name], total / 24, rtol=1e-4, atol=1e-9)


def test_stacked_experts_have_none() -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(UnsupportedModelError, match="stacked experts"):
        output_gradients(model, find_structure(model).matrices, [], Reporter())


def test_norms_are_those_of_the_dense_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, ids = save_tiny(tmp_path / "model", "llama"), calibration_for("llama")
    model, squares, seen = tiny_model("llama"), {}, []
    structure = find_structure(model)
    for spec in structure.matrices:
        model.get_submodule(spec.module).register_forward_hook(
            lambda module, inputs, output, name=spec.name: squares.__setitem__(name, inputs[0].square().mean((0, 1)))
        )
    with torch.no_grad():
        model(ids)
    monkeypatch.setattr(owl.Owl, "measure", lambda self, look: seen.append(look) or look.weight)
    secateur.prune(
        folder, tmp_path / "out", method="magnitude", allocation="owl", sparsity=0.5, calibration=ids,
        compute_dtype="float32", verify=False, evaluate=False,
    )  # fmt: skip
    assert len(seen) == len(structure.matrices)
    weights = dict(model.named_parameters())
    for look in seen:
        name = next(name for name, weight in weights.items() if torch.equal(weight, look.weight))
        torch.testing.assert_close(look.stats.column_norms(), squares[name].sqrt(), rtol=1e-3, atol=1e-5)
