"""What the trials of a study share, made once and named by content: windows, pruned models, dense measurements

Nothing here changes a result. A pruned model is shared only by trials whose recipe is the same in every field;
statistics of calibration text are not: what a matrix sees depends on how the matrices before it were pruned.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from secateur.checkpoint.cache import cache_folder
from secateur.checkpoint.locks import take_lock
from secateur.measure.model import load_model
from secateur.measure.perplexity import perplexity
from secateur.progress import Reporter
from secateur.recipe import Recipe
from secateur.result import RESULT_FILE, write_json
from secateur.verbs.provenance import versions
from secateur.verbs.prune import prune

KEPT = 2
"""Pruned models that stay after their last use, in case the next trial wants one."""


@dataclass(frozen=True)
class Quality:
    """Nats per token on a text, and on its first windows alone."""

    nll: float
    first: float
    tokens: int
    seconds: float
    shared: bool = False


def save_windows(folder: Path, choice: torch.Tensor, test: torch.Tensor) -> Path:
    """Put the windows of both texts, (count, length) int64 each, where all trials find them."""
    digest = hashlib.sha256(choice.numpy().tobytes() + test.numpy().tobytes()).hexdigest()[:16]
    path = folder / f"windows-{digest}.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"choice": choice.contiguous(), "test": test.clone()}, partial)
        partial.replace(path)
    return path


def quality(
    folder: Path, windows: torch.Tensor, *, first: int, device: str = "auto", reporter: Reporter | None = None
) -> Quality:
    """Measure a folder on all windows; ``first`` of them are also told apart."""
    model = load_model(folder, device=device)
    return Measuring(model, windows, first, reporter).all()


class Measuring:
    """One model on one text: the first windows, and the others when they are wanted; no window is run twice."""

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
        """Nats per token on all windows: the mean over them, as each predicts as many tokens."""
        first = self.first()
        assert self._begun is not None
        nll, seconds, count = first, self._begun[1], len(self._windows)
        if count > self._first:
            rest = perplexity(self._model, self._windows[self._first :], reporter=self._reporter)
            nll = (self._first * first + (count - self._first) * rest.nll_per_token) / count
            seconds += rest.seconds
        return Quality(nll, first, count * (self._windows.shape[1] - 1), seconds)


def dense_quality(
    folder: Path, sha256: str, windows: torch.Tensor, *, first: int, device: str, reporter: Reporter
) -> Quality:
    """The same of the dense model, measured once for all studies that ask for the same."""
    key = _key(
        weights=sha256, config=hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(), first=first,
        windows=hashlib.sha256(windows.numpy().tobytes()).hexdigest(), shape=list(windows.shape), device=device,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    path = cache_folder() / "dense" / f"{key}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Quality(**{**found, "shared": True})
    except (OSError, ValueError, TypeError):
        pass  # not measured yet, or not by this version
    made = quality(folder, windows, first=first, device=device, reporter=reporter)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"nll": made.nll, "first": made.first, "tokens": made.tokens, "seconds": made.seconds})
    except OSError as error:
        reporter.warn(f"the dense model's quality was not kept for other studies: {error.strerror}")
    return made


@dataclass(frozen=True)
class Shared:
    """A pruned model that several trials may take; ``seconds`` is what making it took, ``reused`` that it was there."""

    folder: Path
    result: Mapping[str, Any]
    seconds: float
    reused: bool


def pruned_once(folder: Path, model: str, recipe: Recipe, reporter: Reporter) -> Shared:
    """The verified result of one recipe, pruned when it is not there yet. Who wants the same at once waits."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = None
    while lock is None:
        lock = take_lock(folder.with_suffix(".lock"), wait=True)
    try:
        told = folder.with_suffix(".seconds")
        reused = (folder / RESULT_FILE).is_file() and told.is_file()
        if not reused:
            started = time.monotonic()
            prune(model, folder, recipe=recipe, evaluate=False, overwrite=True, reporter=reporter)
            told.write_text(repr(time.monotonic() - started), encoding="utf-8")
        result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        return Shared(folder, result, float(told.read_text(encoding="utf-8")), reused)
    finally:
        os.close(lock)


def pruned_name(sha256: str, recipe: Recipe, threads: int) -> str:
    """The folder of a shared pruned model, by everything that changes a bit of it."""
    return f"pruned-{_key(weights=sha256, recipe=recipe.to_dict(), threads=threads)}"


def evict(shared: Path, needed: Collection[str], recent: list[str]) -> None:
    """Remove shared models but those that running trials need and the last ones that were used."""
    kept = {*needed, *recent[-KEPT:]}
    for folder in shared.glob("pruned-*"):
        if folder.is_dir() and folder.name.removesuffix(".partial") not in kept:
            shutil.rmtree(folder, ignore_errors=True)
            folder.with_suffix(".seconds").unlink(missing_ok=True)


def link_copy(source: Path, target: Path) -> None:
    """A copy of a model folder that shares the bytes on the disk where the disk can; nothing writes into either."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copy2(one, other)

    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=link)
    partial.rename(target)


def load_windows(path: Path) -> dict[str, torch.Tensor]:
    """Windows of ``choice`` and ``test``."""
    found: dict[str, torch.Tensor] = load_file(path)
    return found


def _key(**parts: Any) -> str:
    told = {**parts, "versions": versions()}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
