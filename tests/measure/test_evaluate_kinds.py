"""The evaluate verb on classifiers and sentence encoders: what is measured, what is passed over, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from secateur.corpus.labelled import read_labelled
from secateur.errors import CalibrationError, UnsupportedModelError, UsageError
from secateur.measure.classify import classify
from secateur.measure.embeddings import embed
from secateur.progress import Reporter
from secateur.verbs.evaluate import _paragraphs, evaluate, has_language_head
from tests.measure.test_classify import WORDS, classifier
from tests.measure.test_embeddings import encoder, naive_spearman
from tests.models import save_tiny, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


class Ear(Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    warn = note


def save(model: transformers.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    names = {"id2label": {0: "bad", 1: "middling", 2: "good"}}
    return {
        "bert": save(classifier("bert", **names), root / "bert"),
        "llama": save(classifier("llama", pad_token_id=None), root / "llama"),
        "encoder": save(encoder(), root / "encoder"),
        "other": save(encoder(seed=1), root / "other"),
        "causal": save_tiny(root / "causal", "llama"),
        "labels": write(root / "labels.jsonl", [{"text": t, "label": i % 3} for i, t in enumerate(WORDS)]),
        "pairs": write(
            root / "pairs.jsonl", [{"text1": t, "text2": t[::-1] + "e", "score": i % 4} for i, t in enumerate(WORDS)]
        ),
        "minimal": write(root / "minimal.jsonl", [{"good": "a", "bad": "b"}]),
    }


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_classifier_on_labels(places: dict[str, Path], family: str) -> None:
    ear = Ear()
    found = evaluate(places[family], files=[places["labels"]], device="cpu", reporter=ear)
    model = classifier(family, pad_token_id=None) if family == "llama" else classifier(family)
    expected = classify(model, TOKENIZER, read_labelled(places["labels"]))
    assert found.accuracy == {"labels.jsonl": expected.accuracy}
    assert found.accuracy_interval == {"labels.jsonl": list(expected.accuracy_interval)}
    assert found.macro_f1 == {"labels.jsonl": expected.macro_f1}
    assert found.macro_f1_interval == {"labels.jsonl": list(expected.macro_f1_interval)}
    assert found.loss["labels.jsonl"] == pytest.approx(expected.loss, abs=1e-5)
    assert found.calibration_error["labels.jsonl"] == pytest.approx(expected.calibration_error, abs=1e-5)
    assert found.calibration_error_interval.keys() == {"labels.jsonl"}
    assert found.perplexity is None
    assert any("no language-model head" in note for note in ear.notes)
    assert not found.rank_correlation
    json.loads(found.to_json())


def test_names_of_classes_are_those_of_the_model(places: dict[str, Path], tmp_path: Path) -> None:
    """Alphabetical order would number them bad, good, middling."""
    names = ["bad", "middling", "good"]
    by_name = write(tmp_path / "n.jsonl", [{"text": t, "label": names[i % 3]} for i, t in enumerate(WORDS)])
    found = evaluate(places["bert"], data=None, files=[by_name, places["labels"]], device="cpu")
    assert found.loss["n.jsonl"] == found.loss["labels.jsonl"]
    wrong = write(tmp_path / "w.jsonl", [{"text": "a", "label": "bad"}, {"text": "b", "label": "awful"}])
    with pytest.raises(CalibrationError, match="line 2: label is 'awful'.*bad, middling, good"):
        evaluate(places["bert"], data=None, files=[wrong], device="cpu")
    numbers = write(tmp_path / "r.jsonl", [{"text": "a", "label": i} for i in range(4)])
    with pytest.raises(CalibrationError, match="line 4: label is 3"):
        evaluate(places["bert"], data=None, files=[numbers], device="cpu")


def test_scored_pairs(places: dict[str, Path]) -> None:
    found = evaluate(places["encoder"], files=[places["pairs"]], device="cpu")
    model = encoder()
    rows = [embed(model, TOKENIZER, texts) for texts in (WORDS, [text[::-1] + "e" for text in WORDS])]
    cosines = (rows[0].astype(float) * rows[1]).sum(axis=1)
    expected = naive_spearman(cosines.tolist(), [float(i % 4) for i in range(len(WORDS))])
    assert found.rank_correlation == {"pairs.jsonl": pytest.approx(expected)}
    low, high = found.rank_correlation_interval["pairs.jsonl"]
    assert low <= expected <= high
    assert "mean over the tokens" in found.protocol["pairs.jsonl"]
    assert not found.accuracy


def test_against_another_model(places: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    paragraphs = [f"paragraph number {i} says {word} and no more" for i, word in enumerate(WORDS)]
    text.write_text("Heading\n\n" + "\n\n".join(paragraphs + paragraphs[:2]))
    found = evaluate(places["other"], data=text, against=places["encoder"], device="cpu")
    sides = []
    for model in (encoder(seed=1), encoder()):
        rows = embed(model, TOKENIZER, paragraphs).astype(float)
        sides.append((rows @ rows.T)[np.triu_indices(len(rows), k=1)].tolist())
    key = str(places["encoder"])
    assert found.rank_correlation == {key: pytest.approx(naive_spearman(*sides), abs=1e-6)}
    assert "10 paragraphs" in found.protocol[key]
    assert found.perplexity is None
    same = evaluate(places["encoder"], against=places["encoder"], device="cpu")  # the built-in text
    assert same.rank_correlation[key] == pytest.approx(1)
    assert same.rank_correlation_interval[key] == pytest.approx([1, 1])
    assert "256 paragraphs" in same.protocol[key]


def test_paragraphs_are_different_and_spread() -> None:
    from secateur.corpus.load import Text

    many = [f"one two three four {number}" for number in range(1000)]
    found = _paragraphs(Text("\n \n".join(["short", *many, *many]), "t"))
    assert len(found) == len(set(found)) == 256
    assert found[0] == many[0]
    assert set(found) <= set(many)
    assert int(found[-1].split()[-1]) > 990
    with pytest.raises(CalibrationError, match="2 different paragraphs"):
        _paragraphs(Text("a b c d e\n\na b c d f\n\na b c d e", "t"))


@pytest.mark.parametrize(
    ("model", "files", "against", "said"),
    [
        ("encoder", ["labels"], None, "BertModel is no text classifier"),
        ("causal", ["labels"], None, "LlamaForCausalLM is no text classifier"),
        ("bert", ["pairs"], None, "BertForSequenceClassification has a head"),
        ("causal", ["pairs"], None, "LlamaForCausalLM has a head"),
        ("bert", [], "encoder", "BertForSequenceClassification has a head"),
        ("encoder", [], "bert", "BertForSequenceClassification has a head"),
        ("bert", ["minimal"], None, "no next-token logits"),
        ("bert", [], None, "no next-token logits"),
    ],
)
def test_the_wrong_kind_of_model(
    places: dict[str, Path], model: str, files: list[str], against: str | None, said: str
) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        evaluate(
            places[model],
            files=[places[file] for file in files],
            against=None if against is None else places[against],
            device="cpu",
        )
    assert said in caught.value.message
    assert caught.value.hint


def test_a_text_that_was_asked_for_is_not_passed_over(places: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("some words and more of them. " * 40)
    with pytest.raises(UnsupportedModelError, match="no next-token logits"):
        evaluate(places["bert"], data=tmp_path / "t.txt", files=[places["labels"]], device="cpu")
    with pytest.raises(UsageError, match="against needs texts"):
        evaluate(places["encoder"], data=None, files=[places["pairs"]], against=places["encoder"])


def test_a_model_with_a_language_head_still_has_a_perplexity(places: dict[str, Path]) -> None:
    found = evaluate(places["causal"], files=[places["minimal"]], max_samples=1, device="cpu")
    assert found.perplexity is not None
    assert found.accuracy.keys() == {"minimal.jsonl"}
    assert not found.accuracy_interval
    assert has_language_head(tiny_model("bert"))
    assert not has_language_head(tiny_model("vit"))
    assert not has_language_head(encoder())


def test_a_classifier_in_memory_keeps_its_number_format(places: dict[str, Path]) -> None:
    model = classifier("bert").to(torch.bfloat16)
    found = evaluate(model, tokenizer=TOKENIZER, files=[places["labels"]])
    assert found.protocol["dtype"] == "bfloat16"
    assert found.accuracy.keys() == {"labels.jsonl"}


def test_people_see_the_numbers_with_their_intervals(
    places: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from secateur.cli.app import main

    assert main(["evaluate", str(places["bert"]), "--files", str(places["labels"]), "--device", "cpu"]) == 0
    found = evaluate(places["bert"], files=[places["labels"]], device="cpu")
    out = " ".join(capsys.readouterr().out.split())
    low, high = (f"{100 * end:.1f} %" for end in found.macro_f1_interval["labels.jsonl"])
    assert f"macro F1, labels.jsonl {100 * found.macro_f1['labels.jsonl']:.1f} % (95 %: {low} to {high})" in out
    assert f"loss, nats, labels.jsonl {found.loss['labels.jsonl']:.3f}" in out
    assert "calibration error, labels.jsonl 0." in out
    assert main(["evaluate", str(places["encoder"]), "--against", str(places["encoder"]), "--device", "cpu"]) == 0
    assert "1.000 (95 %: 1.000 to 1.000)" in " ".join(capsys.readouterr().out.split())
