import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import WeightValueError
from secateur.methods import _radix
from secateur.methods.magnitude import Magnitude
from secateur.plugins import Target
from tests.oracles.masks import keep_all_but_lowest

values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1 + 2**-23, 1e-45, 3e38]) | st.floats(
    width=32, allow_nan=False, allow_infinity=False
)
models = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 5)).flatmap(
        lambda shape: st.lists(values, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]).map(
            lambda flat: torch.tensor(flat, dtype=torch.float32).reshape(shape)
        )
    ),
    min_size=1,
    max_size=4,
)


def prune(model, sparsity):
    method = Magnitude(scope="global")
    counts = method.plan(list(model), model.__getitem__, sparsity)
    return {
        name: method.solve(weight, None, Target(sparsity, count=counts[name]), generator=torch.Generator()).mask
        for name, weight in model.items()
    }


@settings(deadline=None)
@given(models, st.floats(0, 0.999))
def test_equals_one_sort_over_all_matrices(matrices, sparsity):
    model = {f"m{i}": weight for i, weight in enumerate(matrices)}
    everything = torch.cat([weight.abs().flatten() for weight in matrices]).tolist()
    expected = keep_all_but_lowest(everything, round(sparsity * len(everything)))
    found = torch.cat([mask.flatten() for mask in prune(model, sparsity).values()])
    assert found.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_matrices_in_chunks(monkeypatch, dtype):
    monkeypatch.setattr(_radix, "_CHUNK", 1000)
    generator = torch.Generator().manual_seed(0)
    model = {f"m{i}": (torch.randn(60, 50 + i, generator=generator) * 4.0**i).to(dtype) for i in range(4)}
    counts = Magnitude(scope="global").plan(list(model), model.__getitem__, 0.5)
    total = sum(weight.numel() for weight in model.values())
    assert sum(counts.values()) == round(0.5 * total)
    everything = torch.cat([weight.float().abs().flatten() for weight in model.values()])
    order = everything.argsort(stable=True)[: round(0.5 * total)]
    owner = torch.cat([torch.full((weight.numel(),), i) for i, weight in enumerate(model.values())])
    assert list(counts.values()) == owner[order].bincount(minlength=4).tolist()


def test_each_matrix_is_loaded_twice_and_let_go():
    loads = []

    def load(name):
        loads.append(name)
        return torch.full((3, 3), float(ord(name)))

    assert Magnitude(scope="global").plan("ab", load, 0.5) == {"a": 9, "b": 0}
    assert loads == ["a", "b", "a", "b"]


def test_other_scopes_need_no_plan():
    def load(name):
        raise AssertionError("nothing is loaded")

    for scope in ("matrix", "row"):
        assert Magnitude(scope=scope).plan(["a"], load, 0.5) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(bad):
    model = {"good.weight": torch.rand(2, 2), "bad.weight": torch.tensor([[1.0, bad]])}
    with pytest.raises(WeightValueError, match=r"bad\.weight holds NaN or infinity"):
        Magnitude(scope="global").plan(list(model), model.__getitem__, 0.5)
