"""A tiny study: a model of two blocks, a text for each purpose, and stand-ins for trials that take no time."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import yaml

from secateur.study.trial import Outcome, Task
from tests.models import save_tiny

WORDS = ("the", "list", "map", "set", "key", "value", "item", "index", "slice", "method", "object", "call", "name")


def text(seed: int, words: int = 900) -> str:
    """Lines of common words in random order: two seeds share no run of 32 words and no line."""
    choose = random.Random(seed)
    lines = [" ".join(choose.choice(WORDS) for _ in range(15)) for _ in range(words // 15)]
    return "\n".join(lines) + "\n"


def write_model_and_texts(folder: Path) -> Path:
    save_tiny(folder / "model", "llama")
    for seed, name in enumerate(("calibration", "choice", "test")):
        (folder / f"{name}.txt").write_text(text(seed))
    return folder


def plain(**changes: Any) -> dict[str, Any]:
    """A study as it stands in its file; a key with the value None is left out."""
    study = {
        "name": "tiny",
        "model": "model",
        "data": {
            "calibration": "calibration.txt", "choice": "choice.txt", "test": "test.txt", "samples": 8,
            "sequence-length": 32, "windows": 6,
        },
        "space": {"method": "wanda", "sparsity": [0.2, 0.4, 0.6]},
        "objectives": {"perplexity": "minimize", "nonzero": "minimize"},
        "speed": "asked",
    }  # fmt: skip
    return {key: value for key, value in {**study, **changes}.items() if value is not None}


def write_study(folder: Path, **changes: Any) -> Path:
    path = folder / f"{changes.get('name', 'tiny')}.yaml"
    path.write_text(yaml.safe_dump(plain(**changes), sort_keys=False))
    return path


def link_to(folder: Path, root: Path) -> Path:
    """A folder of its own for one test, with the model and texts of another."""
    for name in ("model", "calibration.txt", "choice.txt", "test.txt"):
        (folder / name).symlink_to(root / name)
    return folder


class StandIn:
    """Answers for trials at once, and keeps what it was asked; perplexity grows with sparsity."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []

    def __call__(self, task: Task, reporter: Any = None) -> Outcome:
        self.tasks.append(task)
        return self.answer(task)

    def answer(self, task: Task) -> Outcome:
        sparsity = float(task.recipe["sparsity"])
        shutil.copytree(task.dense, task.out, dirs_exist_ok=True)
        values: dict[str, float | None] = {
            "perplexity": 100 * (1 + sparsity) ** 2, "nll_per_token": 1.0, "nonzero": 1e6 * (1 - sparsity),
            "bytes_disk": 1000, "parameters": 1000, "sparsity": sparsity, "seconds": 2.0,
        }  # fmt: skip
        return Outcome("complete", values, {"w": sparsity}, seconds=2.0, proxy=90.0)
