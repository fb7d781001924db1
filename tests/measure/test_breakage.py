"""What breaks: identities, exact accounts, and damage of a text that is what its name says."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.measure.breakage import CLEAN, Window, changes, conditions, distributions, most_broken, sentences
from secateur.measure.corruptions import CORRUPTIONS, align, corrupt
from secateur.measure.token_states import StateReader
from secateur.report_result import Condition
from tests.models import calibration_for, tiny_model

TEXT = "The quick brown fox jumps over the lazy dog while SEVEN wizards brew   some potion,\nslowly. " * 6


def windows_of(dense, pruned, *, names=(CLEAN, "typos")):
    """Two windows a condition, the corrupted ones with a token left out and one replaced."""
    readers = StateReader(dense), StateReader(pruned)
    found = []
    for part, clean in enumerate(calibration_for("llama", rows=2, length=30)):
        for name in names:
            tokens = clean if name == CLEAN else torch.cat([clean[:9], torch.tensor([3]), clean[11:]])
            other, _ = readers[1](tokens)
            own, (shortened,) = readers[0](tokens, [other.length])
            found.append(Window(name, part, tokens, own, other, shortened))
    return found


@pytest.fixture(scope="module")
def pair():
    dense, pruned = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        for name, weight in pruned.named_parameters():
            if "mlp" in name:
                weight[weight.abs() < 0.1] = 0
    return windows_of(dense, pruned)


def test_a_model_against_itself_is_exactly_zero():
    windows = windows_of(tiny_model("llama"), tiny_model("llama"))
    assert all(not values.any() for values in changes(windows).values())
    for row in conditions(windows):
        assert row.dense_loss == row.pruned_loss
        assert (row.lost, row.gained, row.difference_stderr) == (0, 0, 0)
        assert row.dense_damage == row.pruned_damage
    for name in (CLEAN, "typos"):
        for spread in distributions(windows, name):
            assert spread.change == [0.0] * 5
            assert spread.dense == spread.pruned
            assert spread.dense_counts == spread.pruned_counts
    assert most_broken(windows, str) == []
    assert "no difference in loss is shown" in sentences(conditions(windows), distributions(windows, CLEAN))[0]


def test_the_two_parts_add_up_to_the_difference(pair):
    for row in conditions(pair):
        assert row.length_part + row.direction_part == pytest.approx(row.pruned_loss - row.dense_loss)
        assert row.dense_right - row.lost + row.gained == pytest.approx(row.pruned_right)


def test_every_token_is_counted_once_and_quantiles_are_numpys(pair):
    import numpy as np

    for spread in distributions(pair, "typos"):
        values = torch.cat([getattr(w.pruned, spread.quantity) for w in pair if w.condition == "typos"])
        assert sum(spread.pruned_counts) == sum(spread.dense_counts) == len(values)
        assert spread.pruned == pytest.approx(np.quantile(values.numpy(), [0.05, 0.25, 0.5, 0.75, 0.95]))


def test_damage_is_counted_on_the_tokens_that_stayed(pair):
    clean, damaged = conditions(pair)
    assert (clean.aligned, clean.dense_damage) == (None, None)
    by_part = {w.part: w for w in pair if w.condition == CLEAN}
    expected = []
    for window in (w for w in pair if w.condition == "typos"):
        # 30 tokens: the first 9 stay, then one is put for two, so what follows is one place further on
        base, own = by_part[window.part].dense.loss, window.dense.loss
        expected += [own[i] - base[i] for i in range(8)] + [own[i] - base[i + 1] for i in range(9, 28)]
    assert damaged.aligned == len(expected)
    assert damaged.dense_damage == pytest.approx(float(sum(expected) / len(expected)))


def test_the_most_broken_tokens_are_those_whose_margin_fell_farthest(pair):
    found = most_broken(pair, lambda ids: " ".join(map(str, ids)))
    falls = sorted(float(value) for value in changes(pair)["margin"])[: len(found)]
    assert [row.margin_pruned - row.margin_dense for row in found] == pytest.approx(falls)
    assert all(row.token not in ("", row.rival) for row in found)


def test_sentences_name_the_larger_part_and_the_worst_damage(pair):
    spread = distributions(pair, CLEAN)
    clean = Condition(CLEAN, 100, 3.0, 3.5, 0.01, 0.5, 0.4, 0.15, 0.05, -0.1, 0.6)
    typos = replace(clean, name="typos", aligned=90, dense_damage=0.1, pruned_damage=0.3)
    case = replace(typos, name="case", dense_damage=0.5, pruned_damage=0.6)
    said = sentences([clean, case, typos], spread)
    assert "from 3.000 to 3.500" in said[0]
    assert "the direction of the states" in said[1]
    assert "typos costs the pruned model most" in said[3]
    assert "it is less robust to it" in said[3]
    noisy = sentences([clean, replace(typos, damage_stderr=0.15)], spread)
    assert "less robust is not shown" in noisy[3]
    milder = sentences([clean, replace(typos, pruned_damage=0.05)], spread)
    assert "less robust is not shown" in milder[3]
    shorter = sentences([replace(clean, length_part=0.6, direction_part=-0.1)], spread)
    assert "the length of the states" in shorter[1]


@given(st.text(max_size=300), st.sampled_from(sorted(CORRUPTIONS)), st.integers(0, 50))
def test_damage_is_what_its_name_says(text, name, seed):
    found = corrupt(text, name, seed=seed)
    assert found == corrupt(text, name, seed=seed)
    if name == "typos":
        assert Counter(found) == Counter(text)
        assert [len(word) for word in found.split()] == [len(word) for word in text.split()]
    elif name == "dropped":
        words = iter(text.split())
        assert all(any(word == other for other in words) for word in found.split())
    elif text.isascii():
        assert found.casefold() == text.casefold()


def test_about_as_many_words_are_damaged_as_said_and_in_other_places_each_time():
    words = TEXT.split() * 5
    text = " ".join(words)
    for name in CORRUPTIONS:
        share = 1 - len(align(words, corrupt(text, name).split())) / len(words)
        assert 0.05 < share < 0.25
        assert corrupt(text, name, part=1) != corrupt(text, name, part=2)
        assert corrupt(text, name, seed=1) != corrupt(text, name, seed=2)


def test_alignment_pairs_equal_tokens_in_order():
    draw = random.Random(0)
    clean = [draw.randrange(9) for _ in range(200)]
    damaged = [value for value in clean if draw.random() > 0.2]
    pairs = align(clean, damaged)
    assert all(clean[a] == damaged[b] for a, b in pairs)
    assert pairs == sorted(set(pairs))
    assert len(pairs) > 0.9 * len(damaged)
    assert align(clean, clean) == [(i, i) for i in range(200)]
