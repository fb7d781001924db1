"""Pruned or converted models that several trials may take: made once, named by content, removed when nobody needs them

Nothing here changes a result. A model is shared only by trials whose recipe and conversion are the same in every field;
statistics of calibration text are not: what a matrix sees depends on how the matrices before it were pruned.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.checkpoint.locks import take_lock
from secateur.progress import Reporter
from secateur.recipe import Recipe
from secateur.result import RESULT_FILE
from secateur.study.conversion import Conversion
from secateur.study.quality import key_of
from secateur.verbs.convert import DRAWING, SETTINGS, convert
from secateur.verbs.prune import prune

KEPT = 2
"""Models that stay after their last use, in case the next trial wants one."""


@dataclass(frozen=True)
class Shared:
    """A model that several trials may take; ``seconds`` is what making it took, ``reused`` that it was there."""

    folder: Path
    result: Mapping[str, Any]
    seconds: float
    reused: bool


def make(
    folder: Path, model: str, recipe: Recipe, conversion: Conversion | None, reporter: Reporter
) -> Mapping[str, Any]:  # fmt: skip
    """Prune or convert a model as a trial asks for it, before any recovery. Returns what its result file says."""
    if conversion is None:
        prune(model, folder, recipe=recipe, evaluate=False, overwrite=True, reporter=reporter)
    else:
        unread = set() if conversion["to"] in DRAWING else {"seed"}
        settings = {name: getattr(recipe, name) for name in SETTINGS if name not in unread}
        convert(model, folder, **conversion, **settings, evaluate=False, overwrite=True, reporter=reporter)
    return _result_in(folder)


def made_once(
    folder: Path, model: str, recipe: Recipe, conversion: Conversion | None, reporter: Reporter
) -> Shared:  # fmt: skip
    """The verified result of `make`, made when it is not there yet. Who wants the same at once waits."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = None
    while lock is None:
        lock = take_lock(folder.with_suffix(".lock"), wait=True)
    try:
        told = folder.with_suffix(".seconds")
        reused = (folder / RESULT_FILE).is_file() and told.is_file()
        if not reused:
            started = time.monotonic()
            make(folder, model, recipe, conversion, reporter)
            told.write_text(repr(time.monotonic() - started), encoding="utf-8")
        return Shared(folder, _result_in(folder), float(told.read_text(encoding="utf-8")), reused)
    finally:
        os.close(lock)


def _result_in(folder: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    return found


def made_name(sha256: str, recipe: Recipe, conversion: Conversion | None, threads: int) -> str:
    """The folder of a shared model, by everything that changes a bit of it."""
    return f"made-{key_of(weights=sha256, recipe=recipe.to_dict(), conversion=conversion, threads=threads)}"


def evict(shared: Path, needed: Collection[str], recent: list[str]) -> None:
    """Remove shared models but those that running trials need and the last ones that were used."""
    kept = {*needed, *recent[-KEPT:]}
    for folder in shared.glob("made-*"):
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
