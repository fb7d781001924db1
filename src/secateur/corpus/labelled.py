"""Texts with labels, and pairs of texts with scores, out of JSONL files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.corpus.load import read_rows
from secateur.errors import CalibrationError

LABELLED = frozenset({"text", "label"})
SCORED_PAIRS = frozenset({"text1", "text2", "score"})


@dataclass(frozen=True)
class Labelled:
    """Texts, the class of each, and the names of the classes. ``lines`` are the line numbers in the file."""

    name: str
    texts: list[str]
    labels: list[int]
    names: list[str]
    lines: list[int]


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs of texts and how alike each pair is, on any scale."""

    name: str
    first: list[str]
    second: list[str]
    scores: list[float]


def first_columns(path: str | Path) -> frozenset[str]:
    """The columns of the first row of a JSONL file, which say what kind of file it is; none when it is empty.

    Raises:
        CalibrationError: when the file cannot be read.
    """
    return next((frozenset(row) for _, row in read_rows(Path(path).expanduser())), frozenset())


def read_labelled(path: str | Path, *, labels: Mapping[int, str] | None = None) -> Labelled:
    """Read a JSONL file of ``text`` and ``label``.

    Args:
        labels: class number -> name, as in ``id2label`` of a model. A label of the file is a number counted from 0, or
            one of the names. None when the model is not known yet: numbers from 0 up are taken as they are, and names
            are numbered in alphabetical order.

    Raises:
        CalibrationError: when the file is missing or empty, or a row lacks a column or text, or has a label that is no
            class of the model; the line is named.
    """
    path = Path(path).expanduser()
    texts: list[str] = []
    given: list[int | str] = []
    lines: list[int] = []
    for line, row in _rows(path, LABELLED):
        texts.append(_text(path, line, row, "text"))
        given.append(_label(path, line, row["label"]))
        lines.append(line)
    names = _names(path, lines, given) if labels is None else _ordered(labels)
    numbers = {name: number for number, name in enumerate(names)}
    found = []
    for line, label in zip(lines, given, strict=True):
        number = numbers.get(label) if isinstance(label, str) else label
        if number is None or not 0 <= number < len(names):
            known = f"0 to {len(names) - 1}, or a name: {', '.join(names)}"
            raise CalibrationError(
                f"{path}, line {line}: label is {label!r}, the model's are {known}",
                hint="labels are numbers counted from 0, in the order of the model's id2label, or the names in it",
            )
        found.append(number)
    return Labelled(path.name, texts, found, names, lines)


def read_scored_pairs(path: str | Path) -> ScoredPairs:
    """Read a JSONL file of ``text1``, ``text2`` and ``score`` (a number; more is more alike).

    Raises:
        CalibrationError: when the file is missing, a row lacks a column, text or a finite number (the line is named),
            or there are no two different scores, so that there is no order to compare with.
    """
    path = Path(path).expanduser()
    pairs = ScoredPairs(path.name, [], [], [])
    for line, row in _rows(path, SCORED_PAIRS):
        pairs.first.append(_text(path, line, row, "text1"))
        pairs.second.append(_text(path, line, row, "text2"))
        score = row["score"]
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise CalibrationError(f"{path}, line {line}: score is {score!r}", hint="it must be a finite number")
        pairs.scores.append(float(score))
    if len(set(pairs.scores)) < 2:
        raise CalibrationError(
            f"{path}: all {len(pairs.scores)} scores are {pairs.scores[0]:g}",
            hint="a rank correlation needs pairs with different scores",
        )
    return pairs


def _rows(path: Path, columns: frozenset[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows that have all columns; at least one."""
    empty = True
    for line, row in read_rows(path):
        missing = sorted(columns - row.keys())
        if missing:
            raise CalibrationError(
                f"{path}, line {line}: no column '{missing[0]}'; there are: {', '.join(row) or '(none)'}",
                hint=f"each line is a JSON object with {', '.join(sorted(columns))}",
            )
        empty = False
        yield line, row
    if empty:
        raise CalibrationError(
            f"{path} holds no rows", hint=f"one JSON object a line, with {', '.join(sorted(columns))}"
        )


def _text(path: Path, line: int, row: dict[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise CalibrationError(f"{path}, line {line}: no text in column '{column}'")
    return value


def _label(path: Path, line: int, value: Any) -> int | str:
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise CalibrationError(
        f"{path}, line {line}: label is {value!r}", hint="it must be a whole number counted from 0, or a name"
    )


def _names(path: Path, lines: Sequence[int], given: Sequence[int | str]) -> list[str]:
    """Names of the classes of a file for which no model speaks."""
    words = {label for label in given if isinstance(label, str)}
    if not words:
        return [str(number) for number in range(max(label for label in given if isinstance(label, int)) + 1)]
    for line, label in zip(lines, given, strict=True):
        if not isinstance(label, str):
            raise CalibrationError(
                f"{path}, line {line}: label is {label!r}, elsewhere in the file labels are names such as "
                f"{min(words)!r}",
                hint="use numbers in every line, or names in every line",
            )
    return sorted(words)


def _ordered(labels: Mapping[int, str]) -> list[str]:
    return [labels[number] for number in sorted(labels)]
