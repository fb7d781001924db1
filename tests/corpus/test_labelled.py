"""Labels and scores are read as they stand, and every bad line is named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from secateur.corpus.labelled import first_columns, read_labelled, read_scored_pairs
from secateur.errors import CalibrationError

MODEL = {0: "negative", 1: "positive"}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return path


def row(label: Any, text: Any = "a text") -> dict[str, Any]:
    return {"text": text, "label": label, "extra": None}


def test_numbers_and_names_of_a_model_mean_the_same(tmp_path: Path) -> None:
    rows = [row("positive", "é"), row(0, "b"), row(1), row("negative")]
    found = read_labelled(write(tmp_path / "l.jsonl", rows), labels={1: "positive", 0: "negative"})
    assert found.name == "l.jsonl"
    assert found.texts == ["é", "b", "a text", "a text"]
    assert found.labels == [1, 0, 1, 0]
    assert found.names == ["negative", "positive"]
    assert found.lines == [1, 2, 3, 4]


def test_without_a_model_numbers_stay_and_names_are_sorted(tmp_path: Path) -> None:
    path = write(tmp_path / "l.jsonl", [row(3), row(0)])
    assert (read_labelled(path).labels, read_labelled(path).names) == ([3, 0], ["0", "1", "2", "3"])
    write(path, [row("b"), row("c"), row("a"), row("b")])
    assert (read_labelled(path).labels, read_labelled(path).names) == ([1, 2, 0, 1], ["a", "b", "c"])


@pytest.mark.parametrize(
    ("second", "labels", "said"),
    [
        (row(2), MODEL, ["line 3", "label is 2", "0 to 1"]),
        (row("neutral"), MODEL, ["line 3", "'neutral'", "negative, positive"]),
        (row(-1), None, ["line 3", "label is -1"]),
        (row(True), MODEL, ["line 3", "label is True"]),
        (row(1.0), MODEL, ["line 3", "label is 1.0"]),
        (row(None), MODEL, ["line 3", "label is None"]),
        (row("positive"), None, ["line 1", "label is 0", "'positive'"]),
        (row(1, ""), MODEL, ["line 3", "no text in column 'text'"]),
        (row(1, 7), MODEL, ["line 3", "no text in column 'text'"]),
        ({"sentence": "a", "label": 1}, MODEL, ["line 3", "no column 'text'", "sentence, label"]),
        ({"text": "a"}, MODEL, ["line 3", "no column 'label'", "there are: text"]),
        ({}, MODEL, ["line 3", "(none)"]),
        ([], MODEL, ["line 3", "a list"]),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, second: Any, labels: Mapping[int, str] | None, said: list[str]) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text(json.dumps(row(0)) + "\n\n" + json.dumps(second) + "\n")
    with pytest.raises(CalibrationError) as caught:
        read_labelled(path, labels=labels)
    for part in said:
        assert part in caught.value.message
    assert str(path) in caught.value.message


@pytest.mark.parametrize("read", [read_labelled, read_scored_pairs])
def test_empty_and_missing_files(tmp_path: Path, read: Any) -> None:
    (tmp_path / "l.jsonl").write_text("\n")
    with pytest.raises(CalibrationError, match="holds no rows"):
        read(tmp_path / "l.jsonl")
    with pytest.raises(CalibrationError, match="no such"):
        read(tmp_path / "none.jsonl")


def pair(score: Any, text: Any = "b") -> dict[str, Any]:
    return {"text1": "a", "text2": text, "score": score}


def test_scored_pairs(tmp_path: Path) -> None:
    found = read_scored_pairs(write(tmp_path / "p.jsonl", [pair(5), pair(-0.5, "c")]))
    assert (found.first, found.second, found.scores) == (["a", "a"], ["b", "c"], [5.0, -0.5])


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (pair("1"), "line 2: score is '1'"),
        (pair(float("nan")), "line 2: score is nan"),
        (pair(True), "line 2: score is True"),
        (pair(2, " "), "line 2: no text in column 'text2'"),
        ({"text1": "a", "score": 1}, "line 2: no column 'text2'; there are: text1, score"),
        (pair(1), "all 2 scores are 1"),
    ],
)
def test_bad_pairs_are_named(tmp_path: Path, second: Any, said: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        read_scored_pairs(write(tmp_path / "p.jsonl", [pair(1), second]))
    assert said in caught.value.message


def test_the_first_row_says_what_a_file_is(tmp_path: Path) -> None:
    assert first_columns(write(tmp_path / "p.jsonl", [pair(1), {}])) == {"text1", "text2", "score"}
    (tmp_path / "p.jsonl").write_text("\n")
    assert first_columns(tmp_path / "p.jsonl") == frozenset()
