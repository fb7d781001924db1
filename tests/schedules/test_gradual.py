"""Gradual magnitude pruning against the formula of the paper and a naive sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import PatternError, SparsityError, UsageError
from secateur.patterns import Pattern
from secateur.schedules import make_schedule
from secateur.schedules._groups import Groups, grow, grow_nm
from secateur.schedules._ramp import cubic, window
from secateur.schedules.gradual import Gradual


@pytest.mark.parametrize(("initial", "final"), [(0.0, 0.8), (0.5, 0.9), (0.3, 0.3)])
@pytest.mark.parametrize(("start", "interval", "count"), [(0, 1, 50), (10, 100, 7), (3, 2, 40)])
def test_the_cubic_ramp_is_the_formula_of_the_paper(initial, final, start, interval, count):
    ramp = window(start or 0.0, start + count * interval, 10_000, "gradual")
    for step in range(start, start + count * interval + 1, interval):
        expected = final + (initial - final) * (1 - (step - start) / (count * interval)) ** 3
        assert cubic(initial, final, ramp.progress(step)) == pytest.approx(expected, abs=1e-12)
    assert cubic(initial, final, ramp.progress(10_000)) == final
    assert ramp.progress(0) == 0


@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_the_counts_follow_the_ramp_exactly_and_the_smallest_go(loop, scope):
    run = loop(Gradual(sparsity=0.7, begin=2, end=12, every=3, scope=scope), shapes=((5, 7), (9, 4)), steps=15)
    for step in range(1, 16):
        before = {n: p.detach().clone() for n, p in run.parameters.items()}
        changed = run.advance()
        assert changed == (step in (5, 8, 11, 12))
        if not changed:
            continue
        target = 0.7 - 0.7 * (1 - (step - 2) / 10) ** 3
        sizes = {n: p.numel() for n, p in before.items()}
        zeros = {n: int((p == 0).sum()) for n, p in run.parameters.items()}
        if scope == "global":
            assert sum(zeros.values()) == round(target * sum(sizes.values()))
        else:
            assert zeros == {n: round(target * size) for n, size in sizes.items()}
        kept = torch.cat([p.detach()[p != 0].abs() for p in run.parameters.values()])
        assert len(kept) == sum(sizes.values()) - sum(zeros.values())


def test_the_global_scope_compares_matrices_with_each_other(loop):
    large, small = torch.full((2, 4), 5.0), torch.full((3, 4), 0.5)
    run = loop(Gradual(sparsity=0.5, end=1.0, scope="global"), values=[large, small], steps=1, rate=0.0)
    run.advance()
    assert int((run.parameters["w0"] == 0).sum()) == 0
    assert int((run.parameters["w1"] == 0).sum()) == 10


@given(st.lists(st.integers(0, 3), min_size=12, max_size=12), st.integers(0, 12), st.integers(0, 4095))
@settings(max_examples=60, deadline=None)
def test_growing_is_exact_with_ties_and_never_lets_go(values, count, bits):
    score = torch.tensor(values, dtype=torch.float32).reshape(3, 4)
    pruned = torch.tensor([bool(bits >> i & 1) for i in range(12)]).reshape(3, 4)
    grown = grow(score, pruned, count)
    # Naive: pruned first, then by value, then by index.
    order = sorted(range(12), key=lambda i: (not pruned.reshape(-1)[i], values[i], i))
    expected = torch.zeros(12, dtype=torch.bool)
    expected[order[: max(count, int(pruned.sum()))]] = True
    assert torch.equal(grown.reshape(-1), expected)


@given(st.lists(st.integers(0, 3), min_size=16, max_size=16), st.integers(0, 4), st.integers(0, 15))
@settings(max_examples=60, deadline=None)
def test_growing_n_m_takes_the_groups_that_lose_least(values, done, bits):
    score = torch.tensor(values, dtype=torch.float32).reshape(2, 8)
    pruned = torch.zeros(4, 4, dtype=torch.bool)
    pruned[:, 1] = torch.tensor([bool(bits >> i & 1) for i in range(4)])
    grown = grow_nm(score, pruned.reshape(2, 8), Pattern(2, 4), done).reshape(4, 4)
    assert bool((grown | ~pruned).all())
    losses = []
    for group in range(4):
        numbers = values[4 * group : 4 * group + 4]
        going = sorted(range(4), key=lambda i: (not pruned[group][i], numbers[i], i))[:2]
        losses.append((sum(numbers[i] for i in going if not pruned[group][i]), group))
        if int(grown[group].sum()) == 2:
            assert grown[group].nonzero().flatten().tolist() == sorted(going)
        else:
            assert torch.equal(grown[group], pruned[group])
    chosen = {group for group in range(4) if int(grown[group].sum()) == 2}
    assert chosen == {group for _, group in sorted(losses)[:done]}


def test_n_m_ramps_by_groups_and_ends_in_the_pattern(loop):
    run = loop(Gradual(pattern="2:4", begin=0.0, end=8, every=2), shapes=((5, 8),), steps=10)
    for step in range(1, 11):
        run.advance()
        groups = (run.parameters["w0"].reshape(-1, 4) == 0).sum(1)
        if step % 2 == 0 and step <= 8:
            assert int((groups == 2).sum()) == round((1 - (1 - step / 8) ** 3) * 10)
            assert set(groups.tolist()) <= {0, 2}
    assert groups.tolist() == [2] * 10


def test_it_begins_at_the_zeros_the_model_has_and_keeps_them(loop):
    value = torch.randn(6, 10, generator=torch.Generator().manual_seed(1)).abs() + 1
    zeros = torch.zeros(6, 10, dtype=torch.bool)
    zeros[:, :5] = True
    value[zeros] = 0
    run = loop(Gradual(sparsity=0.8, end=1.0, every=1), values=[value], zeros={"w0": zeros}, steps=5)
    run.clear()
    for step in range(1, 6):
        run.advance()
        assert int((run.parameters["w0"] == 0).sum()) == round((0.8 - 0.3 * (1 - step / 5) ** 3) * 60)
        assert bool((run.parameters["w0"][zeros] == 0).all())


def test_groups_come_back_as_they_were_split(loop):
    run = loop(Gradual(sparsity=0.5), shapes=((3, 4), (2, 6)))
    masks = {n: torch.rand(p.shape) < 0.5 for n, p in run.parameters.items()}
    for scope in ("matrix", "global"):
        groups = Groups(run.training.matrices, scope)
        back = groups.join(groups.split(masks))
        assert all(torch.equal(back[name], masks[name]) for name in masks)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sparsity": 1.0},
        {"sparsity": -0.1},
        {"sparsity": 0.5, "begin": 0.7, "end": 0.7},
        {"sparsity": 0.5, "begin": 20, "end": 10},
        {"sparsity": 0.5, "begin": -1},
        {"sparsity": 0.5, "begin": float("nan")},
        {"sparsity": 0.5, "every": 0},
        {"sparsity": 0.5, "scope": "row"},
        {"sparsity": 0.6, "pattern": "2:4"},
        {"sparsity": 0.5, "speed": 3},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(UsageError):
        make_schedule("gradual", options)


def test_what_does_not_fit_the_training_is_refused(loop):
    with pytest.raises(UsageError, match="of 10"):
        loop(Gradual(sparsity=0.5, end=20), steps=10)
    with pytest.raises(UsageError, match="step 0 to step 0"):
        loop(Gradual(sparsity=0.5, begin=0.1, end=0.2), steps=2)
    with pytest.raises(PatternError):
        loop(Gradual(pattern="2:4"), shapes=((4, 6),))
    zeros = {"w0": torch.ones(4, 6, dtype=torch.bool)}
    with pytest.raises(SparsityError, match="sparser"):
        loop(Gradual(sparsity=0.5), zeros=zeros)
    with pytest.raises(SparsityError, match="sparser"):
        loop(Gradual(pattern="2:3"), zeros=zeros)
