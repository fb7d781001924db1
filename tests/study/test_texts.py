"""Texts that hold parts of each other are refused by their content; the built-in text is divided so that none are."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.corpus.builtin import builtin_text
from secateur.errors import CalibrationError, StudyError
from secateur.study.read import read_study
from secateur.study.texts import halves, overlap, read_texts
from tests.study.studies import plain, text


def study(folder: Path, **data):
    return read_study(plain(data=data), folder, "s.yaml")


def test_texts_that_share_nothing_pass(tmp_path):
    for seed, name in enumerate("abc"):
        (tmp_path / f"{name}.txt").write_text(text(seed))
    found = read_texts(study(tmp_path, calibration="a.txt", choice="b.txt", test="c.txt"))
    assert (found.calibration.text, found.choice.text, found.test.text) == (text(0), text(1), text(2))
    assert len(set(found.digests.values())) == 3


def test_the_builtin_text_gives_three_that_share_nothing(tmp_path):
    found = read_texts(study(tmp_path))
    measure = builtin_text("measure")
    assert found.calibration.text == builtin_text("calibration")
    assert measure.startswith(found.choice.text)
    assert measure.endswith(found.test.text)
    assert abs(len(found.choice.text) - len(found.test.text)) < 0.02 * len(measure)


@pytest.mark.parametrize("mark", ["\n\n", "\n", " "])
def test_halves_lose_nothing_and_cut_no_word(mark):
    parts = [f"part{number}" for number in range(11)]
    first, second = halves(mark.join(parts))
    assert first.split() + second.split() == parts
    assert 4 <= len(first.split()) <= 7


def test_a_text_of_one_word_cannot_be_divided_into_two(tmp_path):
    (tmp_path / "one.txt").write_text("a")
    with pytest.raises(CalibrationError, match="too short"):
        read_texts(study(tmp_path, choice="one.txt", test="one.txt"))


HIDDEN = {
    "the same text": lambda inner, outer: inner,
    "inside a longer one": lambda inner, outer: outer[:2000] + inner + outer[2000:],
    "in other case, wrapped anew": lambda inner, outer: outer + "\n    ".join(inner.upper().split(" ")),
    "a tenth of it": lambda inner, outer: outer + inner[: len(inner) // 10],
}


@pytest.mark.parametrize("way", HIDDEN)
@pytest.mark.parametrize("where", ["calibration", "choice"])
def test_a_test_text_that_was_seen_is_refused_whatever_the_files_are_called(way, where, tmp_path):
    names = {"calibration": text(0), "choice": text(1), "test": text(2)}
    names[where] = HIDDEN[way](names["test"], names[where])
    for name, content in names.items():
        (tmp_path / f"{name}.txt").write_text(content)
    with pytest.raises(StudyError, match=f"{where} .* and test .* overlap") as raised:
        read_texts(study(tmp_path, calibration="calibration.txt", choice="choice.txt", test="test.txt"))
    assert raised.value.exit_code == 2


def test_what_recovery_learns_from_is_checked_too(tmp_path):
    for seed, name in enumerate("abc"):
        (tmp_path / f"{name}.txt").write_text(text(seed))
    spec = read_study(
        plain(
            data={"calibration": "a.txt", "choice": "b.txt", "test": "c.txt"},
            space={"sparsity": 0.5, "recovery": {"data": str(tmp_path / "c.txt"), "tokens": 64}},
        ), tmp_path, "s.yaml",
    )  # fmt: skip
    with pytest.raises(StudyError, match="recovery .* and test"):
        read_texts(spec)


def test_languages_without_spaces_are_compared_by_lines():
    lines = ["".join(chr(0x4E00 + (7919 * (row * 80 + at)) % 5000) for at in range(70)) for row in range(20)]
    assert overlap("\n".join(lines[:10]), "\n".join(lines[10:]))[0] == 0
    share, passage = overlap("\n".join(lines), "\n".join(lines[15:]))
    assert share == 1
    assert passage == lines[15]


def test_common_phrases_are_no_overlap():
    phrase = "the quick brown fox jumps over the lazy dog and runs"
    assert overlap(f"{text(3)} {phrase}", f"{text(4)} {phrase}")[0] == 0
