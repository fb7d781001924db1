"""Pruned models that several trials may take: made once, named by content, removed when nobody needs them

Nothing here changes a result. A pruned model is shared only by trials whose recipe is the same in every field;
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
from secateur.study.quality import key_of
from secateur.verbs.prune import prune

KEPT = 2
"""Pruned models that stay after their last use, in case the next trial wants one."""


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
    return f"pruned-{key_of(weights=sha256, recipe=recipe.to_dict(), threads=threads)}"


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
