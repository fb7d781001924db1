"""How good a model is on the texts of a study: perplexity of windows or accuracy on labelled texts, a part first"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from secateur.checkpoint.cache import cache_folder
from secateur.corpus.labelled import Labelled, read_labelled
from secateur.measure.classify import classify
from secateur.measure.model import load_model
from secateur.measure.perplexity import perplexity
from secateur.progress import Reporter
from secateur.result import write_json
from secateur.study.stopping import exp
from secateur.verbs.calibration import load_tokenizer, maximum_length
from secateur.verbs.provenance import versions


@dataclass(frozen=True)
class Quality:
    """What was measured of one model on one text."""

    values: Mapping[str, float | None]
    """perplexity and nll_per_token; or accuracy, macro_f1 and loss."""
    first: float
    """Badness on the first part alone: the logarithm of the perplexity, or of the share of texts that are wrong, taken
    with one wrong and one right text more than there are, so that few texts claim no certainty."""
    seconds: float
    intervals: Mapping[str, list[float]] = field(default_factory=dict)
    """95 % intervals of some values."""
    right: str = ""
    """1 for each labelled text that is right, 0 for the others, in their order."""
    shared: bool = False


class Measuring(Protocol):
    """One model on one text: the first part, and all of it when that is wanted."""

    def first(self) -> float:
        """Badness on the first part; see `Quality`."""

    def all(self) -> Quality:
        """Everything."""


class Windows:
    """Perplexity of windows; none of them is run twice."""

    def __init__(self, model: Any, windows: torch.Tensor, first: int, reporter: Reporter | None = None) -> None:
        self._model, self._windows, self._first = model, windows, min(first, len(windows))
        self._reporter = reporter
        self._begun: tuple[float, float] | None = None

    def first(self) -> float:
        """Nats per token on the first windows."""
        if self._begun is None:
            found = perplexity(self._model, self._windows[: self._first], reporter=self._reporter)
            self._begun = found.nll_per_token, found.seconds
        return self._begun[0]

    def all(self) -> Quality:
        """On all windows: the mean over them, as each predicts as many tokens."""
        first = self.first()
        assert self._begun is not None
        nll, seconds, count = first, self._begun[1], len(self._windows)
        if count > self._first:
            rest = perplexity(self._model, self._windows[self._first :], reporter=self._reporter)
            nll = (self._first * first + (count - self._first) * rest.nll_per_token) / count
            seconds += rest.seconds
        value = exp(nll)
        return Quality({"perplexity": value if value < math.inf else None, "nll_per_token": nll}, first, seconds)


class Texts:
    """Accuracy on labelled texts."""

    def __init__(
        self, model: Any, tokenizer: Any, data: Labelled, first: int, reporter: Reporter | None = None
    ) -> None:
        self._model, self._tokenizer, self._data, self._first = model, tokenizer, data, first
        self._reporter = reporter

    def first(self) -> float:
        """Logarithm of the share of the first texts that are wrong; see `Quality`."""
        data, part = self._data, slice(self._first)
        few = dataclasses.replace(data, texts=data.texts[part], labels=data.labels[part], lines=data.lines[part])
        return self._badness(self._right(few)[0])

    def all(self) -> Quality:
        """On all texts."""
        started = time.monotonic()
        right, found = self._right(self._data)
        return Quality(
            {"accuracy": found.accuracy, "macro_f1": found.macro_f1, "loss": found.loss},
            self._badness(right[: self._first]), time.monotonic() - started,
            {"accuracy": list(found.accuracy_interval), "macro_f1": list(found.macro_f1_interval)}, right,
        )  # fmt: skip

    def _right(self, data: Labelled) -> tuple[str, Any]:
        found = classify(
            self._model, self._tokenizer, data, max_length=maximum_length(self._model), reporter=self._reporter
        )
        return "".join("01"[int(own) == label] for own, label in zip(found.predicted, data.labels, strict=True)), found

    @staticmethod
    def _badness(right: str) -> float:
        return math.log((right.count("0") + 1) / (len(right) + 2))


def measuring(
    folder: Path, texts: Path, *, first: int, device: str = "auto", reporter: Reporter | None = None
) -> Measuring:
    """A folder, opened, and the texts that `save_windows` or `save_rows` has written."""
    model = load_model(folder, device=device)
    if texts.suffix == ".jsonl":
        data = read_labelled(texts, labels=model.config.id2label)
        return Texts(model, load_tokenizer(folder), data, first, reporter)
    return Windows(model, load_file(texts)["windows"], first, reporter)


def quality(
    folder: Path, texts: Path, *, first: int, device: str = "auto", reporter: Reporter | None = None
) -> Quality:
    """Everything of one folder on one text."""
    return measuring(folder, texts, first=first, device=device, reporter=reporter).all()


def dense_quality(folder: Path, sha256: str, texts: Path, *, first: int, device: str, reporter: Reporter) -> Quality:
    """The same of the dense model, measured once for all studies that ask for the same."""
    key = key_of(
        weights=sha256, config=hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(), first=first,
        texts=hashlib.sha256(texts.read_bytes()).hexdigest(), device=device, threads=torch.get_num_threads(),
    )  # fmt: skip
    path = cache_folder() / "dense" / f"{key}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Quality(**{**found, "shared": True})
    except (OSError, ValueError, TypeError):
        pass  # not measured yet, or not by this version
    made = quality(folder, texts, first=first, device=device, reporter=reporter)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dataclasses.asdict(made))
    except OSError as error:
        reporter.warn(f"the dense model's quality was not kept for other studies: {error.strerror}")
    return made


def difference(right: str, dense: str) -> tuple[float, list[float]]:
    """Accuracy less that of the dense model on the same texts, and its 95 % interval (normal, text by text)."""
    pairs = [int(own) - int(other) for own, other in zip(right, dense, strict=True)]
    mean = sum(pairs) / len(pairs)
    half = 1.96 * math.sqrt(sum((one - mean) ** 2 for one in pairs)) / len(pairs)
    return mean, [mean - half, mean + half]


def save_windows(folder: Path, name: str, windows: torch.Tensor) -> Path:
    """Put windows, (count, length) int64, where all trials find them."""
    digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16]
    path = folder / f"{name}-{digest}.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"windows": windows.clone()}, partial)
        partial.replace(path)
    return path


def save_rows(folder: Path, name: str, rows: str) -> Path:
    """The same for labelled texts as JSONL."""
    path = folder / f"{name}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(rows, encoding="utf-8")
    partial.replace(path)
    return path


def key_of(**parts: Any) -> str:
    """A name for what is made out of these parts by these versions."""
    told = {**parts, "versions": versions()}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
