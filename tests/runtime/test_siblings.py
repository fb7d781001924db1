"""Matrices with one input are computed together: which they are is found by watching, and no bit changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from secateur.packing.pack import Setting, count, entries_for, pack
from secateur.runtime import kernels, ops
from secateur.runtime.modules import SparseLinear
from secateur.runtime.siblings import introduce
from secateur.verbs.export import export
from tests.models import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(kernels.find().module is None, reason="secateur-kernels is not installed: make kernels")


def made(rows=48, columns=130, kind="mask", bits=8, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    if kind == "2:4":
        weight.view(rows, -1, 4)[..., 1:3] = 0
    if kind == "mask":
        weight *= torch.rand(rows, columns, generator=generator) < 0.5
    setting = Setting(bits, 64 if bits == 4 else 0, "bfloat16" if bits == 16 else "")
    entry = entries_for(count(weight, setting), setting)[kind]
    added = nn.Parameter(torch.randn(rows, generator=generator), requires_grad=False) if bias else None
    module = SparseLinear(entry, torch.float32, added)
    for part, tensor in pack(weight, entry).items():
        module.register_buffer(part, tensor)
    module.check("made")
    return module


class Attention(nn.Module):
    """Three readers of one input, and one of another with as many columns."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (made(seed=seed) for seed in range(3))
        self.o = made(rows=20, seed=3)
        introduce(self)

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x), self.o(x + 1)


@pytest.fixture
def together(monkeypatch):
    """The sizes of the groups that were computed together, in order."""
    calls = []
    real = ops.linear_many

    def counted(modules, inputs):
        calls.append([id(module) for module in modules])
        return real(modules, inputs)

    monkeypatch.setattr(ops, "linear_many", counted)
    return calls


def alone(module):
    """A copy whose matrices know nothing of each other."""
    other = copy.deepcopy(module)
    for part in other.modules():
        if isinstance(part, SparseLinear):
            part.siblings = None
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, ops.TOKENS])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_one_call_gives_the_bits_of_several(bits, tokens, dtype):
    modules = [
        made(33, 132, "mask", bits, bias=True), made(7, 132, "2:4", bits, seed=1), made(50, 132, "dense", bits, seed=2),
        made(5, 132, "mask", 8, seed=4),
    ]  # fmt: skip
    x = torch.randn(1, tokens, 132, generator=torch.Generator().manual_seed(5)).to(dtype)
    found = ops.linear_many(modules, x)
    for module, one in zip(modules, found, strict=True):
        assert torch.equal(one, module(x))
        assert one.is_contiguous()


def test_who_shares_an_input_is_seen_at_the_first_token(together):
    model = Attention()
    group = [id(model.q), id(model.k), id(model.v)]
    with torch.inference_mode():
        for token in range(4):
            x = torch.randn(1, 130, generator=torch.Generator().manual_seed(token))
            assert all(torch.equal(ours, own) for ours, own in zip(model(x), alone(model)(x), strict=True))
    assert together == [group] * 3


def test_long_inputs_and_inputs_with_gradients_are_not_taken_together(together):
    model = Attention()
    for _ in range(3):
        model(torch.ones(ops.TOKENS + 1, 130))
        model(torch.ones(1, 130, requires_grad=True))
    assert not together


class Changing(nn.Module):
    """Changes its input between two readers, from a call on."""

    def __init__(self, first):
        super().__init__()
        self.q, self.k = made(seed=0), made(seed=1)
        self.first, self.calls = first, 0
        introduce(self)

    def forward(self, x):
        x = x.clone()
        q = self.q(x)
        if self.calls >= self.first:
            x.mul_(2)
        self.calls += 1
        return q, self.k(x)


@pytest.mark.parametrize(("first", "mode"), [(0, torch.inference_mode), (3, torch.no_grad)])
def test_an_input_that_changes_in_between_is_noticed(first, mode, together):
    model = Changing(first)
    apart = alone(model)
    with mode():
        for token in range(8):
            x = torch.randn(1, 130, generator=torch.Generator().manual_seed(token))
            assert all(torch.equal(ours, own) for ours, own in zip(model(x), apart(x), strict=True))
    assert len(together) == (0 if first == 0 else 2 + 4)  # then the group is given up


def test_a_group_of_which_not_all_are_asked_any_more_is_given_up(together):
    model = Attention()
    with torch.inference_mode():
        for _ in range(3):
            model(torch.ones(1, 130))
        for _ in range(9):
            model.q(torch.ones(1, 130))
    assert len(together) == 2 + 4


def test_a_copy_computes_with_its_own_weights():
    model = Attention()
    x = torch.ones(1, 130)
    with torch.inference_mode():
        for _ in range(2):
            before = model(x.clone())
        other = copy.deepcopy(model)
        other.k.scales.mul_(2)
        y = x.clone()
        found = other(y)
        assert torch.equal(found[1], before[1] * 2)
        assert all(torch.equal(a, b) for a, b in zip(model(x.clone()), before, strict=True))


def test_what_is_traced_does_not_depend_on_what_was_computed_before():
    model = Attention()
    with torch.no_grad():
        for _ in range(3):
            wanted = model(torch.ones(1, 130))
    traced = torch.export.export(model, (torch.ones(1, 130),))
    assert traced.graph_module.code.count("packed_linear.default") == 4
    assert all(torch.equal(a, b) for a, b in zip(traced.module()(torch.ones(1, 130)), wanted, strict=True))


@pytest.mark.parametrize(
    ("family", "groups"),
    [("llama", {"qkv", "gateup"}), ("qwen2", {"qkv", "gateup"}), ("bert", {"querykeyvalue"}), ("gpt2", set())],
)
def test_groups_of_real_models(family, groups, tmp_path, together):
    model = tiny_model(family)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "layer" in name:
                weight[weight.abs() < 0.05] = 0
    model.to(torch.bfloat16).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    export(tmp_path / "m", tmp_path / "out", format="sparse", bits=8, force=True, verify=False)
    ours = type(model).from_pretrained(tmp_path / "out", dtype="auto").eval()
    own = alone(ours)
    ids = torch.arange(3, 9)[None]
    with torch.inference_mode():
        for place in range(1, 5):
            assert torch.equal(ours(ids[:, :place]).logits, own(ids[:, :place]).logits)
        if ours.can_generate():
            asked = {"max_new_tokens": 6, "do_sample": False}
            assert torch.equal(ours.generate(ids, **asked), own.generate(ids, **asked))
    names = {id(module): name.rpartition(".")[2].split("_")[0] for name, module in ours.named_modules()}
    assert {"".join(names[one] for one in call) for call in together} == groups
