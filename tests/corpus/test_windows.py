"""Windows of tokens: whole, in order, without special tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.corpus.windows import windows
from secateur.errors import CalibrationError
from tests.models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@given(st.text("abcxyz .", min_size=1, max_size=80), st.integers(1, 9), st.none() | st.integers(1, 9))
def test_windows_are_the_text_in_order(text, length, samples):
    whole = len(text) // length
    if whole < (samples or 1):
        with pytest.raises(CalibrationError) as caught:
            windows(text, TOKENIZER, length, samples)
        assert f"{(samples or 1) * length:,} tokens" in caught.value.message
        assert f"there are {len(text):,}" in caught.value.message
        return
    found = windows(text, TOKENIZER, length, samples)
    count = samples or whole
    assert found.dtype == torch.int64
    assert found.shape == (count, length)
    assert found.flatten().tolist() == [ord(character) for character in text[: count * length]]


def test_the_hint_says_how_many_windows_there_would_be():
    with pytest.raises(CalibrationError) as caught:
        windows("x" * 50, TOKENIZER, 20, 4)
    assert "--samples 2" in caught.value.hint
