"""Bits per byte against sums taken by hand, over tokenizers that cut the same text otherwise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.corpus.windows import windows
from secateur.errors import CalibrationError
from secateur.measure.per_byte import PerByte, of_passages, of_windows, passages
from secateur.measure.perplexity import perplexity
from tests.formats.tokenizers import ROWS, byte_level
from tests.models import tiny_model, tiny_tokenizer

TEXT = "a list of words, naïve and plain; the value of each key is an item in the map\n" * 9


class Uniform(torch.nn.Module):
    """Gives every token of its vocabulary the same chance."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.model = tiny_model("llama", vocab_size=size)
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if "norm" not in name:
                    weight.zero_()


def test_a_uniform_model_needs_the_logarithm_of_its_vocabulary_for_each_token():
    tokenizer = byte_level()
    cut = windows(TEXT, tokenizer, 16)[:5]
    found = passages(TEXT, tokenizer, 16, 5)
    model = Uniform(ROWS).model
    own = of_windows(perplexity(model, cut).by_window, 16, found)
    assert own.bits == pytest.approx([15 * math.log2(ROWS)] * 5, rel=1e-5)
    assert own.bits_per_byte == pytest.approx(5 * 15 * math.log2(ROWS) / sum(found.nbytes), rel=1e-5)
    again = of_passages(model, tokenizer, found.texts, longest=1000)
    # Cut anew, a passage may begin with other tokens than in the middle of its text, but not with other bytes.
    assert sum(again.nbytes) == pytest.approx(sum(own.nbytes), rel=0.1)


def test_passages_follow_each_other_without_gap():
    tokenizer = byte_level()
    found = passages(TEXT, tokenizer, 16, 5)
    whole = tokenizer(TEXT, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert "".join(found.texts) == TEXT[: whole[5 * 16 - 1][1]]


def test_another_vocabulary_is_measured_on_the_same_text():
    other = tiny_tokenizer()
    found = passages(TEXT, byte_level(), 24, 3)
    model = tiny_model("llama", vocab_size=len(other))
    own = of_passages(model, other, found.texts, longest=512)
    for text, bits, count in zip(found.texts, own.bits, own.nbytes, strict=True):
        ids = torch.tensor([other(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].double().log_softmax(-1)
        nats = -scores.gather(1, ids[0, 1:, None]).sum()
        assert bits == pytest.approx(float(nats) / math.log(2), rel=1e-5)
        assert 0 < count < len(text.encode()) + 1
    shorter = of_passages(model, other, found.texts, longest=6)
    assert all(a < b for a, b in zip(shorter.nbytes, own.nbytes, strict=True))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 1e3), st.integers(1, 500)), min_size=1, max_size=8))
def test_all_together_lie_between_the_ends(parts):
    found = PerByte(*map(tuple, zip(*parts, strict=True)))
    assert min(found.by_passage) * (1 - 1e-9) <= found.bits_per_byte <= max(found.by_passage) * (1 + 1e-9)


def test_windows_without_bytes_to_predict_are_refused():
    tokenizer = byte_level()
    with pytest.raises(CalibrationError, match="single character"):
        passages("\U0001f600" * 8, tokenizer, 2, 4)
    with pytest.raises(CalibrationError, match="single token"):
        of_passages(tiny_model("llama"), tokenizer, ["a"], longest=8)


def test_a_tokenizer_that_knows_no_places_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(CalibrationError, match="Slow does not know where its tokens stand"):
        passages(TEXT, Slow(), 4, 1)
