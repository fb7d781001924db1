import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur import statistics
from secateur.errors import CalibrationError
from secateur.statistics import InputStatistics


def inputs(tokens, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    return torch.randn(tokens, width, generator=generator) @ mix


def collected(x, kind="gram"):
    stats = InputStatistics(x.shape[-1], kind)
    stats.update(x)
    return stats


@pytest.mark.parametrize("width", [1, 5, 128, 129, 300])
def test_equals_the_product_in_float64(width):
    x = inputs(64, width)
    stats = collected(x)
    exact = x.double().T @ x.double()
    assert stats.tokens == 64
    torch.testing.assert_close(stats.gram.double(), exact, rtol=1e-5, atol=1e-4 * float(exact.abs().max()))
    torch.testing.assert_close(stats.sum_squares, exact.diagonal(), rtol=1e-6, atol=0)
    norms = (exact.diagonal() / 64).sqrt().float()
    torch.testing.assert_close(stats.column_norms(), norms)


def test_gram_is_exactly_symmetric_and_may_be_read_between_updates():
    stats = InputStatistics(200, "gram")
    total = torch.zeros(200, 200, dtype=torch.float64)
    for seed in range(3):
        x = inputs(50, 200, seed)
        stats.update(x)
        total += x.double().T @ x.double()
        assert torch.equal(stats.gram, stats.gram.T)
        torch.testing.assert_close(stats.gram.double(), total, rtol=1e-5, atol=1e-4 * float(total.max()))


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.booleans())
def test_parts_and_merge_equal_the_whole(lengths, read_in_between):
    x = inputs(sum(lengths), 9)
    whole = collected(x)
    parts = InputStatistics(9, "gram")
    merged = InputStatistics(9, "gram")
    for part in x.split(lengths):
        parts.update(part)
        other = collected(part)
        if read_in_between:
            assert other.gram is not None
            assert merged.gram is not None
        merged.merge(other)
    for stats in (parts, merged):
        assert stats.tokens == whole.tokens
        torch.testing.assert_close(stats.sum_squares, whole.sum_squares, rtol=1e-6, atol=0)
        torch.testing.assert_close(stats.gram, whole.gram, rtol=1e-4, atol=1e-3)


def test_large_inputs_go_in_chunks(monkeypatch):
    x = inputs(100, 6)
    whole = collected(x)
    monkeypatch.setattr(statistics, "_CHUNK", 6 * 7)
    torch.testing.assert_close(collected(x).gram, whole.gram, rtol=1e-5, atol=1e-3)
    assert collected(x).tokens == 100


def test_leading_dimensions_are_tokens():
    x = inputs(24, 8)
    assert collected(x.reshape(2, 3, 4, 8)).tokens == 24
    assert torch.equal(collected(x.reshape(4, 6, 8)).gram, collected(x).gram)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_cast_before_squaring(dtype):
    x = torch.full((10, 4), 1000.0, dtype=dtype)  # the square overflows float16
    stats = collected(x, "norms")
    assert stats.sum_squares.tolist() == [1e7 * float(x[0, 0]) ** 2 / 1e6] * 4
    assert stats.gram is None


def test_inputs_are_not_changed_and_need_no_gradient_graph():
    x = inputs(5, 4).requires_grad_()
    before = x.detach().clone()
    stats = collected(x)
    assert torch.equal(x.detach(), before)
    assert not stats.gram.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_inputs_are_refused_and_nothing_is_added(bad):
    stats = collected(inputs(8, 4))
    before = stats.gram.clone(), stats.sum_squares.clone()
    x = inputs(8, 4)
    x[3, 2] = bad
    with pytest.raises(CalibrationError, match="activations hold NaN or infinity"):
        stats.update(x)
    assert stats.tokens == 8
    assert torch.equal(stats.gram, before[0])
    assert torch.equal(stats.sum_squares, before[1])


def test_dead_inputs_are_those_that_are_always_zero():
    x = inputs(8, 4)
    x[:, 1] = 0
    x[1:, 2] = 0
    assert collected(x).dead().tolist() == [False, True, False, False]
    untouched = InputStatistics(4, "norms")
    untouched.update(torch.empty(0, 4))
    assert untouched.tokens == 0
    assert untouched.dead().all()
    assert untouched.column_norms().tolist() == [0.0] * 4


def test_factor_is_shared_until_new_inputs_arrive():
    stats = collected(inputs(20, 6))
    first = stats.factor(0.01)
    assert stats.factor(0.01) is first
    assert stats.factor(0.02) is not first
    stats.update(inputs(20, 6, seed=1))
    assert stats.factor(0.01) is not first
    with pytest.raises(ValueError, match="kind 'gram'"):
        collected(inputs(20, 6), "norms").factor(0.01)


def test_only_the_same_kind_and_width_merge():
    with pytest.raises(ValueError, match="cannot merge"):
        InputStatistics(4, "gram").merge(InputStatistics(5, "gram"))
    with pytest.raises(ValueError, match="cannot merge"):
        InputStatistics(4, "gram").merge(InputStatistics(4, "norms"))
