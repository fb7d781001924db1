"""The evaluate verb on tiny folders and on models in memory."""

from __future__ import annotations

import json

import pytest
import torch

from secateur.corpus.windows import windows
from secateur.errors import CalibrationError, UnsupportedModelError, UsageError
from secateur.measure.perplexity import perplexity
from secateur.verbs.evaluate import evaluate
from tests.models import save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    return path


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"good": "abc", "bad": "xyz"}) + "\n" + json.dumps({"good": "b", "bad": "c"}) + "\n")
    return path


def test_a_folder_and_the_same_model_in_memory(folder, text, pairs):
    found = evaluate(folder, data=text, sequence_length=50, samples=4, files=[pairs], device="cpu")
    cut = windows(text.read_text(), tiny_tokenizer(), 50, 4)
    expected = perplexity(tiny_model("llama"), cut)
    assert found.nll_per_token == pytest.approx(expected.nll_per_token, abs=1e-6)
    assert found.nll_stderr == pytest.approx(expected.stderr, abs=1e-6)
    assert found.perplexity == pytest.approx(expected.perplexity)
    assert found.tokens == 4 * 49
    assert found.accuracy.keys() == found.accuracy_stderr.keys() == {"pairs.jsonl"}
    assert "4 windows of 50 tokens" in found.protocol["perplexity"]
    assert str(text) in found.protocol["perplexity"]
    assert found.protocol["dtype"] == "float32"
    json.loads(found.to_json())
    memory = evaluate(
        tiny_model("llama"), tokenizer=tiny_tokenizer(), data=text, sequence_length=50, samples=4, files=[pairs]
    )
    assert memory.nll_per_token == found.nll_per_token
    assert memory.accuracy == found.accuracy


def test_defaults_are_the_built_in_text_and_the_window_of_the_model(folder):
    found = evaluate(folder, max_samples=2, device="cpu")
    assert "measure half of pydoc_data.topics" in found.protocol["perplexity"]
    assert "2 windows of 256 tokens" in found.protocol["perplexity"]


def test_dtype_is_that_of_the_file_unless_asked(folder, text):
    assert evaluate(folder, data=text, max_samples=1, device="cpu", dtype="bfloat16").protocol["dtype"] == "bfloat16"


def test_files_alone(folder, pairs):
    found = evaluate(folder, data=None, files=[pairs], device="cpu")
    assert found.perplexity is None
    assert found.tokens is None
    assert "perplexity" not in found.protocol


def test_files_of_one_name_are_kept_apart(folder, pairs, tmp_path):
    other = tmp_path / "other" / "pairs.jsonl"
    other.parent.mkdir()
    other.write_text(pairs.read_text())
    assert set(evaluate(folder, data=None, files=[pairs, other], device="cpu").accuracy) == {"pairs.jsonl", str(other)}
    with pytest.raises(UsageError, match="twice"):
        evaluate(folder, data=None, files=[pairs, pairs, pairs], device="cpu")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"sequence_length": 257}, "257"),
        ({"sequence_length": 1}, "at least"),
        ({"samples": 0}, "samples is 0"),
        ({"device": "nonsense"}, "nonsense"),
        ({"dtype": "float8"}, "float8"),
        ({"data": None}, "nothing to measure"),
    ],
)
def test_arguments_that_make_no_sense(folder, text, arguments, said):
    with pytest.raises(UsageError) as caught:
        evaluate(folder, **{"data": text, "device": "cpu", **arguments})
    assert said in caught.value.message + caught.value.hint


def test_bad_data_is_found_before_the_model_is_opened(pairs, tmp_path):
    with pytest.raises(CalibrationError):
        evaluate(tmp_path / "no model", data=tmp_path / "missing.txt")
    pairs.write_text("{}\n")
    with pytest.raises(CalibrationError, match="line 1"):
        evaluate(tmp_path / "no model", files=[pairs])


def test_a_text_that_is_too_short(folder, tmp_path):
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(CalibrationError, match="need 256 tokens, there are 3"):
        evaluate(folder, data=tmp_path / "short.txt", device="cpu")


def test_encoders_are_refused_with_the_reason(tmp_path, text):
    with pytest.raises(UnsupportedModelError, match="encoder"):
        evaluate(save_tiny(tmp_path / "bert", "bert"), data=text, device="cpu")


def test_a_model_in_memory_needs_its_tokenizer_and_stays_as_it_is(text):
    with pytest.raises(UsageError, match="tokenizer"):
        evaluate(tiny_model("llama"), data=text)
    with pytest.raises(UsageError, match="stays as it is"):
        evaluate(tiny_model("llama"), tokenizer=tiny_tokenizer(), data=text, dtype="float16")
    model = tiny_model("llama").to(torch.bfloat16)
    assert evaluate(model, tokenizer=tiny_tokenizer(), data=text, max_samples=1).protocol["dtype"] == "bfloat16"
