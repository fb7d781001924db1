"""Embeddings against one text at a time; rank correlations against counting."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import UnsupportedModelError
from secateur.measure.embeddings import (
    check_encoder,
    embed,
    pairs_correlation,
    read_pooling,
    similarity_correlation,
)
from secateur.measure.ranks import spearman
from tests.models import FAMILIES, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = ["cat", "dog runs", "a", "the end of a long text", "xyz", "bb", "what is it", "q" * 40]


def encoder(family: str = "bert", seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    return tiny_model(family, seed=seed, **changes).base_model


def naive_spearman(first: list[float], second: list[float]) -> float:
    """Ranks by counting the smaller and half the equal ones, then Pearson."""
    sides = []
    for values in (first, second):
        ranks = [sum(b < a for b in values) + (sum(b == a for b in values) + 1) / 2 for a in values]
        mean = sum(ranks) / len(ranks)
        sides.append([rank - mean for rank in ranks])
    x, y = sides
    scale = math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
    return sum(a * b for a, b in zip(x, y, strict=True)) / scale if scale else math.nan


few_values = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=25)


@given(few_values)
def test_spearman_is_pearson_of_mean_ranks(pairs: list[tuple[int, int]]) -> None:
    first, second = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    expected = naive_spearman(first.tolist(), second.tolist())
    assert spearman(first, second) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(3, 8))
def test_similarities_of_all_pairs(seed: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    ours, dense = unit(generator.normal(size=(count, 4))), unit(generator.normal(size=(count, 7)))

    def by_hand(texts: list[int]) -> float:
        pairs = [(texts[i], texts[j]) for i in range(len(texts)) for j in range(i + 1, len(texts))]
        pairs = [(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]]
        cosines = [[float(rows[i].astype(float) @ rows[j].astype(float)) for i, j in pairs] for rows in (ours, dense)]
        return naive_spearman(*cosines) if pairs else math.nan

    found = similarity_correlation(ours, dense, resamples=30, seed=3)
    assert found.value == pytest.approx(by_hand(list(range(count))), abs=1e-9)
    draws = np.random.default_rng(3)
    values = [by_hand(draws.integers(count, size=count).tolist()) for _ in range(30)]
    expected = np.percentile([value for value in values if not math.isnan(value)], [2.5, 97.5])
    assert found.interval == pytest.approx(tuple(expected), abs=1e-9)


def test_a_model_is_like_itself_and_like_a_rotated_one() -> None:
    rows = unit(np.random.default_rng(1).normal(size=(20, 6)))
    assert similarity_correlation(rows, rows).value == pytest.approx(1)
    opposite = pairs_correlation(rows[:10], rows[10:], (-(rows[:10] * rows[10:]).sum(axis=1)).tolist())
    assert opposite.value == pytest.approx(-1)
    assert opposite.interval == pytest.approx((-1, -1))


def test_equal_vectors_have_no_rank_correlation() -> None:
    same, other = unit(np.ones((5, 3))), unit(np.random.default_rng(0).normal(size=(5, 3)))
    found = similarity_correlation(same, other)
    assert (found.value, found.interval) == (None, None)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("kind", ["mean", "cls"])
@pytest.mark.parametrize("batch", [1, 3, None])
def test_vectors_are_those_of_one_text_at_a_time(tmp_path: Path, family: str, kind: str, batch: int | None) -> None:
    (tmp_path / "1_Pooling").mkdir()
    modes = {
        "pooling_mode_cls_token": kind == "cls",
        "pooling_mode_mean_tokens": kind == "mean",
        "include_prompt": True,
    }
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    model = encoder(family)
    found = embed(model, TOKENIZER, TEXTS, folder=tmp_path, batch=batch)
    assert found.dtype == np.float32
    for text, row in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            states = model(torch.tensor([[ord(letter) for letter in text]])).last_hidden_state[0]
        pooled = states.mean(dim=0) if kind == "mean" else states[0]
        assert np.abs(row - (pooled / pooled.norm()).numpy()).max() < 1e-5


def test_the_mean_is_the_default_and_long_texts_are_cut(tmp_path: Path) -> None:
    model = encoder()
    assert np.array_equal(embed(model, TOKENIZER, TEXTS), embed(model, TOKENIZER, TEXTS, folder=tmp_path))
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 5}')
    long, cut = embed(model, TOKENIZER, ["abcdefgh", "abcde"], folder=tmp_path)
    assert np.allclose(long, cut, atol=1e-6)
    assert "at most 5 tokens" in read_pooling(tmp_path).told


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("modules.json", [{"type": "sentence_transformers.models.Dense"}], "Dense"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "max_tokens"),
        (
            "1_Pooling/config.json",
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            "cls_token and mean",
        ),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "lasttoken"),
    ],
)
def test_other_poolings_are_refused(tmp_path: Path, name: str, content: Any, said: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UnsupportedModelError) as caught:
        embed(encoder(), TOKENIZER, TEXTS, folder=tmp_path)
    assert said in caught.value.message


@pytest.mark.parametrize(("family", "said"), [("bert", "head"), ("vit", "pixel_values"), ("t5", "encoder-decoder")])
def test_models_that_are_no_encoders_are_refused(family: str, said: str) -> None:
    assert family in FAMILIES
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        check_encoder(tiny_model(family), "the file")
    assert "the file needs an embedding model" in caught.value.hint
