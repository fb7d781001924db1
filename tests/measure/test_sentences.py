"""Reading sentences in turn: every model reads the same in every round, warmed up, with energy where it is metered."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from secateur.measure import sentences
from secateur.measure.compare import Worker
from secateur.measure.sentences import measure_sentences
from tests.models import save_tiny

TEXTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [15]]


class Fake:
    """A worker that takes as many seconds as its folder is called."""

    asked: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, folder: Path, **others) -> None:
        self._name = folder.name

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass

    def ask(self, op, *, texts, batch, padding):
        self.asked.append((self._name, batch))
        return {"texts": len(texts), "seconds": float(self._name)}


class Meter:
    def start(self) -> None:
        self.read = 0

    def joules(self) -> float:
        return 3.0


@pytest.mark.parametrize("together", [True, False])
def test_models_take_turns_and_the_first_pass_does_not_count(together, monkeypatch):
    monkeypatch.setattr(sentences, "Worker", Fake)
    monkeypatch.setattr(sentences, "fit_together", lambda folders: together)
    monkeypatch.setattr(Fake, "asked", [])
    folders = [Path("2"), Path("4")]
    slow, slower = measure_sentences(folders, TEXTS, padding=0, batches=[1, 32], rounds=3, meter=Meter())
    assert slow[1].per_second == slow[32].per_second == [2.5] * 3
    assert slower[1].per_second == [1.25] * 3
    assert slower[32].joules_per_thousand == [600.0] * 3
    turn = [("2", 1), ("4", 1)]
    each = turn * 4 if together else [one for one in turn for _ in range(2)] * 3
    assert [one for one in Fake.asked if one[1] == 1] == each
    assert len(Fake.asked) == 2 * len(each)


def test_a_classifier_reads_every_text_whatever_the_batch(tmp_path):
    folder = save_tiny(tmp_path / "model", "bert")
    with Worker(folder) as worker:
        for batch in (1, 2, 32):
            answer = worker.ask("read", texts=TEXTS, batch=batch, padding=0)
            assert answer["texts"] == len(TEXTS)
            assert answer["seconds"] > 0
