"""One model and its texts for each file of tests, and a cache that nobody else uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.study.studies import StandIn, link_to, write_model_and_texts


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_and_texts(tmp_path_factory.mktemp("study"))


@pytest.fixture
def place(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SECATEUR_CACHE", str(root / "cache"))
    return link_to(tmp_path, root)


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Trials answer at once instead of pruning."""
    stand_in = StandIn()
    monkeypatch.setattr("secateur.study.workers.run_trial", stand_in)
    return stand_in
