"""Packed modules through the kernels: the same numbers as through PyTorch, also traced; and without the wheel."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from secateur.errors import UsageError
from secateur.packing.pack import Setting, count, entries_for, pack
from secateur.runtime import kernels, modules, ops


@pytest.fixture
def forget():
    """What was found out about the wheel is forgotten before and after."""
    for found in (kernels.find, kernels.activations):
        found.cache_clear()
    yield
    for found in (kernels.find, kernels.activations):
        found.cache_clear()


def module_of(kind="mask", bits=8, rows=48, columns=130, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    weight = torch.randn(rows, columns) * (torch.rand(rows, columns) < 0.5)
    setting = Setting(bits, 64 if bits == 4 else 0, "bfloat16" if bits == 16 else "")
    entry = entries_for(count(weight, setting), setting)[kind]
    made = modules.SparseLinear(entry, dtype, nn.Parameter(torch.randn(rows), requires_grad=False) if bias else None)
    for part, tensor in pack(weight, entry).items():
        made.register_buffer(part, tensor)
    made.check("made")
    return made


def with_and_without(made, x):
    """Outputs by the kernels and by PyTorch."""
    assert made.activations is not None
    fast = made(x)
    made.activations = None
    slow = made(x)
    made.activations = kernels.activations()
    return fast, slow


@pytest.mark.skipif(kernels.find().module is None, reason="secateur-kernels is not installed: make kernels")
class TestWithTheWheel:
    @pytest.mark.parametrize("bits", [16, 8, 4])
    @pytest.mark.parametrize("tokens", [1, 4, 5, ops.TOKENS // 2, ops.TOKENS])
    def test_outputs_are_those_of_pytorch(self, bits, tokens, forget, monkeypatch):
        monkeypatch.setenv(kernels.ACTIVATIONS, "float")
        made = module_of(bits=bits)
        fast, slow = with_and_without(made, torch.randn(2, tokens, 130) if tokens != 1 else torch.randn(1, 130))
        assert fast.shape == slow.shape
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)

    def test_rounded_activations_stay_within_their_step(self):
        made = module_of()
        x = torch.randn(3, 130)
        fast, slow = with_and_without(made, x)
        step = x.abs().amax(1, keepdim=True) / 127
        assert ((fast - slow).abs() <= 0.51 * step * made.weight.abs().sum(1) + 1e-4).all()
        assert not torch.equal(fast, slow)

    def test_gradients_go_the_way_of_pytorch(self):
        x = torch.randn(2, 130, requires_grad=True)
        made = module_of()
        made(x).sum().backward()
        torch.testing.assert_close(x.grad, made.weight.sum(0).expand(2, -1), rtol=1e-4, atol=1e-3)

    def test_operators_keep_what_they_promise(self):
        made = module_of(bits=4)
        parts = ops._parts(made.entry, made.tensors(), made.starts)
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(
            torch.ops.secateur.packed_linear.default,
            (torch.randn(3, 130), *parts, made.bias, *ops._layout(made.entry), 0),
            test_utils=tests,
        )
        torch.library.opcheck(
            torch.ops.secateur.unpack_rows.default,
            (*parts, *ops._layout(made.entry), 3, 9, torch.bfloat16),
            test_utils=tests,
        )

    def test_tracing_keeps_the_operator(self):
        made = module_of()
        x = torch.randn(2, 130)
        traced = torch.export.export(made, (x,))
        assert "secateur.packed_linear" in traced.graph_module.code
        assert torch.equal(traced.module()(x), made(x))

    def test_unknown_ways_of_activations_are_refused(self, forget, monkeypatch):
        monkeypatch.setenv(kernels.ACTIVATIONS, "int2")
        with pytest.raises(UsageError, match="int2"):
            module_of()


def test_without_the_wheel_pytorch_computes_it(forget, monkeypatch):
    monkeypatch.setitem(sys.modules, kernels.PACKAGE, None)
    made = module_of()
    assert "secateur_kernels" in kernels.find().reason or "not installed" in kernels.find().reason
    x = torch.randn(2, 130)
    torch.testing.assert_close(made(x), nn.functional.linear(x, made.weight, made.bias))


def test_a_variant_that_the_processor_lacks_is_refused_with_those_it_has(forget, monkeypatch):
    def lacking(name):
        raise ValueError("kernel variant 'avx512' is unknown, or this CPU cannot run it; it can run portable")

    monkeypatch.setattr(kernels.importlib, "import_module", lacking)
    with pytest.raises(UsageError, match="'avx512'.*cannot run it; it can run portable") as caught:
        kernels.find()
    assert caught.value.hint == "unset SECATEUR_KERNELS to take the best"


def test_a_wheel_that_cannot_be_opened_is_told_and_pytorch_computes(forget, monkeypatch):
    def broken(name):
        raise OSError("_kernels.so: cannot open shared object file")

    monkeypatch.setattr(kernels.importlib, "import_module", broken)
    assert kernels.find().reason == "secateur-kernels is broken: _kernels.so: cannot open shared object file"
    assert module_of().activations is None


@pytest.mark.parametrize("other", [{"__version__": "9.0.0", "ABI": 1}, {"__version__": "0.1.0", "ABI": 2}])
def test_a_wheel_that_does_not_fit_is_not_used(other, forget, monkeypatch):
    monkeypatch.setitem(sys.modules, kernels.PACKAGE, SimpleNamespace(**other))
    assert kernels.find().module is None
    assert other["__version__"] in kernels.find().reason
    assert module_of().activations is None
