"""Held zeros: after every step +0.0, in gradients and moments nothing, and what is not pruned is free."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.errors import VerificationError
from secateur.recovery.zeros import PRUNED_SHARE, HeldZeros


def small_model(dtype=torch.float32, pattern="half"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).to(dtype)
    for layer in (model[0], model[2]):
        weight = layer.weight.data
        if pattern == "2:4":
            order = weight.float().abs().view(-1, 4).argsort(-1)
            weight.view(-1, 4).scatter_(-1, order[:, :2], 0)
        else:
            weight[torch.rand(weight.shape) < 0.5] = 0
    return model


def weights_of(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 2}


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=5.0),
    "sgd, momentum and decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw and decay": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}


@pytest.mark.parametrize("pattern", ["half", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_are_zero_after_each_step(name, accumulation, dtype, pattern):
    model = small_model(dtype, pattern)
    held = HeldZeros.of(weights_of(model))
    count = len(held)
    masks = {key: mask.clone() for key, mask in held.pruned.items()}
    before = {key: weight.detach().clone() for key, weight in weights_of(model).items()}
    optimizer = OPTIMIZERS[name](model.parameters())
    handles = held.watch_gradients(model)
    for step in range(4):
        for part in range(accumulation):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(10 * step + part)).to(dtype)
            model(x).float().square().mean().backward()
            for key, weight in weights_of(model).items():
                assert not bool(weight.grad[masks[key]].any())
                assert bool(weight.grad[~masks[key]].any())
        free = {name: ~masks[name] if name in masks else slice(None) for name, _ in model.named_parameters()}
        kept = sum(float(p.grad.float()[free[name]].square().sum()) for name, p in model.named_parameters()) ** 0.5
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        assert float(norm) == pytest.approx(kept, rel=0.02), "clipping sees kept weights only"
        optimizer.step()
        optimizer.zero_grad(set_to_none=bool(step % 2))
        held.clear_weights(model)
        for key, weight in weights_of(model).items():
            zeros = weight.detach()[masks[key]]
            assert not bool(zeros.any())
            assert not bool(zeros.signbit().any())
            moments = [value for value in optimizer.state[weight].values() if getattr(value, "ndim", 0) == 2]
            assert all(not bool(moment[masks[key]].any()) for moment in moments)
    assert held.check(weights_of(model)) == count
    for key, weight in weights_of(model).items():
        assert float((weight.detach() != before[key])[~masks[key]].float().mean()) > 0.5, "kept weights learn"
        if pattern == "2:4":
            assert bool(((weight.detach().view(-1, 4) == 0).sum(-1) == 2).all())
    for handle in handles:
        handle.remove()
    model(torch.randn(8, 16).to(dtype)).float().square().mean().backward()
    assert any(bool(weight.grad[masks[key]].any()) for key, weight in weights_of(model).items()), "the watch is over"


def test_clear_gradients_by_hand():
    model = small_model()
    held = HeldZeros.of(weights_of(model))
    held.clear_gradients(model)  # there are none yet
    model(torch.randn(8, 16)).square().mean().backward()
    held.clear_gradients(model)
    for key, weight in weights_of(model).items():
        assert not bool(weight.grad[held.pruned[key]].any())
        assert bool(weight.grad[~held.pruned[key]].any())


def test_clearing_repairs_negative_zeros_and_nan():
    model = small_model()
    held = HeldZeros.of(weights_of(model))
    for key, weight in weights_of(model).items():
        weight.data[held.pruned[key]] = -0.0
    assert held.check(weights_of(model)) == len(held)
    held.clear_weights(model)
    assert not any(bool(w.detach()[held.pruned[k]].signbit().any()) for k, w in weights_of(model).items())
    for key, weight in weights_of(model).items():
        weight.data[held.pruned[key]] = float("nan")
    held.clear_weights(model)
    assert held.check(weights_of(model)) == len(held)


def test_chance_zeros_are_not_held():
    weight = torch.ones(100, 100)
    few = round(PRUNED_SHARE * weight.numel()) - 1
    weight.view(-1)[:few] = 0
    assert not HeldZeros.of({"w": weight}).pruned
    weight.view(-1)[few] = 0
    held = HeldZeros.of({"w": weight})
    assert len(held) == few + 1
    assert torch.equal(held.pruned["w"], weight == 0)
    assert not HeldZeros.of({"w": torch.ones(3, 3)}).pruned


def test_a_filled_zero_is_found_and_its_parameter_named():
    model = small_model()
    held = HeldZeros.of(weights_of(model))
    model[2].weight.data[held.pruned["2.weight"].nonzero()[0].tolist()[0]] = 1.0
    with pytest.raises(VerificationError, match=r"2\.weight") as caught:
        held.check(weights_of(model))
    assert caught.value.exit_code == 3


def test_nan_in_place_of_a_zero_is_found():
    model = small_model()
    held = HeldZeros.of(weights_of(model))
    model[0].weight.data[held.pruned["0.weight"]] = float("nan")
    with pytest.raises(VerificationError, match=r"0\.weight"):
        held.check(weights_of(model))
