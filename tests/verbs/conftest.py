"""One folder of models and one cache for each file of tests of `recover`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verbs.recovering import TEXT


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recover")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(root / "cache"))
