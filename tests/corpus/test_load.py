"""Texts by name: built in, files, datasets; what is wrong with one is said in one line."""

from __future__ import annotations

import json
import sys

import pytest

from secateur.corpus.load import load_text, read_rows
from secateur.errors import CalibrationError, MissingExtraError


def test_a_text_file_comes_back_as_it_is(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Grüße\n\nsecond", encoding="utf-8")
    found = load_text(path)
    assert found.text == "Grüße\n\nsecond"
    assert str(path) in found.origin
    assert load_text(str(path)) == found


def test_a_byte_order_mark_is_not_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("word", encoding="utf-8-sig")
    assert load_text(path).text == "word"


def test_builtin_halves_differ():
    assert load_text("builtin", "calibration").text != load_text("builtin", "measure").text


def test_jsonl_rows_are_joined_by_a_blank_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one", "n": 1}\n\n{"text": "two"}\n', encoding="utf-8")
    assert load_text(path).text == "one\n\ntwo"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no text"),
        (b" \n\n ", "holds no text"),
        (b"abc\xff\xfe", "not UTF-8 text (byte 3)"),
    ],
)
def test_bad_text_files(tmp_path, content, said):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(CalibrationError) as caught:
        load_text(path)
    assert said in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": 5}', "line 2: no text in column 'text'"),
        ('{"body": "x"}', "line 2: no text in column 'text'"),
        ("[1, 2]", "line 2: a list, not an object"),
        ('{"text": ', "line 2: not JSON"),
    ],
)
def test_bad_jsonl_lines_are_named(tmp_path, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"rows\.jsonl") as caught:
        load_text(path)
    assert said in caught.value.message


def test_line_separators_inside_a_text_do_not_end_a_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b\u0085c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [row for _, row in read_rows(path)] == [{"text": "a\u2028b\u0085c"}]


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "/nowhere/missing", "rows.jsonl"])
def test_a_missing_file_is_not_taken_for_a_dataset(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match="no such data file"):
        load_text(name)


def test_an_empty_name_is_refused():
    with pytest.raises(CalibrationError):
        load_text("")


def test_a_dataset_without_the_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError) as caught:
        load_text("wikitext:wikitext-2-raw-v1")
    assert "secateur[data]" in caught.value.hint


class TestDatasetFolder:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        pytest.importorskip("datasets", reason="the extra 'data' is not installed")
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        folder = tmp_path / "set"
        folder.mkdir()
        for split in ("train", "test"):
            rows = [{"text": f"{split} {i}", "title": f"title {i}", "n": i} for i in range(3)]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return folder

    def test_parts_take_their_splits(self, folder):
        assert load_text(folder, "calibration").text == "train 0\n\ntrain 1\n\ntrain 2"
        assert load_text(folder, "measure").text == "test 0\n\ntest 1\n\ntest 2"
        assert "split test, column text" in load_text(folder, "measure").origin

    def test_split_and_column_can_be_named(self, folder):
        assert load_text(f"{folder}::train:title", "measure").text == "title 0\n\ntitle 1\n\ntitle 2"

    def test_a_column_that_is_not_there(self, folder):
        with pytest.raises(CalibrationError, match="no column 'nothing'"):
            load_text(f"{folder}::train:nothing")

    def test_a_limit_is_told(self, folder, monkeypatch):
        monkeypatch.setattr("secateur.corpus.load.DATASET_CHARACTERS", 10)
        found = load_text(folder)
        assert found.text == "train 0\n\nt"
        assert "first 10 characters" in found.origin

    def test_a_folder_without_data(self, tmp_path):
        pytest.importorskip("datasets", reason="the extra 'data' is not installed")
        (tmp_path / "empty").mkdir()
        with pytest.raises(CalibrationError, match="cannot be opened"):
            load_text(tmp_path / "empty")
