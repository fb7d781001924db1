"""The ledger survives a kill at any byte and recognises its own run."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.checkpoint.ledger import Ledger
from secateur.errors import OutputError

RUN = {"method": "wanda", "sparsity": 0.5, "nested": {"b": [1, 2]}}
STEPS = [{"block": 0, "notes": ["ä\n"]}, {"block": 1}, {"block": 2}]


def written(folder: Path) -> Path:
    path = folder / "ledger.jsonl"
    ledger = Ledger.create(path, RUN)
    for step in STEPS:
        ledger.append(step)
    assert ledger.steps == STEPS
    return path


def test_steps_come_back_in_order(tmp_path: Path) -> None:
    assert Ledger.open(written(tmp_path), RUN).steps == STEPS


def test_a_kill_at_any_byte_loses_only_the_torn_step(tmp_path: Path) -> None:
    path = written(tmp_path)
    data = path.read_bytes()
    header = data.index(b"\n") + 1
    for length in range(header, len(data) + 1):
        path.write_bytes(data[:length])
        ledger = Ledger.open(path, RUN)
        whole = data[:length].count(b"\n") - 1
        assert ledger.steps == STEPS[:whole]
        for step in STEPS[whole:]:
            ledger.append(step)
        assert path.read_bytes() == data


def test_another_run_is_refused_with_the_settings_that_differ(tmp_path: Path) -> None:
    path = written(tmp_path)
    with pytest.raises(OutputError) as caught:
        Ledger.open(path, {**RUN, "sparsity": 0.6, "seed": 1})
    assert "sparsity was 0.5, now 0.6" in caught.value.message
    assert "seed" in caught.value.message
    assert "method" not in caught.value.message
    assert caught.value.hint


def test_begin_opens_makes_or_replaces(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert Ledger.begin(path, RUN, resume=True).steps == STEPS
    assert Ledger.begin(path, RUN, resume=False).steps == []
    path.unlink()
    assert Ledger.begin(path, RUN, resume=True).steps == []
    assert Ledger.open(path, RUN).steps == []


@pytest.mark.parametrize("data", [b"", b"{", b"nonsense\n", b'{"a":1}\nnonsense\n{"b":1}\n', b"[1]\n"])
def test_damage_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(data)
    with pytest.raises(OutputError) as caught:
        Ledger.open(path, {"a": 1})
    assert "--overwrite" in caught.value.hint


def test_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be read"):
        Ledger.open(tmp_path / "ledger.jsonl", RUN)
