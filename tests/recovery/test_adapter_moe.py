"""Adapters behind a shared network: the formula token by token, the identity, who is trained, and the count."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from secateur.errors import UnsupportedModelError, UsageError
from secateur.layers import adapter_moe
from secateur.layers.adapter_moe import NAME, AdapterMoe
from secateur.recovery.adapter_moe import adapter_spec, add_adapter_experts, networks_of
from secateur.training import Training
from tests.models import calibration_for, tiny_model


class Network(nn.Module):
    """A feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("top", [1, 2, 3])
def test_every_token_gets_what_the_formula_says(top):
    torch.manual_seed(0)
    network, x = Network().eval(), torch.randn(2, 5, 6)
    made = adapter_moe.build(network, {"experts": 3, "top": top, "dim": 4, "width": 6}).eval()
    assert made is network
    layer = network.get_submodule(NAME)
    assert isinstance(layer, AdapterMoe)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        found, z = network(x), network.forward(x)  # with the hook, and without
        for row in range(2):
            for token in range(5):
                logits = (layer.router @ x[row, token]).double().numpy()
                chosen = np.argsort(-logits)[:top]
                g = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
                one = z[row, token]
                wanted = sum(
                    float(share) * (one + layer.up[i] @ F.gelu(layer.down[i] @ one))
                    for share, i in zip(g, chosen, strict=True)
                )
                torch.testing.assert_close(found[row, token], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_before_training_it_is_the_model_itself_and_only_adapters_are_trained(family):
    model, ids = tiny_model(family), calibration_for("llama")[:2]
    with torch.no_grad():
        before = model(ids).logits
        count = model.num_parameters()
        add_adapter_experts(model, experts=4, top=2, dim=3, seed=0)
        assert model(ids).logits.equal(before)
    assert model.num_parameters() - count == 2 * 4 * (2 * 3 * 32 + 32)
    for step in range(2):  # the first moves U away from zero, which R and D wait for
        model(ids, labels=ids).loss.backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                assert parameter.requires_grad == (f".{NAME}." in name)
                if parameter.grad is not None:
                    assert f".{NAME}." in name
                    parameter -= parameter.grad
        trained = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        assert {name.rpartition(".")[2] for name in trained} == ({"up"} if step == 0 else {"up", "down", "router"})


def test_the_count_of_the_demo_model_is_that_of_the_formula():
    config = transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49_152, tie_word_embeddings=True,
    )  # fmt: skip
    shapes = adapter_moe.shapes(8, 64, config.hidden_size)
    assert config.num_hidden_layers * sum(torch.Size(shape).numel() for shape in shapes.values()) == 17_832_960


def test_the_same_seed_gives_the_same_start_and_another_one_another():
    routers = []
    for seed in (0, 0, 1):
        model = tiny_model("llama")
        add_adapter_experts(model, experts=4, top=2, dim=3, seed=seed)
        routers.append(model.model.layers[1].mlp.adapters.router)
    assert routers[0].equal(routers[1])
    assert not routers[0].equal(routers[2])
    spec = adapter_spec(model)
    assert spec is not None
    assert spec.modules["model.layers.1.mlp"] == {"kind": "adapter_moe", "experts": 4, "top": 2, "dim": 3, "width": 32}
    assert adapter_spec(tiny_model("llama")) is None


@pytest.mark.parametrize("family", ["opt", "mixtral", "bert"])
def test_a_model_without_a_plain_network_is_refused(family):
    with pytest.raises(UnsupportedModelError, match="nothing to put adapters behind"):
        networks_of(tiny_model(family))


def test_more_adapters_of_a_token_than_there_are_is_refused():
    with pytest.raises(UsageError, match="--top-k 5 of 4 experts"):
        Training(mode="adapter-moe", experts=4, top_k=5)
    assert Training(top_k=64).top_k == 64  # elsewhere it counts logits
