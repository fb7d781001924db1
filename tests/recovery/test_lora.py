"""Masked adapters: the forward is that of the merged weight, gradients are autograd's, merging changes nothing."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from secateur.engine.blocks import find_structure
from secateur.errors import MissingExtraError, UnsupportedModelError
from secateur.recovery.lora import add_adapters, merge_adapters
from secateur.recovery.zeros import HeldZeros
from tests.models import calibration_for, tiny_model

RANK = 4


def pruned_model(family, dtype=torch.float32):
    model = tiny_model(family).to(dtype)
    generator = torch.Generator().manual_seed(3)
    for matrix in find_structure(model).matrices:
        weight = model.get_parameter(matrix.name)
        weight.data.masked_fill_(torch.rand(weight.shape, generator=generator) < 0.5, 0)
    return model


def adapted(family, dtype=torch.float32, seed=0):
    """A model with adapters whose product is not zero, and what is held."""
    model = pruned_model(family, dtype)
    weights = {m.name: model.get_parameter(m.name) for m in find_structure(model).matrices}
    held = HeldZeros.of(weights)
    assert len(held.pruned) == len(weights)
    wrapped = add_adapters(model, held, weights, rank=RANK, seed=seed)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name or name.endswith("bias"):
            parameter.data.normal_(0, 0.1, generator=generator)
    return wrapped, held


def layers(wrapped):
    found = {name: module for name, module in wrapped.named_modules() if type(module).__name__ == "MaskedLora"}
    assert found
    return found


def merged(layer, number):
    """The weight that the layer stands for, (out, in), spelled out in another number format."""
    base = layer.get_base_layer()
    weight = base.weight.detach().to(number)
    weight = weight.T if isinstance(base, Conv1D) else weight
    pruned = weight == 0
    a, b = (factor["default"].weight.detach().to(number) for factor in (layer.lora_A, layer.lora_B))
    return torch.where(pruned, torch.zeros_like(weight), weight + (b @ a) * layer.scaling["default"])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
def test_forward_is_that_of_the_merged_weight_to_the_bit(family):
    wrapped, _ = adapted(family)
    generator = torch.Generator().manual_seed(1)
    for name, layer in layers(wrapped).items():
        weight = merged(layer, torch.float32)
        base = layer.get_base_layer()
        assert bool((weight != (base.weight.T if isinstance(base, Conv1D) else base.weight)).any()), "adapter does work"
        x = torch.randn(2, 7, weight.shape[1], generator=generator)
        assert torch.equal(layer(x), F.linear(x, weight, base.bias)), name


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
def test_gradients_are_those_of_autograd(family):
    wrapped, _ = adapted(family)
    generator = torch.Generator().manual_seed(1)
    kinds = set()
    for name, layer in layers(wrapped).items():
        base = layer.get_base_layer()
        transposed = isinstance(base, Conv1D)
        kinds.add((transposed, base.bias is not None))
        weight = (base.weight.T if transposed else base.weight).detach().double()
        pruned = weight == 0
        x = torch.randn(2, 7, weight.shape[1], generator=generator)
        upstream = torch.randn(2, 7, weight.shape[0], generator=generator)
        ours = [x.clone().requires_grad_(), layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        gradients = torch.autograd.grad((layer(ours[0]) * upstream).sum(), ours)
        theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
        total = weight + (~pruned) * (layer.scaling["default"] * theirs[2] @ theirs[1])
        product = F.linear(theirs[0], total, None if base.bias is None else base.bias.double())
        expected = torch.autograd.grad((product * upstream).sum(), theirs)
        for got, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5, msg=name)
            assert bool(wanted.any())
    assert kinds == {"llama": {(False, False)}, "gpt2": {(True, True)}, "opt": {(False, True)}}.get(
        family, {(False, False), (False, True)}
    )


def test_gradients_under_autocast_are_close():
    wrapped, _ = adapted("llama")
    layer = next(iter(layers(wrapped).values()))
    x = torch.randn(2, 7, layer.in_features, generator=torch.Generator().manual_seed(1))
    factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    expected = torch.autograd.grad(layer(x).square().sum(), factors)
    with torch.autocast("cpu", torch.bfloat16):
        product = layer(x)
        assert product.dtype == torch.bfloat16
        loss = product.float().square().sum()
    for got, wanted in zip(torch.autograd.grad(loss, factors), expected, strict=True):
        assert got.dtype == torch.float32
        assert float((got - wanted).norm() / wanted.norm()) < 0.02


def train(wrapped, steps=6):
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    for window in calibration_for("llama", rows=1, length=24).repeat(steps, 1):
        loss = wrapped(input_ids=window[None], labels=window[None]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_merging_after_training_changes_nothing(family):
    wrapped, held = adapted(family)
    wrapped.eval()  # no dropout between the two forwards
    losses = train(wrapped)
    assert losses[-1] < losses[0] - 0.1, "the adapters learn"
    ids = calibration_for("llama", rows=3, length=16)
    with torch.no_grad():
        before = wrapped(input_ids=ids).logits
        model = merge_adapters(wrapped)
        after = model(input_ids=ids).logits
    if family == "gpt2":  # Conv1D multiplies by the other order of the two matrices
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(after, before)
    assert type(model) is type(tiny_model(family))
    assert not any("lora" in name for name, _ in model.named_parameters())
    for name, mask in held.pruned.items():
        zeros = model.get_parameter(name).detach()[mask]
        assert not bool(zeros.any()), name
        assert not bool(zeros.signbit().any()), name


def test_merging_changes_nothing_when_training_computes_in_bfloat16():
    wrapped, _ = adapted("llama")
    train(wrapped)
    batch = {"input_ids": calibration_for("llama")[:2]}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = wrapped(**batch).logits
        after = merge_adapters(wrapped)(**batch).logits
    assert torch.equal(before, after)


def test_half_precision_weights_stay_in_their_format():
    wrapped, held = adapted("llama", torch.bfloat16)
    layer = next(iter(layers(wrapped).values()))
    assert layer.lora_A["default"].weight.dtype == torch.float32
    expected = merged(layer, torch.float32)
    model = merge_adapters(wrapped)
    name = next(iter(held.pruned))
    weight = model.get_parameter(name).detach()
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, expected.bfloat16())
    assert not bool(weight[held.pruned[name]].signbit().any())


def test_a_fresh_adapter_adds_nothing_and_only_adapters_learn():
    model = pruned_model("llama")
    ids = calibration_for("llama", rows=2, length=16)
    with torch.no_grad():
        before = model(input_ids=ids).logits
    weights = {m.name: model.get_parameter(m.name) for m in find_structure(model).matrices}
    wrapped = add_adapters(model, HeldZeros.of(weights), weights, rank=RANK, seed=0)
    with torch.no_grad():
        assert torch.equal(wrapped(input_ids=ids).logits, before)
    learning = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert len(learning) == 2 * len(weights)
    assert all("lora_" in name for name in learning)


def test_start_is_decided_by_seed_and_layer():
    starts = []
    for seed in (0, 0, 1):
        torch.manual_seed(99 + len(starts))  # must not matter
        wrapped, _ = adapted("llama", seed=seed)
        starts.append([layer.lora_A["default"].weight.detach() for layer in layers(wrapped).values()])
    assert all(torch.equal(a, b) for a, b in zip(starts[0], starts[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(starts[0], starts[2], strict=True))
    same = [weight for weight in starts[0] if weight.shape == starts[0][0].shape]
    assert len(same) > 2
    assert not torch.equal(same[0], same[1])


def test_unpruned_layers_get_a_plain_sum():
    model = pruned_model("llama")
    weights = {m.name: model.get_parameter(m.name) for m in find_structure(model).matrices}
    free = next(iter(weights))
    weights[free].data.normal_()
    held = HeldZeros.of(weights)
    assert free not in held.pruned
    wrapped = add_adapters(model, held, weights, rank=RANK, seed=0)
    layer = next(iter(layers(wrapped).values()))
    assert not layer.held
    layer.lora_B["default"].weight.data.normal_()
    x = torch.randn(3, layer.in_features)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), x @ weights[free].T + 2 * (x @ a.T) @ b.T)


def test_fused_experts_get_no_adapter():
    wrapped, _ = adapted("mixtral")
    assert not any("experts" in name for name in layers(wrapped))
    experts = {name: p for name, p in wrapped.named_parameters() if "experts" in name}
    assert experts
    assert not any(parameter.requires_grad for parameter in experts.values())
    before = {name: parameter.detach().clone() for name, parameter in experts.items()}
    train(wrapped, 2)
    assert all(torch.equal(parameter, before[name]) for name, parameter in experts.items())


def test_model_without_linear_layers_is_refused():
    model = pruned_model("mixtral")
    weights = {m.name: model.get_parameter(m.name) for m in find_structure(model).matrices if "experts" in m.name}
    assert weights
    with pytest.raises(UnsupportedModelError, match="no linear layer"):
        add_adapters(model, HeldZeros.of(weights), weights, rank=RANK, seed=0)


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError) as caught:
        add_adapters(pruned_model("llama"), HeldZeros({}), {}, rank=RANK, seed=0)
    assert "secateur[recover]" in caught.value.hint
    assert caught.value.exit_code == 2
