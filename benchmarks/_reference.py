"""The reference protocol: which data, how much of it, and which command. Shared by the scripts that quote it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _common

SAMPLES, LENGTH, WINDOWS = 32, 1024, 40
QUESTIONS = ("blimp-34x100.jsonl", "piqa-valid-first919.jsonl")


def folder_name(name: str) -> str:
    """A method with its pattern as the name of a folder."""
    return name.replace(" ", "-").replace(":", "-")


def parts(data: Path, count: int, folder: Path) -> list[Path]:
    """The validation text cut in equal parts, one file each."""
    text = (data / "wikitext2-valid.txt").read_text(encoding="utf-8")
    paths = []
    for index in range(count):
        paths.append(folder / f"part-{index + 1}.txt")
        part = text[len(text) * index // count : len(text) * (index + 1) // count]
        paths[-1].write_text(part, encoding="utf-8")
    return paths


def prune(
    name: str, out: Path, data: Path, compute_dtype: str | None = None, *, calibration: Path | None = None,
    more: Sequence[str] = (),
) -> _common.Run:  # fmt: skip
    """Prune the demo model by the first windows of the validation text; ``name`` is a method, with N:M if it has it."""
    method, _, pattern = name.partition(" ")
    arguments = ["prune", "demo", "-o", str(out), "--method", method, "--overwrite", "--quiet"]
    arguments += ["--calibration", str(calibration or data / "wikitext2-valid.txt"), "--samples", str(SAMPLES)]
    arguments += ["--sequence-length", str(LENGTH), "--no-verify", "--no-evaluate", *more]
    arguments += ["--compute-dtype", compute_dtype] if compute_dtype else []
    arguments += ["--no-refit"] if method == "sparsegpt" else []  # the published method: it leaves the last step out
    return _common.secateur(*arguments, *(["--pattern", pattern] if pattern else ["--sparsity", "0.5"]))


def quality(model: str, data: Path, *, questions: bool = True) -> dict[str, Any]:
    """Perplexity on the first windows of the test text, and accuracy, from `secateur evaluate --json`."""
    arguments = ["evaluate", model, "--data", str(data / "wikitext2-raw-test.txt"), "--sequence-length", str(LENGTH)]
    arguments += ["--samples", str(WINDOWS), "--json", "--quiet"]
    for name in QUESTIONS if questions else ():
        arguments += ["--files", str(data / name)]
    found = json.loads(_common.secateur(*arguments).stdout)
    row = {"perplexity": found["perplexity"]}
    for name, value in found["accuracy"].items():
        row[name] = value
        row[f"{name} stderr"] = found["accuracy_stderr"][name]
    return row
