"""Labelled texts by the name of a split, some rows of them, and out of a dataset."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from secateur.corpus.examples import divided, load_examples
from secateur.corpus.labelled import read_labelled
from secateur.errors import CalibrationError, MissingExtraError

ROWS = [{"text": f"text {number}", "label": number % 2} for number in range(6)]


def write(path, found=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_a_name_is_divided_from_its_rows():
    assert divided("a.jsonl[2:4]") == ("a.jsonl", "[2:4]")
    assert divided("train[:4]") == ("train", "[:4]")
    assert divided("a[b].jsonl") == ("a[b].jsonl", "")


@pytest.mark.parametrize(("part", "rows"), [("", ROWS), ("[:2]", ROWS[:2]), ("[2:]", ROWS[2:]), ("[1:3]", ROWS[1:3])])
def test_rows_are_those_of_the_file_and_are_written_back(part, rows, tmp_path):
    found = load_examples(f"{write(tmp_path / 'x.jsonl')}{part}")
    assert found.labelled.texts == [row["text"] for row in rows]
    assert [json.loads(line) for line in found.rows.splitlines()] == rows
    assert found.origin.endswith(part)


def test_names_of_classes_are_kept(tmp_path):
    named = [{"text": "x", "label": "good"}, {"text": "y", "label": "bad"}, {"text": "z", "label": "good"}]
    found = load_examples(str(write(tmp_path / "x.jsonl", named)))
    assert found.labelled.labels == [1, 0, 1]
    (tmp_path / "again.jsonl").write_text(found.rows)
    assert read_labelled(tmp_path / "again.jsonl").labels == [1, 0, 1]


def test_a_split_of_a_folder_may_have_another_name_for_validation(tmp_path):
    write(tmp_path / "some-dev.jsonl")
    assert load_examples("validation", str(tmp_path)).origin == str(tmp_path / "some-dev.jsonl")
    write(tmp_path / "other-valid.jsonl")
    with pytest.raises(CalibrationError, match="more than one split 'validation'") as raised:
        load_examples("validation", str(tmp_path))
    assert "validation.jsonl" in raised.value.hint
    write(tmp_path / "validation.jsonl", ROWS[:1])
    assert len(load_examples("validation", str(tmp_path)).labelled.texts) == 1


def a_dataset(monkeypatch, rows):
    def load_dataset(name, config, *, split):
        assert (name, config, split) == ("some/set", "small", "train")
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def test_a_dataset_gives_the_same_with_either_name_of_its_texts(monkeypatch):
    a_dataset(monkeypatch, [{"sentence": row["text"], "label": row["label"]} for row in ROWS])
    found = load_examples("train[1:]", "some/set:small")
    assert (found.labelled.texts[0], found.labelled.labels) == ("text 1", [1, 0, 1, 0, 1])


@pytest.mark.parametrize(
    ("row", "words"),
    [({"label": 0}, "no text"), ({"text": "x", "label": -1}, "label is -1"), ({"text": "x", "label": 5}, "label is 5")],
)
def test_bad_rows_of_a_dataset_are_named(row, words, monkeypatch):
    a_dataset(monkeypatch, [*ROWS, row])
    with pytest.raises(CalibrationError, match=f"row 6: {words}"):
        load_examples("train", "some/set:small", ["no", "yes"])


def test_a_dataset_that_is_not_there_and_a_missing_extra_are_told(monkeypatch):
    def load_dataset(*given, **others):
        raise FileNotFoundError("no such set")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(CalibrationError, match="no such set"):
        load_examples("train", "some/set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError):
        load_examples("train", "some/set")
