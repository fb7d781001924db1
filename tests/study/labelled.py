"""A tiny study of classifiers: labelled texts that a model can learn, and a random model that reads them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from tests.models import save_tiny

SPLITS = {"train": (1, 64), "dev": (2, 24), "test": (3, 24)}
"""Split -> seed and rows."""


def rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Texts of one letter repeated, and which it is; every text is another."""
    choose = random.Random(seed)
    found = []
    for _ in range(count):
        label = choose.randrange(2)
        tail = "".join(choose.choice("cdefghijklm") for _ in range(6))
        found.append({"text": "ab"[label] * choose.randint(6, 12) + " " + tail, "label": label})
    return found


def write_rows(path: Path, found: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def write_model_and_splits(folder: Path, family: str = "bert") -> Path:
    save_tiny(folder / "model", family)
    for name, (seed, count) in SPLITS.items():
        write_rows(folder / f"tiny-{name}.jsonl", rows(seed, count))
    return folder


def plain(**changes: Any) -> dict[str, Any]:
    """A study of labels as it stands in its file; a key with the value None is left out."""
    study = {
        "name": "tiny",
        "model": "model",
        "task": "labels",
        "fine-tune": {"epochs": 6, "learning_rate": 5e-3, "held_out": 0.0},
        "data": {"source": ".", "calibration": "train[:48]", "choice": "dev", "test": "test", "samples": 4,
                 "sequence-length": 32},
        "space": {"method": "magnitude", "sparsity": [0.2, 0.5]},
        "objectives": {"accuracy": "maximize", "nonzero": "minimize"},
    }  # fmt: skip
    return {key: value for key, value in {**study, **changes}.items() if value is not None}


def write_study(folder: Path, **changes: Any) -> Path:
    path = folder / f"{changes.get('name', 'tiny')}.yaml"
    path.write_text(yaml.safe_dump(plain(**changes), sort_keys=False))
    return path
