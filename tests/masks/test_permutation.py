"""The order of columns in which an N:M pattern keeps most: against brute force, and never worse than the given one."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.masks import lowest_nm
from secateur.patterns import UNSTRUCTURED, Pattern
from secateur.permutation import best_order, kept_share


def saliency_of(columns: int, rows: int, seed: int, spread: float = 1.0) -> Tensor:
    """Columns of different sizes, (columns, rows)."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (spread * torch.randn(columns, 1, generator=generator)).exp()
    return torch.randn(columns, rows, generator=generator).abs() * sizes


def kept(saliency: Tensor, order: Tensor, pattern: Pattern) -> float:
    """What the mask of an ordinary run keeps, in float64."""
    score = saliency[order].t().double()
    return float(score[lowest_nm(score, pattern.keep, pattern.group)].sum())


@pytest.mark.parametrize(("columns", "pattern"), [(8, Pattern(2, 4)), (6, Pattern(1, 3)), (8, Pattern(1, 2))])
@pytest.mark.parametrize("seed", range(4))
def test_few_columns_are_divided_in_the_best_way(columns: int, pattern: Pattern, seed: int) -> None:
    saliency = saliency_of(columns, 5, seed)
    found = kept(saliency, best_order(saliency, pattern), pattern)
    every = itertools.permutations(range(columns)) if columns == 6 else _divisions(columns, pattern.group)
    assert found == pytest.approx(max(kept(saliency, torch.tensor(one), pattern) for one in every), rel=1e-5)


def _divisions(columns: int, size: int) -> list[tuple[int, ...]]:
    """Orders of all columns, one for each way to divide them into groups."""

    def divide(left: frozenset[int]) -> list[tuple[int, ...]]:
        if not left:
            return [()]
        first = min(left)
        return [
            (first, *others, *rest)
            for others in itertools.combinations(sorted(left - {first}), size - 1)
            for rest in divide(left - {first, *others})
        ]

    return divide(frozenset(range(columns)))


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(3, 4), Pattern(1, 2), Pattern(2, 5)]),
    st.integers(1, 9), st.integers(1, 30), st.integers(0, 1000), st.sampled_from([0.0, 1.0, 4.0]),
)  # fmt: skip
def test_it_is_an_order_and_never_worse(pattern: Pattern, groups: int, rows: int, seed: int, spread: float) -> None:
    saliency = saliency_of(groups * pattern.group, rows, seed, spread)
    before = saliency.clone()
    order = best_order(saliency, pattern)
    assert torch.equal(saliency, before)
    assert order.sort().values.tolist() == list(range(len(saliency)))
    assert torch.equal(order, best_order(saliency, pattern))
    given_order = torch.arange(len(saliency))
    assert kept(saliency, order, pattern) >= kept(saliency, given_order, pattern)
    share = kept(saliency, order, pattern) / float(saliency.double().sum())
    assert kept_share(saliency, order, pattern) == pytest.approx(share, rel=1e-5)


def test_the_search_finds_columns_that_get_in_each_others_way() -> None:
    # Groups of four equal columns, each alone with its rows: dealing them out keeps all, the given order half.
    saliency = torch.eye(16).repeat_interleave(4, dim=0)
    order = best_order(saliency, Pattern(2, 4))
    assert kept_share(saliency, torch.arange(64), Pattern(2, 4)) == 0.5
    assert kept_share(saliency, order, Pattern(2, 4)) == 1.0


def test_exchanges_are_better_than_dealing_out_alone() -> None:
    saliency = saliency_of(96, 40, 3)
    turns = saliency.sum(dim=1).argsort(descending=True).reshape(4, -1)
    turns[1::2] = turns[1::2].flip(1)
    pattern = Pattern(2, 4)
    assert kept(saliency, best_order(saliency, pattern), pattern) > kept(saliency, turns.t().reshape(-1), pattern)


@pytest.mark.parametrize("saliency", [torch.zeros(32, 5), torch.ones(32, 5), saliency_of(4, 9, 0)])
def test_nothing_moves_where_nothing_can_be_gained(saliency: Tensor) -> None:
    assert torch.equal(best_order(saliency, Pattern(2, 4)), torch.arange(len(saliency)))


def test_a_search_on_some_of_the_rows_does_not_lose_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.permutation.WORK", 1)
    monkeypatch.setattr("secateur.permutation._AT_ONCE", 64)
    saliency = saliency_of(64, 60, 1)
    pattern = Pattern(2, 4)
    assert kept(saliency, best_order(saliency, pattern), pattern) > kept(saliency, torch.arange(64), pattern)


@pytest.mark.parametrize("pattern", [UNSTRUCTURED, Pattern(2, 4)])
def test_what_does_not_divide_is_refused(pattern: Pattern) -> None:
    with pytest.raises(ValueError, match="do not divide"):
        best_order(torch.ones(6, 3), pattern)
