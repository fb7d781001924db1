"""Classifiers against loops written from the definitions, and against one text at a time."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.corpus.labelled import Labelled
from secateur.errors import CalibrationError, UnsupportedModelError
from secateur.measure.classify import calibration_error, check_classifier, classify, macro_f1
from secateur.measure.model import load_model
from tests.models import FAMILIES, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
WORDS = ["cat", "dog runs", "a", "the end of a long text", "xyz", "bb", "what is it", "q" * 40, "no", "yes yes yes"]
CLASSES = {"bert": "BertForSequenceClassification", "llama": "LlamaForSequenceClassification"}
CLASSES |= {"roberta": "RobertaForSequenceClassification", "gpt2": "GPT2ForSequenceClassification"}


def classifier(family: str, classes: int = 3, **changes: Any) -> transformers.PreTrainedModel:
    """A random classifier whose outputs are far from ties."""
    config_name, _, values = FAMILIES[family]
    values = {**values, "num_labels": classes, **changes}
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES[family])(getattr(transformers, config_name)(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.2)
    return model.eval()


def data(labels: list[int], texts: list[str] | None = None, classes: int = 3) -> Labelled:
    names = [str(number) for number in range(classes)]
    return Labelled("l.jsonl", texts or WORDS[: len(labels)], labels, names, list(range(1, len(labels) + 1)))


def naive_f1(labels: list[int], predicted: list[int]) -> float:
    """Mean of 2PR / (P + R) over the classes there are, by counting."""
    scores = []
    for name in set(labels) | set(predicted):
        pairs = list(zip(labels, predicted, strict=True))
        tp = sum(a == name and b == name for a, b in pairs)
        precision = tp / predicted.count(name) if name in predicted else 0
        recall = tp / labels.count(name) if name in labels else 0
        scores.append(2 * precision * recall / (precision + recall) if tp else 0.0)
    return sum(scores) / len(scores)


def naive_calibration_error(probabilities: list[list[float]], labels: list[int], bins: int) -> float:
    total = 0.0
    for number in range(bins):
        low, high = number / bins, (number + 1) / bins
        members = [
            (max(row), row.index(max(row)) == label)
            for row, label in zip(probabilities, labels, strict=True)
            if low < max(row) <= high
        ]
        if members:
            accuracy = sum(right for _, right in members) / len(members)
            confidence = sum(top for top, _ in members) / len(members)
            total += len(members) / len(labels) * abs(accuracy - confidence)
    return total


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
def test_macro_f1_is_the_mean_over_the_classes_that_occur(pairs: list[tuple[int, int]]) -> None:
    labels, predicted = map(list, zip(*pairs, strict=True))
    assert macro_f1(np.array(labels), np.array(predicted)) == pytest.approx(naive_f1(labels, predicted), abs=1e-12)


rows = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 30)), min_size=1, max_size=30)


@settings(max_examples=50)
@given(rows, st.sampled_from([1, 10, 15]), st.data())
def test_calibration_error_is_that_of_the_definition(
    counts: list[tuple[int, int, int]], bins: int, draw: st.DataObject
) -> None:
    """Shares of small whole numbers, so that many probabilities lie on the edge of a bin."""
    shares = [[part / sum(row) for part in row] for row in counts]
    labels = [draw.draw(st.integers(0, 2)) for _ in shares]
    found = calibration_error(np.array(shares), np.array(labels), bins)
    assert found == pytest.approx(naive_calibration_error(shares, labels, bins), abs=1e-12)


def test_known_values() -> None:
    assert macro_f1(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1])) == 1
    assert macro_f1(np.array([0, 0, 5]), np.array([0, 0, 0])) == pytest.approx(0.4)  # (0.8 + 0) / 2
    sure = np.array([[1.0, 0.0]] * 4)
    assert calibration_error(sure, np.array([0, 0, 0, 0])) == 0
    assert calibration_error(sure, np.array([0, 1, 1, 1])) == pytest.approx(0.75)


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("batch", [1, 3, None])
def test_padding_and_sorting_change_nothing(family: str, batch: int | None) -> None:
    model = classifier(family)
    labels = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    found = classify(model, TOKENIZER, data(labels), batch=batch)
    expected = []
    for text in WORDS:
        with torch.no_grad():
            logits = model(torch.tensor([[ord(letter) for letter in text]])).logits[0].double()
        expected.append(logits.softmax(-1).numpy())
    assert np.abs(found.probabilities - np.stack(expected)).max() < 1e-4
    predicted = [int(row.argmax()) for row in expected]
    assert np.ptp(expected, axis=0).max() > 0.01, "the answers are all alike, the test would not notice a wrong order"
    assert found.predicted.tolist() == predicted
    assert found.accuracy == np.mean([a == b for a, b in zip(labels, predicted, strict=True)])
    assert found.macro_f1 == pytest.approx(naive_f1(labels, predicted))
    losses = [-math.log(row[label]) for row, label in zip(expected, labels, strict=True)]
    assert found.loss == pytest.approx(np.mean(losses), abs=1e-4)
    assert found.calibration_error == calibration_error(found.probabilities, np.array(labels))


def test_a_decoder_without_a_padding_token_gets_one_and_gives_it_back() -> None:
    expected = classify(classifier("llama"), TOKENIZER, data([0] * 10))
    model = classifier("llama", pad_token_id=None)
    assert model.config.pad_token_id is None
    found = classify(model, TOKENIZER, data([0] * 10), batch=5)
    assert model.config.pad_token_id is None
    assert np.abs(found.probabilities - expected.probabilities).max() < 1e-4
    assert "the config did not name" in found.protocol
    assert "the config did not name" not in expected.protocol
    bare = tiny_tokenizer()
    bare.pad_token = None
    assert "token 2" in classify(model, bare, data([0] * 10)).protocol  # the end token
    bare.eos_token = None
    alone = classify(model, bare, data([0] * 10), batch=5)
    assert "one text at a time" in alone.protocol
    assert np.abs(alone.probabilities - expected.probabilities).max() < 1e-4


def test_the_config_is_restored_when_something_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier("llama", pad_token_id=None)
    monkeypatch.setattr(model, "forward", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        classify(model, TOKENIZER, data([0]))
    assert model.config.pad_token_id is None


def test_long_texts_are_cut_and_it_is_told() -> None:
    model = classifier("bert")
    texts = ["a" * 300, "b" * 20, "a" * 256]
    found = classify(model, TOKENIZER, data([0, 0, 0], texts))
    assert "1 of 3 texts cut to 256 tokens" in found.protocol
    assert np.allclose(found.probabilities[0], found.probabilities[2], atol=1e-6)
    assert "2 of 3 texts cut to 30" in classify(model, TOKENIZER, data([0, 0, 0], texts), max_length=30).protocol


def test_intervals_hold_what_chance_does() -> None:
    """Of accuracy: about the normal approximation; of a fixed answer: a point; the same seed, the same ends."""
    model = classifier("bert", 2)
    texts = [f"{number:b}" for number in range(400)]
    first = classify(model, TOKENIZER, data([number % 2 for number in range(400)], texts, 2))
    again = classify(model, TOKENIZER, data([number % 2 for number in range(400)], texts, 2))
    assert first.accuracy_interval == again.accuracy_interval
    low, high = first.accuracy_interval
    assert low < first.accuracy < high
    assert (high - low) / (2 * 1.96 * first.accuracy_stderr) == pytest.approx(1, abs=0.15)
    assert first.macro_f1_interval[0] < first.macro_f1 < first.macro_f1_interval[1]
    ends = first.calibration_error_interval
    assert 0 <= ends[0] < ends[1]
    right = classify(model, TOKENIZER, data(first.predicted.tolist(), texts, 2))
    assert (right.accuracy, right.accuracy_interval) == (1.0, (1.0, 1.0))


def test_the_resamples_are_those_of_a_loop() -> None:
    """The vectorised bootstrap equals a loop over the same draws."""
    model = classifier("bert")
    labels = [number % 3 for number in range(10)]
    found = classify(model, TOKENIZER, data(labels), resamples=50, seed=5)
    rows = np.random.default_rng(5).integers(10, size=(50, 10))
    values = []
    for row in rows:
        chosen, predicted = np.array(labels)[row], found.predicted[row]
        error = naive_calibration_error(found.probabilities[row].tolist(), chosen.tolist(), 15)
        values.append([(chosen == predicted).mean(), naive_f1(chosen.tolist(), predicted.tolist()), error])
    ends = np.percentile(values, [2.5, 97.5], axis=0)
    intervals = [found.accuracy_interval, found.macro_f1_interval, found.calibration_error_interval]
    assert np.allclose(ends.T, intervals)


def test_other_models_are_refused() -> None:
    from tests.models import tiny_model

    with pytest.raises(UnsupportedModelError, match="no text classifier") as caught:
        classify(tiny_model("llama"), TOKENIZER, data([0]))
    assert "l.jsonl" in caught.value.hint
    with pytest.raises(UnsupportedModelError, match="no text classifier"):
        check_classifier(tiny_model("vit"), "f")
    with pytest.raises(UnsupportedModelError, match="regression"):
        check_classifier(classifier("bert", 1), "f")
    with pytest.raises(UnsupportedModelError, match="multi_label"):
        check_classifier(classifier("bert", 3, problem_type="multi_label_classification"), "f")


def test_a_label_the_model_does_not_have() -> None:
    with pytest.raises(CalibrationError, match="line 2: label 3, the model has 3 classes"):
        classify(classifier("bert"), TOKENIZER, data([0, 3, 1]))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_pruning_a_classifier_measures_its_accuracy(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur.progress import Recorder
    from secateur.verbs import sides
    from secateur.verbs.prune import prune

    if family == "llama":  # its speed is measured by no other code, and that takes seconds
        monkeypatch.setattr(sides, "_speed", lambda *_: None)

    class Ear(Recorder):
        def note(self, message: str) -> None:
            self.warnings.append(message)

    dense = classifier(family, pad_token_id=None) if family == "llama" else classifier(family)
    dense.save_pretrained(tmp_path / "in")
    TOKENIZER.save_pretrained(tmp_path / "in")
    predicted = classify(dense, TOKENIZER, data([0] * 10)).predicted
    file = tmp_path / "labels.jsonl"
    file.write_text(
        "".join(json.dumps({"text": t, "label": int(p)}) + "\n" for t, p in zip(WORDS, predicted, strict=True))
    )
    ear = Ear()
    result = prune(
        tmp_path / "in", tmp_path / "out", method="wanda", sparsity=0.5, samples=40, sequence_length=16, files=[file],
        reporter=ear,
    )  # fmt: skip
    assert result.verified
    assert result.verification["output_shape"] == [1, 3]
    assert result.before.accuracy == {"labels.jsonl": 1.0}
    assert result.before.perplexity is result.after.perplexity is None
    assert any("perplexity was not measured" in message for message in ear.warnings)
    pruned = load_model(tmp_path / "out", device="cpu")
    assert type(pruned) is type(dense)
    after = classify(pruned, TOKENIZER, data(predicted.tolist()))
    assert result.after.accuracy == {"labels.jsonl": after.accuracy}
    assert "10 texts, 3 classes" in result.protocol["quality"]["labels.jsonl"]
    heads = [name for name in dense.state_dict() if name.startswith(("score", "classifier"))]
    assert heads
    assert all(torch.equal(dense.state_dict()[name], pruned.state_dict()[name]) for name in heads)


def test_a_real_file_can_be_read() -> None:
    from secateur.corpus.labelled import read_labelled

    folder = os.environ.get("SECATEUR_DATA")
    if not folder:
        pytest.skip("SECATEUR_DATA does not name a folder with SST-2 files")
    found = read_labelled(Path(folder) / "sst2-dev.jsonl", labels={0: "negative", 1: "positive"})
    assert len(found.texts) > 100
    assert set(found.labels) == {0, 1}
