"""Pairs and multiple choice against one text at a time; bad lines are named."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secateur.errors import CalibrationError, UnsupportedModelError
from secateur.measure.choices import read_questions, score_questions
from tests.models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MODEL = tiny_model("llama")


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def log_probability(model, context: str, text: str, start: tuple[int, ...] = (1,)) -> float:
    """Of the text after the context, alone in its batch, by the definition (one token is one character)."""
    tokens = [*start, *(ord(character) for character in context + text)]
    with torch.no_grad():
        rows = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    first = len(start) + len(context)
    return sum(float(rows[position - 1, tokens[position]]) for position in range(first, len(tokens)))


WORDS = st.text("abc xyz.", min_size=1, max_size=25).filter(str.strip)
few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=9), st.integers(1, 5) | st.none())
def test_pairs_equal_one_by_one(tmp_path, pairs, batch):
    path = write(tmp_path / "pairs.jsonl", [{"good": good, "bad": bad, "field": 1} for good, bad in pairs])
    right = 0.0
    for good, bad in pairs:
        difference = log_probability(MODEL, "", good) - log_probability(MODEL, "", bad)
        right += 0.5 if good == bad else float(difference > 0)
    found = score_questions(MODEL, TOKENIZER, read_questions(path), batch=batch)
    value = right / len(pairs)
    assert found.value == found.unnormalised == pytest.approx(value)
    assert found.count == len(pairs)
    assert found.stderr == pytest.approx(math.sqrt(value * (1 - value) / len(pairs)))


@few
@given(st.lists(st.tuples(WORDS, WORDS, WORDS, WORDS, st.integers(0, 2)), min_size=1, max_size=6))
def test_choices_equal_one_by_one(tmp_path, rows):
    path = write(
        tmp_path / "choices.jsonl",
        [{"goal": goal, "sol1": a, "sol2": b, "sol3": c, "label": label} for goal, a, b, c, label in rows],
    )
    right = plain = 0.0
    for goal, *texts, label in rows:
        texts = [" " + text.strip() for text in texts]
        sums = [log_probability(MODEL, f"Question: {goal.strip()}\nAnswer:", text, ()) for text in texts]
        scores = [total / len(text) for total, text in zip(sums, texts, strict=True)]
        same = texts.count(texts[label])
        right += (max(range(3), key=scores.__getitem__) == texts.index(texts[label])) / same
        plain += (max(range(3), key=sums.__getitem__) == texts.index(texts[label])) / same
    found = score_questions(MODEL, TOKENIZER, read_questions(path))
    assert found.value == pytest.approx(right / len(rows))
    assert found.unnormalised == pytest.approx(plain / len(rows))
    assert "UTF-8 byte" in found.protocol


@pytest.mark.parametrize("family", ["mistral", "gpt2", "opt", "gpt_neox", "bloom", "falcon", "mixtral", "gemma3"])
def test_padding_changes_no_score(family, tmp_path):
    """Families place positions and masks each in their own way; the sums must not depend on the neighbours."""
    from secateur.measure import choices
    from secateur.measure.scoring import NextTokenScorer
    from secateur.progress import Reporter

    model = tiny_model(family)
    rows = [{"good": "a" * n + "b", "bad": "b" * n + "a" * (n % 3 + 1)} for n in range(1, 9)]
    questions = read_questions(write(tmp_path / "pairs.jsonl", rows))
    scorer = NextTokenScorer(model)
    sequences = choices._sequences(TOKENIZER, questions, None)
    together = choices._log_likelihoods(scorer, sequences, 0, 16, Reporter(), "")
    expected = [log_probability(model, "", row[column]) for row in rows for column in ("good", "bad")]
    assert together == pytest.approx(expected, abs=1e-4)


def test_a_tokenizer_without_special_tokens_leaves_the_first_token_out(tmp_path):
    bare = tiny_tokenizer()
    bare.bos_token = bare.eos_token = bare.pad_token = None
    path = write(tmp_path / "pairs.jsonl", [{"good": "ab", "bad": "xb"}])
    found = score_questions(MODEL, bare, read_questions(path))
    assert "first token not scored" in found.protocol
    with torch.no_grad():
        rows = MODEL(torch.tensor([[ord("a")], [ord("x")]])).logits[:, 0].log_softmax(-1)[:, ord("b")]
    assert found.value == float(rows[0] > rows[1])


@pytest.mark.parametrize("adds", [True, False])
def test_choices_begin_with_bos_only_where_the_tokenizer_puts_it(tmp_path, adds):
    from tokenizers.processors import TemplateProcessing

    from secateur.measure import choices

    tokenizer = tiny_tokenizer()
    if adds:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    rows = [{"goal": "g", "sol1": "ab", "sol2": "c", "label": 0}]
    questions = read_questions(write(tmp_path / "c.jsonl", rows))
    first = choices._sequences(tokenizer, questions, None)[0]
    assert first.tokens[:2] == ([1, ord("Q")] if adds else [ord("Q"), ord("u")])
    assert first.tokens[first.start :] == [ord(character) for character in " ab"]
    assert ("<bos>" in score_questions(MODEL, tokenizer, questions).protocol) is adds


def test_a_tokenizer_that_joins_context_and_text(tmp_path):
    """Tokens across the border belong to the text; nothing is scored twice or lost."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    from secateur.measure import choices

    vocabulary = {"<bos>": 1, **{chr(code): code for code in range(3, 127)}, ": ": 127}
    merged = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", " ")]))
    merged.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merged, bos_token="<bos>")
    questions = read_questions(write(tmp_path / "c.jsonl", [{"goal": "g", "sol1": "ab", "sol2": "c", "label": 0}]))
    first, second = choices._sequences(tokenizer, questions, None)
    assert first.tokens[first.start :] == [127, ord("a"), ord("b")]
    assert second.tokens[second.start :] == [127, ord("c")]


