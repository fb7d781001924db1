"""Labelled texts by name: a JSONL file, or a split of a folder or dataset, whole or some of its rows."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from secateur.corpus.labelled import Labelled, read_labelled
from secateur.errors import CalibrationError, MissingExtraError

_ALIKE = (("train", "training"), ("validation", "valid", "val", "dev"), ("test",))
"""Names of splits that stand for each other in names of files."""


@dataclass(frozen=True)
class Examples:
    """Labelled texts and where they came from, in words for the protocol."""

    labelled: Labelled
    origin: str

    def of(self, first: int, last: int | None, origin: str) -> Examples:
        """The rows from ``first`` to before ``last``."""
        part = slice(first, last)
        all_of = self.labelled
        cut = replace(all_of, texts=all_of.texts[part], labels=all_of.labels[part], lines=all_of.lines[part])
        return Examples(cut, origin)

    @property
    def rows(self) -> str:
        """As JSONL: ``text`` and ``label``, a number where the labels came as numbers, else a name."""
        names = self.labelled.names
        numbers = names == [str(number) for number in range(len(names))]
        pairs = zip(self.labelled.texts, self.labelled.labels, strict=True)
        return "".join(
            json.dumps({"text": text, "label": label if numbers else names[label]}, ensure_ascii=False) + "\n"
            for text, label in pairs
        )


def divided(name: str) -> tuple[str, str]:
    """A name without the rows it asks for, and ``[from:to]``, empty for all."""
    found = re.fullmatch(r"(.*?)(\[\d*:\d*\])", name, re.DOTALL)
    return (found[1], found[2]) if found else (name, "")


def load_examples(name: str, source: str | None = None, names: Sequence[str] | None = None) -> Examples:
    """Read labelled texts.

    Args:
        name: a JSONL file; with a source, one of its splits. Either may end in ``[from:to]``: rows counted from 0.
        source: a folder, in which a split is the file ``SPLIT.jsonl`` or the only one whose name ends in ``-SPLIT``
            (dev, valid and validation are the same); or a dataset ``NAME[:CONFIG]``.
        names: those of the classes, where they are known.

    Raises:
        CalibrationError: when there is no such file, split or row, or a row lacks a text or has a label that is no
            class; the line is named.
        MissingExtraError: for a dataset without the ``data`` extra.
    """
    plain, part = divided(name)
    labels = None if names is None else dict(enumerate(names))
    if source is None or Path(source).expanduser().is_dir():
        path = Path(plain).expanduser() if source is None else _file_of(plain, Path(source).expanduser())
        whole = Examples(read_labelled(path, labels=labels), str(path))
    else:
        whole = _read_dataset(plain, source, labels)
    if not part:
        return whole
    first, last = (int(end) if end else None for end in part[1:-1].split(":"))
    cut = whole.of(first or 0, last, f"{whole.origin}, rows {part}")
    if not cut.labelled.texts:
        raise CalibrationError(f"{whole.origin} has {len(whole.labelled.texts)} rows: {part} are none of them")
    return cut


def _file_of(split: str, folder: Path) -> Path:
    for path in (folder / split, folder / f"{split}.jsonl"):
        if path.is_file():
            return path
    alike: tuple[str, ...] = next((group for group in _ALIKE if split in group), (split,))
    files = sorted(folder.glob("*.jsonl"))
    found = [path for path in files if re.split(r"[-_.]", path.stem)[-1] in alike]
    if len(found) != 1:
        names = ", ".join(path.name for path in found or files) or "no JSONL file at all"
        raise CalibrationError(
            f"{folder} has {'no' if not found else 'more than one'} split '{split}': there is {names}",
            hint=f"call the file {split}.jsonl",
        )
    return found[0]


def _read_dataset(split: str, source: str, labels: dict[int, str] | None) -> Examples:
    name, _, config = source.partition(":")
    try:
        import datasets
    except ImportError:
        raise MissingExtraError(
            f"'{source}' is no folder, and datasets need the extra 'data'",
            hint="check the path, or run: pip install 'secateur[data]'",
        ) from None
    try:
        rows: list[dict[str, Any]] = list(datasets.load_dataset(name, config or None, split=split))
    except Exception as error:  # noqa: BLE001 - every backend of datasets has its own exceptions
        reason = " ".join(str(error).split())[:200]
        raise CalibrationError(
            f"'{source}' is no folder, and split {split} of the dataset cannot be opened: {reason}",
            hint="check the name and the network, or give a folder with a JSONL file for each split",
        ) from None
    origin = f"dataset {source}, split {split}"
    texts, numbers = [], []
    for at, row in enumerate(rows):
        text, label = row.get("text", row.get("sentence")), row.get("label")
        if not isinstance(text, str) or not text.strip():
            raise CalibrationError(f"{origin}, row {at}: no text in column 'text' or 'sentence'")
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            raise CalibrationError(f"{origin}, row {at}: label is {label!r}", hint="it must be a whole number from 0")
        texts.append(text)
        numbers.append(label)
    if not rows:
        raise CalibrationError(f"{origin} holds no rows")
    known = list((labels or dict(enumerate(map(str, range(max(numbers) + 1))))).values())
    for at, number in enumerate(numbers):
        if number >= len(known):
            raise CalibrationError(f"{origin}, row {at}: label is {number}, the model's are 0 to {len(known) - 1}")
    return Examples(Labelled(origin, texts, numbers, known, list(range(len(rows)))), origin)
