"""Inputs that may change places: in stock models the outputs stay the same; what is not free is not found."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.engine.blocks import find_structure
from secateur.engine.opening import open_checkpoint
from secateur.engine.permute import FreeChannels, permuted
from secateur.engine.skeleton import tensors_of
from secateur.patterns import Pattern
from secateur.structured.free_channels import Found, find_free_channels, try_block
from tests.models import calibration_for, save_tiny, tiny_model


def found_in(folder: Path, pattern: Pattern, block: str | None = None) -> Found:
    with ExitStack() as stack:
        opened = open_checkpoint(folder, stack)
        names = [one.name for one in opened.structure.matrices if block is None or one.name.startswith(block)]
        return find_free_channels(opened.model, opened.structure, opened.binding, opened.reader, names, pattern)


def all_of(found: Found) -> list[FreeChannels]:
    return [free for every in found.free.values() for free in every]


def random_orders(free: FreeChannels, seed: int) -> Tensor:
    sets, channels, _ = free.inputs.shape
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(channels, generator=generator) for _ in range(sets)])


@pytest.mark.parametrize(
    ("family", "consumers"),
    [
        ("llama", {"self_attn.o_proj", "mlp.down_proj"}),
        ("gpt2", {"attn.c_proj", "mlp.c_proj"}),
        ("phi3", {"self_attn.o_proj", "mlp.down_proj"}),
        ("bloom", {"self_attention.dense", "mlp.dense_4h_to_h"}),
        ("bert", {"attention.output.dense", "output.dense"}),
        ("t5", {"layer.0.SelfAttention.o", "layer.1.EncDecAttention.o", "layer.1.DenseReluDense.wo",
                "layer.2.DenseReluDense.wo"}),
    ],
)  # fmt: skip
def test_the_model_is_the_same_in_another_order(family: str, consumers: set[str], tmp_path: Path) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(tmp_path / "model")
    found = found_in(tmp_path / "model", Pattern(2, 4))
    blocks = {block.index: block.name for block in find_structure(model).blocks}
    names = {
        free.consumer.removeprefix(f"{blocks[index]}.").removesuffix(".weight")
        for index, every in found.free.items() for free in every
    }  # fmt: skip
    assert names == consumers
    ids = calibration_for(family, rows=2)
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if family == "t5" else {"input_ids": ids}
    with torch.no_grad():
        before = model(**inputs).logits
        state = dict(model.named_parameters())
        orders = [(free, random_orders(free, number)) for number, free in enumerate(all_of(found))]
        made = permuted(state, orders)
        assert any(not torch.equal(made[name], state[name]) for name in made if name.endswith("bias")) or family in (
            "llama", "phi3", "t5",
        )  # fmt: skip
        for name, tensor in made.items():
            state[name].copy_(tensor)
        after = model(**inputs).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))


def test_an_order_of_the_inputs_and_one_of_the_channels_say_the_same(tmp_path: Path) -> None:
    found = found_in(save_tiny(tmp_path / "model", "llama"), Pattern(2, 4))
    for number, free in enumerate(all_of(found)):
        order = random_orders(free, number)
        width = free.inputs.numel()
        inputs = free.order_of_inputs(order, width)
        assert inputs.sort().values.tolist() == list(range(width))
        assert torch.equal(free.order_of_channels(inputs), order)


def test_what_is_left_is_told_with_its_reason(tmp_path: Path) -> None:
    found = found_in(save_tiny(tmp_path / "mixture", "qwen3_moe"), Pattern(2, 4))
    assert "stacked experts" in found.left["mlp.experts.down_proj"]
    assert "no other order" in found.left["self_attn.q_proj"]
    assert len(found.lines()) == 3
    folder = save_tiny(tmp_path / "llama", "llama", intermediate_size=64)
    found = found_in(folder, Pattern(8, 16), "model.layers.1.")
    assert found.consumers == ["model.layers.1.mlp.down_proj.weight"]
    assert "heads of 8 values" in found.left["self_attn.o_proj"]


def test_experts_that_no_token_came_to_are_told(tmp_path: Path) -> None:
    found = found_in(save_tiny(tmp_path / "model", "switch"), Pattern(2, 4))
    unseen = {name for name, reason in found.left.items() if "no token" in reason}
    assert unseen
    assert all(".experts." in name for name in unseen)
    assert any(".experts." in consumer for consumer in found.consumers)


class Block(nn.Module):
    """A feed-forward network on a residual stream, with something that the order of its neurons may hang on."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.kind = kind
        self.scale = nn.Parameter(torch.rand(16) + 0.5)
        self.beside = nn.Linear(16, 8)

    def forward(self, x: Tensor, shared: dict[str, Tensor] | None = None) -> Tensor:
        neurons = torch.relu(self.up(x))
        if self.kind == "scale":
            neurons = neurons * self.scale
        if self.kind == "handed on" and shared is not None:
            shared["neurons"] = neurons
        made = x + self.down(neurons)
        return made + self.beside(neurons) if self.kind == "two readers" else made


class Row(nn.Module):
    """Two of them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(kind), Block(kind)])


@pytest.mark.parametrize("kind", ["plain", "scale", "handed on", "two readers"])
def test_neurons_whose_order_something_else_knows_are_not_free(kind: str) -> None:
    torch.manual_seed(0)
    model = Row(kind)
    block = find_structure(model).blocks[0]
    module = model.get_submodule(block.name)
    call: tuple[tuple[Any, ...], dict[str, Any]] = (torch.randn(1, 12, 8),), {"shared": {}}
    tensors = {name: tensor.detach() for name, tensor in tensors_of(module, block.name).items()}
    with torch.no_grad():
        found = try_block(block, module, model, call, tensors).free
    assert [free.consumer for free in found] == (["layers.0.down.weight"] if kind == "plain" else [])
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in tensors_of(module, block.name).items())
