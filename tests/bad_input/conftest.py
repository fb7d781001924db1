"""Small models and texts for bad input to `recover`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import secateur
from tests.models import save_tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, family in (("dense", "llama"), ("encoder", "bert")):
        save_tiny(folder / name, family)
        secateur.prune(folder / name, folder / f"{name}-pruned", method="magnitude", evaluate=False, verify=False)
    save_tiny(folder / "vit", "vit")
    save_tiny(folder / "t5", "t5")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    rows = [{"text": f"a text about thing {i}", "label": i % 2} for i in range(40)]
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def classifier(root: Path) -> Path:
    secateur.recover(
        root / "encoder", root / "classifier", dense=True, data=str(root / "labels.jsonl"), tokens=600, evaluate=False,
        verify=False,
    )  # fmt: skip
    secateur.prune(root / "classifier", root / "classifier-pruned", method="magnitude", evaluate=False, verify=False)
    return root / "classifier-pruned"


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path_factory.mktemp("cache")))
