"""kill -9 at any moment, then --resume: the result is byte for byte that of an uninterrupted run."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur.checkpoint.ledger import LEDGER, Ledger
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.writer import CheckpointWriter
from secateur.engine.stream import BlockStream
from secateur.errors import OutputError
from secateur.statistics import InputStatistics
from tests.models import calibration_for, save_tiny

WATCHED = [
    (CheckpointReader, "tensor"),
    (CheckpointWriter, "write"),
    (CheckpointWriter, "copy"),
    (CheckpointWriter, "sync"),
    (CheckpointWriter, "finish"),
    (Ledger, "append"),
    (InputStatistics, "update"),
    (BlockStream, "_install"),
]


def _prune(folder: Path, out: Path, **options: Any) -> None:
    torch.set_num_threads(1)  # the same in parent and children: another number of threads may round differently
    # A forked child cannot use an accelerator that its parent has opened.
    options = {"method": "sparsegpt", "calibration": calibration_for("llama"), "device": "cpu", **options}
    secateur.prune(folder, out, verify=False, evaluate=False, **options)


def _count_calls(before: Callable[[int], None], after: Callable[[int], None]) -> None:
    """Call back around every step of the run that touches the disk or the statistics."""
    calls = [0]

    def counted(original: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            number = calls[0]
            before(number)
            result = original(*args, **kwargs)
            after(number)
            return result

        return wrapped

    for owner, name in WATCHED:
        setattr(owner, name, counted(getattr(owner, name)))


def _die_at(step: int, late: bool, folder: Path, out: Path, resume: bool, **options: Any) -> None:

    def die(number: int) -> None:
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)

    _count_calls((lambda n: None) if late else die, die if late else (lambda n: None))
    _prune(folder, out, resume=resume, **options)


def _die_after(seconds: float, folder: Path, out: Path, resume: bool) -> None:
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _prune(folder, out, resume=resume)


def _steps(folder: Path, out: Path, queue: Any, **options: Any) -> None:
    last = [0]
    _count_calls(lambda n: None, lambda n: last.__setitem__(0, n))
    started = time.monotonic()
    _prune(folder, out, **options)
    queue.put((last[0], time.monotonic() - started))


def _run(target: Callable[..., None], *args: Any, **options: Any) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=target, args=args, kwargs=options)
    process.start()
    process.join(120)
    return process.exitcode


def _bytes(out: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(out.iterdir())
        if path.name not in ("secateur.json", "README.md")
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes], int, float]:
    """A model in several shards, the bytes of an uninterrupted run, its number of steps and its seconds."""
    root = tmp_path_factory.mktemp("kill")
    folder = save_tiny(root / "model", "llama", max_shard_size="25KB", num_hidden_layers=4)
    queue = multiprocessing.get_context("fork").SimpleQueue()
    assert _run(_steps, folder, root / "whole", queue) == 0
    steps, seconds = queue.get()
    return folder, _bytes(root / "whole"), steps, seconds


@pytest.mark.parametrize("point", range(12))
def test_killed_at_a_step(finished: tuple[Path, dict[str, bytes], int, float], point: int, tmp_path: Path) -> None:
    folder, expected, steps, _ = finished
    chance = random.Random(point)
    out = tmp_path / "out"
    step = 1 + (steps - 1) * point // 11 if point % 2 else chance.randint(1, steps)
    assert _run(_die_at, step, point % 3 == 0, folder, out, False) == -signal.SIGKILL
    assert not out.exists()
    if not out.with_name("out.partial").exists():  # killed before the run began to write
        _prune(folder, out)
    else:
        _run(_die_at, chance.randint(1, steps), True, folder, out, True)  # a second kill, while resuming
        if not out.exists():
            _prune(folder, out, resume=True)
    assert _bytes(out) == expected
    assert not out.with_name("out.partial").exists()
    assert not (out / LEDGER).exists()


@pytest.mark.parametrize("point", range(6))
def test_killed_at_a_moment(finished: tuple[Path, dict[str, bytes], int, float], point: int, tmp_path: Path) -> None:
    folder, expected, _, seconds = finished
    out = tmp_path / "out"
    _run(_die_after, seconds * random.Random(100 + point).uniform(0.05, 0.95), folder, out, False)
    if not out.exists():
        _prune(folder, out, resume=out.with_name("out.partial").exists())
    assert _bytes(out) == expected


@pytest.mark.parametrize("reconstruct", ["none", "block"])
def test_killed_under_best(
    finished: tuple[Path, dict[str, bytes], int, float], reconstruct: str, tmp_path: Path
) -> None:
    """With two streams, a share chosen by measurement, and blocks that are trained."""
    folder = finished[0]
    options = {"method": "best", "reconstruct": reconstruct, "calibration": calibration_for("llama", rows=128)}
    queue = multiprocessing.get_context("fork").SimpleQueue()
    assert _run(_steps, folder, tmp_path / "whole", queue, **options) == 0
    steps, _ = queue.get()
    for point, share in enumerate((0.3, 0.6, 0.9)):
        out = tmp_path / f"out-{point}"
        assert _run(_die_at, int(steps * share), bool(point % 2), folder, out, False, **options) == -signal.SIGKILL
        _prune(folder, out, resume=out.with_name(f"{out.name}.partial").exists(), **options)
        assert _bytes(out) == _bytes(tmp_path / "whole")


def test_left_over_partial_is_named_and_refused(
    finished: tuple[Path, dict[str, bytes], int, float], tmp_path: Path
) -> None:
    folder, expected, steps, _ = finished
    out = tmp_path / "out"
    assert _run(_die_at, steps // 2, False, folder, out, False) == -signal.SIGKILL
    with pytest.raises(OutputError, match=r"out\.partial") as caught:
        _prune(folder, out)
    assert "--resume" in caught.value.hint
    with pytest.raises(OutputError, match="recipe"):
        _prune(folder, out, resume=True, sparsity=0.7)
    with pytest.raises(OutputError, match="resume"):
        _prune(folder, tmp_path / "other", resume=True)
    _prune(folder, out, overwrite=True)
    assert _bytes(out) == expected
