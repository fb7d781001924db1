"""Stopped and killed runs of `recover`: what is kept, and that a resumed run is the uninterrupted one to the bit."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.checkpoint.ledger import LEDGER, Ledger
from secateur.checkpoint.writer import CheckpointWriter
from secateur.engine.stream import BlockStream
from secateur.errors import Interrupted, OutputError, RunError
from secateur.recovery.blocks import BlockRecovery
from secateur.recovery.objectives import LanguageObjective
from secateur.recovery.trainer import COMPLETE, Checkpoints, RecoveryTrainer, Tell, last_checkpoint
from secateur.result import RecoverResult
from tests.verbs.recovering import RATES, TEXT, Stages, StopAt, pruned_model, recover_tiny, weights_of

pytestmark = pytest.mark.usefixtures("cache")

KILLED = {
    # mode, or another name -> family and settings; GPT-2 has dropout, so the random numbers must go on where they were
    "full": ("gpt2", {}),
    "lora": ("llama", {}),
    "norms-and-biases": ("opt", {"loss": "lm"}),
    "blocks": ("llama", {}),
    "kd+hidden": ("qwen2", {"mode": "full", "loss": "kd+hidden"}),
}
WATCHED = [
    (Tell, "on_step_end"),
    (Checkpoints, "on_save"),
    (CheckpointWriter, "write"),
    (Ledger, "append"),
    (BlockStream, "_install"),
    (BlockRecovery, "_error"),
    (RecoveryTrainer, "compute_loss"),
    (RecoveryTrainer, "_save_optimizer_and_scheduler"),
    (RecoveryTrainer, "_save_rng_state"),
]


def _killed_run(mode: str, root: Path, out: Path, **changes: Any) -> RecoverResult:
    torch.set_num_threads(1)  # the same in parent and children: another number of threads may round differently
    family, options = KILLED[mode]
    return recover_tiny(
        pruned_model(root, family, family), out, root, tokens=320,
        **{"mode": mode, "learning_rate": RATES.get(mode, 3e-3), "save_minutes": 1e-9, **options, **changes},
    )  # fmt: skip


def _count_calls(call: Callable[[int], None]) -> None:
    calls = [0]

    def counted(original: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            call(2 * calls[0])
            result = original(*args, **kwargs)
            call(2 * calls[0] + 1)
            return result

        return wrapped

    for owner, name in WATCHED:
        setattr(owner, name, counted(getattr(owner, name)))


def _count(mode: str, root: Path, out: Path, queue: Any) -> None:
    last = [0]
    _count_calls(lambda number: last.__setitem__(0, number))
    result = _killed_run(mode, root, out)
    queue.put((last[0], result.training.get("losses"), result.training.get("block_errors")))


def _die(point: int, mode: str, root: Path, out: Path, resume: bool) -> None:
    _count_calls(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number >= point else None)
    _killed_run(mode, root, out, resume=resume)


def _run(target: Callable[..., None], *args: Any) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    process.join(60)
    return process.exitcode


@pytest.fixture(scope="module")
def whole(root: Path) -> Callable[[str], Any]:
    """Weights, losses, block errors and number of watched calls of an uninterrupted run of each mode."""
    made: dict[str, Any] = {}

    def run(mode: str) -> Any:
        if mode not in made:
            queue = multiprocessing.get_context("fork").SimpleQueue()
            pruned_model(root, KILLED[mode][0], KILLED[mode][0])
            assert _run(_count, mode, root, root / f"whole-{mode}", queue) == 0
            made[mode] = (weights_of(root / f"whole-{mode}"), *queue.get())
        return made[mode]

    return run


@pytest.mark.parametrize("point", range(3))
@pytest.mark.parametrize("mode", KILLED)
def test_killed_and_resumed_is_the_uninterrupted_run(
    mode: str, point: int, whole: Callable[[str], Any], root: Path, tmp_path: Path
) -> None:
    expected, calls, losses, errors = whole(mode)
    chance = random.Random(f"{mode} {point}")
    out = tmp_path / "out"
    assert _run(_die, chance.randint(calls // 8, calls), mode, root, out, False) == -signal.SIGKILL
    assert not out.exists()
    if point % 2:  # a second kill, while resuming
        _run(_die, chance.randint(2, max(3, calls // 4)), mode, root, out, True)
    result = _killed_run(mode, root, out, resume=True)
    assert weights_of(out) == expected
    assert result.training.get("losses") == losses
    assert result.training.get("block_errors") == errors
    assert not out.with_name("out.partial").exists()
    assert not (out / LEDGER).exists()
    assert not (out / "trainer").exists()


def _stopped(mode: str, root: Path, out: Path, step: int = 3, **changes: Any) -> Path:
    stage = "pruning" if mode == "blocks" else "training"
    with pytest.raises(Interrupted) as caught:
        _killed_run(mode, root, out, reporter=StopAt(stage, 1 if mode == "blocks" else step), **changes)
    assert "--resume" in caught.value.hint
    assert caught.value.exit_code == 130
    assert not out.exists()
    return out.with_name(out.name + ".partial")


def test_torn_checkpoint_is_ignored(whole: Callable[[str], Any], root: Path, tmp_path: Path) -> None:
    partial = _stopped("full", root, tmp_path / "out")
    (good,) = (path for path in (partial / "trainer").glob("checkpoint-*") if (path / COMPLETE).exists())
    torn = shutil.copytree(good, good.with_name("checkpoint-7"))
    (torn / COMPLETE).unlink()
    (torn / "model.safetensors").write_bytes(b"torn")
    assert last_checkpoint(partial / "trainer") == good
    _killed_run("full", root, tmp_path / "out", resume=True)
    assert weights_of(tmp_path / "out") == whole("full")[0]


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_resume_does_only_what_is_left(mode: str, root: Path, tmp_path: Path) -> None:
    partial = _stopped(mode, root, tmp_path / "out")
    last = last_checkpoint(partial / "trainer")
    assert last is not None
    done = int(last.name.removeprefix("checkpoint-"))
    assert done in (2, 3)
    told = Stages()
    _killed_run(mode, root, tmp_path / "out", resume=True, reporter=told)
    assert told.totals["training"] == 5 - done


def test_out_that_appears_during_the_run_costs_no_training(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def appear(*_: object) -> None:
        out.mkdir()
        (out / "config.json").write_text("{}")

    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("secateur.verbs.recover"), "write_recovery_card", appear)
        with pytest.raises(RunError, match="appeared during the run"):
            _killed_run("full", root, out)
    shutil.rmtree(out)
    assert last_checkpoint(tmp_path / "out.partial" / "trainer") is not None
    told = Stages()
    _killed_run("full", root, out, resume=True, reporter=told)
    assert told.totals["training"] < 5
    assert not (out / "trainer").exists()


def test_a_stop_before_the_first_checkpoint_says_so(root: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="before the first checkpoint"):
        _killed_run("full", root, tmp_path / "out", reporter=StopAt("training", 2), save_minutes=1e6)


def test_without_any_whole_checkpoint_it_starts_again(whole: Callable[[str], Any], root: Path, tmp_path: Path) -> None:
    partial = _stopped("lora", root, tmp_path / "out")
    for path in (partial / "trainer").rglob(COMPLETE):
        path.unlink()
    _killed_run("lora", root, tmp_path / "out", resume=True)
    assert weights_of(tmp_path / "out") == whole("lora")[0]


@pytest.mark.parametrize("mode", ["full", "blocks"])
def test_resume_of_another_run_is_refused_and_the_difference_named(mode: str, root: Path, tmp_path: Path) -> None:
    partial = _stopped(mode, root, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in partial.rglob("*")}
    family, options = KILLED[mode]
    same = {"mode": mode, "save_minutes": 1e-9, "tokens": 320, "learning_rate": RATES[mode], "resume": True, **options}
    (tmp_path / "other.txt").write_text(TEXT.replace("fox", "cat"))
    pruned = pruned_model(root, family, family)
    for named, change in {
        "learning_rate": {"learning_rate": 1e-4},
        "data_sha256": {"data": str(tmp_path / "other.txt")},
        "seed": {"seed": 1},
        "tokens": {"tokens": 384},
        "compute_dtype": {"compute_dtype": "float32"},
    }.items():
        with pytest.raises(OutputError, match=rf"\b{named} was ") as caught:
            recover_tiny(pruned, tmp_path / "out", root, **{**same, **change})
        assert caught.value.exit_code == 2
    torch.set_num_threads(2)
    try:
        with pytest.raises(OutputError, match=r"\bthreads was 1, now 2"):
            recover_tiny(pruned, tmp_path / "out", root, **same)
    finally:
        torch.set_num_threads(1)
    for change in ({}, {"resume": False}):
        with pytest.raises(OutputError, match="is left over|nothing to resume"):
            recover_tiny(pruned, tmp_path / ("out" if change else "fresh"), root, **{**same, **change})
    assert {path: path.stat().st_mtime_ns for path in partial.rglob("*") if path in before} == before
    recover_tiny(pruned, tmp_path / "out", root, **{**same, "save_minutes": 5.0})  # how often it saves may change
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_overwrite_discards_what_was_left_over(whole: Callable[[str], Any], root: Path, tmp_path: Path) -> None:
    _stopped("full", root, tmp_path / "out")
    _killed_run("full", root, tmp_path / "out", overwrite=True)
    assert weights_of(tmp_path / "out") == whole("full")[0]


def test_loss_that_is_not_finite_keeps_the_last_checkpoint(root: Path, tmp_path: Path) -> None:
    pruned = pruned_model(root, "llama", "llama")
    with pytest.raises(RunError, match=r"not finite at step \d+; the last good checkpoint is checkpoint-\d") as caught:
        recover_tiny(pruned, tmp_path / "out", root, learning_rate=1e30, save_minutes=1e-9)
    assert caught.value.exit_code == 1
    assert "--learning-rate" in caught.value.hint
    assert not (tmp_path / "out").exists()
    assert last_checkpoint(tmp_path / "out.partial" / "trainer") is not None
    with pytest.raises(RunError, match=r"loss of .*layers\.\d is not finite at its step \d|does not fit") as caught:
        recover_tiny(pruned, tmp_path / "blocks", root, mode="blocks", learning_rate=1e30)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "blocks").exists()


def test_step_whose_loss_is_nan_is_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = LanguageObjective.__call__, [0]

    def poisoned(self: Any, *args: Any) -> Any:
        calls[0] += 1
        loss = original(self, *args)
        return loss * float("nan") if calls[0] == 2 + 2 * 3 else loss  # two for the timing, two in each step

    monkeypatch.setattr(LanguageObjective, "__call__", poisoned)
    with pytest.raises(RunError, match="the loss is not finite at step 3; the last good checkpoint is checkpoint-2"):
        recover_tiny(pruned_model(root, "llama", "llama"), tmp_path / "out", root, save_minutes=1e-9)
    assert last_checkpoint(tmp_path / "out.partial" / "trainer") is not None


@pytest.mark.parametrize("family", ["mixtral", "gpt_neox"])
def test_resume_loads_weights_whose_names_on_disk_differ(family: str, root: Path, tmp_path: Path) -> None:
    """Fused experts and renamed heads: the stock Trainer passes over what does not match by name."""
    options = {"learning_rate": 3e-3, "save_minutes": 1e-9, "tokens": 320, "compute_dtype": "float32"}
    model = pruned_model(root, family, family)
    whole = recover_tiny(model, tmp_path / "whole", root, **options)
    with pytest.raises(Interrupted):
        recover_tiny(model, tmp_path / "out", root, reporter=StopAt("training", 3), **options)
    resumed = recover_tiny(model, tmp_path / "out", root, resume=True, **options)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")
    assert resumed.training["losses"] == whole.training["losses"]


@pytest.mark.parametrize("mode", ["lora", "norms-and-biases"])
def test_resume_keeps_the_head_that_was_trained(mode: str, root: Path, tmp_path: Path) -> None:
    rows = [
        {"text": f"{word} number {n}", "label": label} for n in range(12) for label, word in enumerate(("up", "down"))
    ]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {
        "data": str(tmp_path / "labels.jsonl"), "mode": mode, "learning_rate": 1e-2, "save_minutes": 1e-9,
        "batch_size": 4, "tokens": None, "epochs": 1,
    }  # fmt: skip
    model = pruned_model(root, "bert", "bert")
    recover_tiny(model, tmp_path / "whole", root, **options)
    with pytest.raises(Interrupted):
        recover_tiny(model, tmp_path / "out", root, reporter=StopAt("training", 3), **options)
    recover_tiny(model, tmp_path / "out", root, resume=True, **options)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")