PAIR = {"good": "a", "bad": "b"}
CHOICE = {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (PAIR, {"good": "a"}, "line 2: no text in column 'bad'"),
        (PAIR, {"good": "a", "bad": 3}, "line 2: no text in column 'bad'"),
        (PAIR, {"good": " ", "bad": "b"}, "line 2: no text in column 'good'"),
        (PAIR, [], "line 2: a list, not an object"),
        ({"text": "a"}, PAIR, "line 1: columns text are neither"),
        (CHOICE, {**CHOICE, "label": 2}, "line 2: label is 2"),
        (CHOICE, {**CHOICE, "label": True}, "line 2: label is True"),
        (CHOICE, {**CHOICE, "label": "0"}, "line 2: label is '0'"),
        (CHOICE, PAIR, "line 2: no text in column 'sol1'"),
    ],
)
def test_bad_lines_are_named(tmp_path, first, second, said):
    with pytest.raises(CalibrationError) as caught:
        read_questions(write(tmp_path / "rows.jsonl", [first, second]))
    assert said in caught.value.message


def test_broken_json_empty_and_missing_files(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PAIR) + '\n\n{"good": "a", \n')
    with pytest.raises(CalibrationError, match="line 3: not JSON"):
        read_questions(path)
    path.write_text("\n")
    with pytest.raises(CalibrationError, match="no questions"):
        read_questions(path)
    with pytest.raises(CalibrationError, match="no such"):
        read_questions(tmp_path / "none.jsonl")


def test_a_text_longer_than_the_model_takes_is_named(tmp_path):
    path = write(tmp_path / "pairs.jsonl", [PAIR, {"good": "a" * 300, "bad": "b"}])
    with pytest.raises(CalibrationError, match="line 2: 301 tokens, the model takes 256"):
        score_questions(MODEL, TOKENIZER, read_questions(path))


def test_encoders_are_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="encoder"):
        score_questions(tiny_model("bert"), TOKENIZER, read_questions(write(tmp_path / "p.jsonl", [PAIR])))


def test_real_files_can_be_read():
    folder = os.environ.get("SECATEUR_DATA")
    if not folder:
        pytest.skip("SECATEUR_DATA does not name a folder with BLiMP and PIQA files")
    files = sorted(Path(folder).glob("blimp*.jsonl")) + sorted(Path(folder).glob("piqa*.jsonl"))
    assert files
    for file in files:
        questions = read_questions(file)
        assert questions.kind == ("pairs" if file.name.startswith("blimp") else "choices")
        assert len(questions.items) > 100
