"""Find the text a user names: ``builtin``, a file, or a dataset."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.corpus.builtin import Part, builtin_origin, builtin_text
from secateur.errors import CalibrationError, MissingExtraError

# Datasets can be larger than any disk; this is about 4 million tokens, some 2,000 windows of 2,048.
DATASET_CHARACTERS = 16_000_000

_FILE_SUFFIXES = {".txt", ".jsonl", ".md", ".rst", ".text", ".json", ".csv"}
_SPLITS: dict[Part, tuple[str, ...]] = {
    "calibration": ("train", "validation", "test"),
    "measure": ("test", "validation", "train"),
}


DEFAULT_PROMPT = "A list is a mutable sequence. To add an item to the end of a list,"
"""What models continue where no prompt is given: the beginning of something the built-in text is about."""


@dataclass(frozen=True)
class Text:
    """A text and where it came from, in words for the protocol."""

    text: str
    origin: str


def load_text(spec: str | Path, part: Part = "calibration") -> Text:
    """Read the text a specification names.

    Args:
        spec: ``builtin``; a UTF-8 text file; a ``.jsonl`` file with a ``text`` column; or a dataset
            ``NAME[:CONFIG[:SPLIT[:COLUMN]]]``, where NAME may be a local folder and an empty part means the default.
            Rows are joined by a blank line.
        part: which half of the built-in text, and which split of a dataset that names none
            (calibration: train; measure: test).

    Raises:
        CalibrationError: when there is no such text, it is not UTF-8, or it is empty.
        MissingExtraError: for a dataset without the ``data`` extra.
    """
    name = str(spec)
    path = Path(spec).expanduser()
    if name == "builtin":
        return Text(builtin_text(part), builtin_origin(part))
    if path.is_file():
        return _checked(_read_file(path), str(path))
    if not name.strip():
        raise CalibrationError("the name of the data is empty", hint="use 'builtin', a text file, or a dataset")
    looks_like_path = path.suffix.lower() in _FILE_SUFFIXES or name.startswith(("/", "./", "../", "~"))
    if looks_like_path and not _folder(name).is_dir():
        raise CalibrationError(f"no such data file: {name}", hint="check the path, or use 'builtin'")
    return _read_dataset(name, part)


def _checked(text: str, origin: str) -> Text:
    if not text.strip():
        raise CalibrationError(f"{origin} holds no text", hint="give a text file that is not empty, or use 'builtin'")
    return Text(text, origin)


def _folder(name: str) -> Path:
    return Path(name.split(":")[0]).expanduser()


def _read_file(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text (byte {error.start})", hint="give a plain text file in UTF-8, or a .jsonl file"
        ) from None
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from None
    if path.suffix.lower() == ".jsonl":
        return "\n\n".join(_jsonl_text(path, line, row) for line, row in read_rows(path))
    return text


def _jsonl_text(path: Path, line: int, row: dict[str, Any]) -> str:
    value = row.get("text")
    if not isinstance(value, str):
        raise CalibrationError(f"{path}, line {line}: no text in column 'text'", hint='each line is {"text": "..."}')
    return value


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file with their line numbers, counted from 1; blank lines are passed over.

    Raises:
        CalibrationError: when the file cannot be read or a line is no JSON object; the line is named.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise CalibrationError(f"no such data file: {path}", hint="check the path") from None
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(
                f"{path}, line {number}: not JSON ({error.msg}, column {error.colno})", hint="one JSON object a line"
            ) from None
        if not isinstance(row, dict):
            raise CalibrationError(
                f"{path}, line {number}: a {type(row).__name__}, not an object", hint="one JSON object a line"
            )
        yield number, row


def _read_dataset(spec: str, part: Part) -> Text:
    fields = spec.split(":")
    if len(fields) > 4:
        raise CalibrationError(f"'{spec}' has too many parts", hint="a dataset is NAME[:CONFIG[:SPLIT[:COLUMN]]]")
    name, config, split, column = fields + [""] * (4 - len(fields))
    try:
        import datasets
    except ImportError:
        raise MissingExtraError(
            f"'{spec}' is no file, and datasets need the extra 'data'",
            hint="check the path, or run: pip install 'secateur[data]'",
        ) from None
    target = str(_folder(name)) if _folder(name).is_dir() else name
    try:
        if not split:
            names = datasets.get_dataset_split_names(target, config or None)
            split = next((known for known in _SPLITS[part] if known in names), names[0])
        # Streaming fetches only the rows that are read: C4 alone is 300 GB.
        rows = datasets.load_dataset(target, config or None, split=split, streaming=True)
        column = column or _text_column(rows, spec)
        text, cut = _join(str(row[column] or "") for row in rows)
    except CalibrationError:
        raise
    except KeyError:
        raise CalibrationError(f"dataset '{spec}' has no column '{column}'") from None
    except Exception as error:  # noqa: BLE001 - every backend of datasets has its own exceptions
        reason = " ".join(str(error).split())[:200]
        raise CalibrationError(
            f"'{spec}' is no file, and the dataset cannot be opened: {reason}",
            hint="check the name, the configuration (NAME:CONFIG) and the network, or use 'builtin'",
        ) from None
    origin = f"dataset {name}" + (f", configuration {config}" if config else "") + f", split {split}, column {column}"
    return _checked(text, origin + (f", first {DATASET_CHARACTERS:,} characters" if cut else ""))


def _text_column(rows: Any, spec: str) -> str:
    first = next(iter(rows), None)
    if first is None:
        raise CalibrationError(f"dataset '{spec}' has no rows")
    texts = [name for name, value in first.items() if isinstance(value, str)]
    if "text" in first:
        return "text"
    if len(texts) == 1:
        return str(texts[0])
    raise CalibrationError(
        f"dataset '{spec}' has no column 'text'",
        hint=f"name one: NAME:CONFIG:SPLIT:COLUMN, with COLUMN one of {', '.join(texts) or '(no text columns)'}",
    )


def _join(texts: Iterable[str]) -> tuple[str, bool]:
    """Rows joined by a blank line, and whether the limit cut them off."""
    parts: list[str] = []
    length = 0
    for text in texts:
        parts.append(text)
        length += len(text) + 2
        if length >= DATASET_CHARACTERS:
            return "\n\n".join(parts)[:DATASET_CHARACTERS], True
    return "\n\n".join(parts), False
