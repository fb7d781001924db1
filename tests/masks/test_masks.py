import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur import masks
from secateur.errors import WeightValueError
from tests.oracles import masks as oracle


@st.composite
def scores(draw, max_rows=5, max_columns=12, multiple_of=1):
    """Matrices with many ties, zeros of both signs and infinities."""
    rows = draw(st.integers(1, max_rows))
    columns = draw(st.integers(1, max_columns)) * multiple_of
    value = st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.0, 1e-40, float("inf")]) | st.floats(width=32, allow_nan=False)
    values = draw(st.lists(value, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(values, dtype=torch.float32).reshape(rows, columns)


@given(scores(), st.data())
def test_matrix_mask_equals_a_sort_by_score_and_index(score, data):
    k = data.draw(st.integers(0, score.numel()))
    mask = masks.lowest_of_matrix(score, k)
    assert torch.equal(mask, oracle.of_matrix(score, k))
    assert int((~mask).sum()) == k


@given(scores(), st.data())
def test_row_mask_equals_a_sort_of_each_row(score, data):
    k = data.draw(st.integers(0, score.shape[1]))
    mask = masks.lowest_per_row(score, k)
    assert torch.equal(mask, oracle.per_row(score, k))
    assert ((~mask).sum(dim=1) == k).all()


@pytest.mark.parametrize("group", [2, 3, 4, 8, 9, 16])
@given(st.data())
def test_group_mask_equals_a_sort_of_each_group(group, data):
    score = data.draw(scores(max_rows=3, max_columns=3, multiple_of=group))
    keep = data.draw(st.integers(1, group - 1))
    mask = masks.lowest_nm(score, keep, group)
    assert torch.equal(mask, oracle.per_group(score, keep, group))
    assert (mask.reshape(-1, group).sum(dim=1) == keep).all()


@given(scores(), st.data())
def test_column_mask_is_the_row_mask_turned(score, data):
    k = data.draw(st.integers(0, score.shape[0]))
    assert torch.equal(masks.lowest_of_columns(score, k), oracle.per_row(score.t(), k).t())


@given(scores(), st.data())
def test_selection_by_sample_finds_the_same_threshold(score, data):
    flat = score.flatten()
    k = data.draw(st.integers(1, len(flat)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "_SAMPLED_SELECTION", 1)
        patch.setattr(masks, "_SAMPLE", 3)
        threshold, below = masks._kth_smallest(flat, k)
    assert threshold == flat.sort().values[k - 1]
    assert below == int((flat < threshold).sum())


def _large(kind):
    generator = torch.Generator().manual_seed(1)
    n = 300 * 256
    if kind == "normal":
        return torch.randn(n, generator=generator).abs()
    if kind == "sorted":
        return torch.arange(n, dtype=torch.float32).flip(0)
    if kind == "zeros":
        return torch.randn(n, generator=generator).abs() * (torch.rand(n, generator=generator) > 0.3)
    if kind == "one value":
        return torch.full((n,), 0.25)
    # Periodic with the step of the sample, so that the sample sees nothing but the ones.
    step = max(1, n // masks._SAMPLE) | 1
    values = torch.rand(n, generator=generator) + 2
    values[::step] = 1.0
    return values


@pytest.mark.parametrize("kind", ["normal", "sorted", "zeros", "one value", "misleading"])
@pytest.mark.parametrize("share", [1e-5, 0.1, 0.5, 0.7, 0.99999])
def test_large_matrix_has_the_exact_count_and_ties_by_index(kind, share):
    score = _large(kind).reshape(300, 256)
    k = round(share * score.numel())
    order = score.flatten().argsort(stable=True)
    expected = torch.ones(score.numel(), dtype=torch.bool)
    expected[order[:k]] = False
    assert torch.equal(masks.lowest_of_matrix(score, k), expected.reshape(score.shape))


def test_works_on_a_turned_matrix():
    score = torch.rand(7, 5).t()
    assert torch.equal(masks.lowest_of_matrix(score, 11), oracle.of_matrix(score, 11))
    assert torch.equal(masks.lowest_per_row(score, 3), oracle.per_row(score, 3))


@pytest.mark.parametrize("position", [0, 7, 15])
def test_nan_is_refused(position):
    score = torch.rand(4, 4)
    score.view(-1)[position] = float("nan")
    for function in (masks.lowest_of_matrix, masks.lowest_per_row, masks.lowest_of_columns):
        with pytest.raises(WeightValueError, match="NaN"):
            function(score, 1)
    with pytest.raises(WeightValueError):
        masks.lowest_nm(score, 2, 4)


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="5 zeros do not fit among 4"):
        masks.lowest_per_row(torch.rand(2, 4), 5)
    with pytest.raises(ValueError, match="do not divide"):
        masks.lowest_nm(torch.rand(2, 6), 2, 4)


def test_zero_count_rounds_a_half_to_even():
    assert [masks.zero_count(0.5, n) for n in (1, 2, 3, 5, 7)] == [0, 1, 2, 2, 4]
    assert masks.zero_count(0.7, 10) == 7


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(any), st.data())
def test_split_count_adds_up_and_fits(sizes, data):
    count = data.draw(st.integers(0, sum(sizes)))
    shares = masks.split_count(count, sizes)
    assert sum(shares) == count
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
