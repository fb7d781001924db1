"""All of `recover` on tiny models: zeros in place, files like the source's, resume to the bit, heads that learn."""

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
import transformers
from safetensors import safe_open

import secateur
from secateur.checkpoint.ledger import LEDGER, Ledger
from secateur.checkpoint.writer import CheckpointWriter
from secateur.engine.stream import BlockStream
from secateur.errors import Interrupted, OutputError, RunError, SecateurError
from secateur.progress import Reporter
from secateur.recovery.blocks import BlockRecovery
from secateur.recovery.objectives import LanguageObjective
from secateur.recovery.trainer import COMPLETE, Checkpoints, RecoveryTrainer, Tell, last_checkpoint
from secateur.result import RecoverResult
from secateur.verbs import teach
from tests.models import save_tiny

MODES = ("full", "lora", "norms-and-biases", "blocks")
TEXT = "The quick brown fox jumps over the lazy dog, and 12 others follow it; nobody knows why. " * 14
RATES = {"full": 3e-3, "lora": 1e-2, "norms-and-biases": 1e-2, "blocks": 3e-3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recover")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(autouse=True)
def cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(root / "cache"))


def _pruned(root: Path, name: str, family: str, *, pattern: str = "unstructured", **changes: Any) -> Path:
    """A pruned model with side files, made once."""
    folder = root / f"{name}-pruned"
    if not folder.exists():
        save_tiny(root / name, family, **changes)
        secateur.prune(
            root / name, folder, method="magnitude", sparsity=0.5, pattern=pattern, evaluate=False, verify=False
        )
        (folder / "notes.txt").write_text("precious")
        (folder / "more").mkdir()
        (folder / "more" / "prompts.json").write_text("[]")
    return folder


def _recover(model: Path, out: Path, root: Path, **changes: Any) -> RecoverResult:
    values = {"sequence_length": 32, "tokens": 640, "evaluate": False, "verify": False, **changes}
    if "data" not in changes:
        values.setdefault("batch_size", 2)
    return secateur.recover(model, out, **{"data": str(root / "text.txt"), **values})


def _tensors(folder: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """Key -> (file, tensor) of all weights."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update({key: (path.name, file.get_tensor(key)) for key in file.keys()})  # noqa: SIM118
    return found


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _check_like_the_source(before: Path, after: Path) -> set[str]:
    """Same keys, shards, formats, shapes and places of zeros; the keys whose values changed."""
    old, new = _tensors(before), _tensors(after)
    assert {key: file for key, (file, _) in new.items()} == {key: file for key, (file, _) in old.items()}
    changed = set()
    for key, (_, weight) in old.items():
        made = new[key][1]
        assert (made.dtype, made.shape) == (weight.dtype, weight.shape), key
        if weight.ndim >= 2 and float((weight == 0).float().mean()) > 0.1:
            assert torch.equal(made == 0, weight == 0), key
            assert not bool(made[weight == 0].signbit().any()), key
        if _bytes(made) != _bytes(weight):
            changed.add(key)
    return changed


def _loads(folder: Path, architecture: str, key_of_missing: str = "") -> Any:
    model, report = getattr(transformers, architecture).from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model


FAMILIES = {
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "qwen2": "Qwen2ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "opt": "OPTForCausalLM",
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_and_mode(family: str, mode: str, root: Path, tmp_path: Path) -> None:
    pruned, out = _pruned(root, family, family), tmp_path / "out"
    loss = {} if mode == "blocks" else {"loss": "lm"}  # a random teacher's loss on a text may as well rise
    result = _recover(pruned, out, root, mode=mode, learning_rate=RATES[mode], **loss)
    changed = _check_like_the_source(pruned, out)
    old = _tensors(pruned)
    flat = {key for key, (_, weight) in old.items() if weight.ndim == 1}
    assert changed & flat or mode == "lora"
    if mode == "norms-and-biases":
        assert changed <= flat
    if mode == "lora":
        assert changed
        assert not changed & flat
        assert not any("experts" in key or "embed" in key or "wte" in key for key in changed)
    if mode == "full":
        assert changed & {key for key in old if "embed" in key or "wte" in key}
        assert len(changed - flat) > 5
    if mode == "blocks":
        assert not any("embed" in key or "wte" in key or "lm_head" in key for key in changed)
        for before, after in result.training["block_errors"].values():
            assert after < before
    else:
        assert result.training["steps"] == 10
        assert result.training["held_out_loss"] < result.training["held_out_loss_before"]
        assert len(result.training["losses"]) == 10
    model = _loads(out, FAMILIES[family])
    with torch.no_grad():
        assert bool(torch.isfinite(model(input_ids=torch.arange(3, 20)[None]).logits).all())
    for name in ("notes.txt", "more/prompts.json", "tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (pruned / name).read_bytes(), name
    assert json.loads((out / "config.json").read_text()) == json.loads((pruned / "config.json").read_text())
    assert {path.name for path in out.iterdir()} == {path.name for path in pruned.iterdir()}
    assert result.sparsity == pytest.approx(0.5, abs=0.01)
    assert result.sparsity == result.before.sparsity == result.after.sparsity
    assert result.zeros_held == sum(int((old[key][1] == 0).sum()) for key in old if old[key][1].ndim >= 2)


def test_result_file_and_verification(root: Path, tmp_path: Path) -> None:
    pruned, out = _pruned(root, "llama", "llama"), tmp_path / "out"
    result = _recover(pruned, out, root, verify=True, evaluate=True, measure_data=str(root / "text.txt"))
    assert result.verified
    assert result.verification["zeros_held"] == result.zeros_held
    written = json.loads((out / "secateur.json").read_text())
    assert written == json.loads(result.to_json())
    assert written["source"]["name"] == "llama"
    assert written["student"]["name"] == "llama-pruned"
    assert written["settings"]["mode"] == "full"
    assert {"steps", "tokens", "seconds", "losses", "held_out_loss", "generalisation_gap"} <= written["training"].keys()
    assert written["training"]["tokens"] == 640
    assert written["protocol"]["teacher"] == "llama"
    assert written["protocol"]["loss"] == "kd"
    assert written["schema_version"] == 1
    assert set(written["shards"]) == {path.name for path in out.glob("*.safetensors")}
    for side in ("teacher", "before", "after"):
        assert written[side]["perplexity"] > 1
    assert written["verdict"]
    card = (out / "README.md").read_text()
    assert "llama" in card
    # What is recovered can be recovered again, from the same dense model.
    again = _recover(out, tmp_path / "again", root)
    assert again.source["name"] == "llama"
    assert again.student["name"] == "out"
    _check_like_the_source(pruned, tmp_path / "again")


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_shards_and_a_pattern(mode: str, root: Path, tmp_path: Path) -> None:
    pruned = _pruned(root, "half", "llama", pattern="2:4", dtype=torch.bfloat16, max_shard_size="20KB")
    assert len(list(pruned.glob("*.safetensors"))) > 2
    result = _recover(pruned, tmp_path / "out", root, mode=mode, learning_rate=RATES[mode])
    assert _check_like_the_source(pruned, tmp_path / "out")
    weights = {key: weight for key, (_, weight) in _tensors(tmp_path / "out").items() if "proj" in key}
    assert weights
    for key, weight in weights.items():
        assert weight.dtype == torch.bfloat16
        assert bool(((weight.view(-1, 4) == 0).sum(-1) >= 2).all()), key
    assert result.after.dtype == result.before.dtype
    index = "model.safetensors.index.json"
    assert json.loads((tmp_path / "out" / index).read_text()) == json.loads((pruned / index).read_text())
    _loads(tmp_path / "out", "LlamaForCausalLM")


@pytest.mark.parametrize("loss", ["lm", "kd", "kd+hidden"])
def test_each_loss_falls(loss: str, root: Path, tmp_path: Path) -> None:
    result = _recover(
        _pruned(root, "llama", "llama"), tmp_path / "out", root, loss=loss, learning_rate=1e-2, tokens=1280
    )
    losses = [value for _, value in result.training["losses"]]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert result.protocol["loss"] == loss
    assert (result.teacher is None) == (loss == "lm")


def test_a_single_step_is_not_lost_to_the_warm_up(root: Path, tmp_path: Path) -> None:
    result = _recover(_pruned(root, "llama", "llama"), tmp_path / "out", root, tokens=64)
    assert result.training["steps"] == 1
    assert _check_like_the_source(_pruned(root, "llama", "llama"), tmp_path / "out")


def test_what_the_user_gives_the_trainer_counts(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = RecoveryTrainer.train
    monkeypatch.setattr(RecoveryTrainer, "train", lambda self, **kw: (seen.append(self.args), original(self, **kw))[1])
    given = {"logging_steps": "5", "weight_decay": "0.25", "lr-scheduler-type": "linear", "adam_beta2": 0.9}
    result = _recover(_pruned(root, "llama", "llama"), tmp_path / "out", root, trainer=given)
    (arguments,) = seen
    assert (arguments.weight_decay, arguments.adam_beta2) == (0.25, 0.9)
    assert arguments.lr_scheduler_type == "linear"
    assert [step for step, _ in result.training["losses"]] == [5, 10]
    _check_like_the_source(_pruned(root, "llama", "llama"), tmp_path / "out")


def test_budget_in_minutes(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(teach, "time_of_step", lambda *a: 2.0)
    result = _recover(_pruned(root, "llama", "llama"), tmp_path / "out", root, tokens=None, minutes=0.2)
    assert result.training["steps"] == 6
    assert result.training["expected_seconds"] == 12.0


# Resuming


class StopAt(Reporter):
    """Ctrl-C after so many steps of a stage."""

    def __init__(self, stage: str, step: int) -> None:
        self.wanted, self.left, self.now = stage, step, ""

    def stage(self, name: str, total: int) -> None:
        self.now = name

    def advance(self, detail: str = "") -> None:
        if self.now == self.wanted:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


KILLED = {
    # mode -> family and settings; GPT-2 has dropout, so the random numbers must go on where they were
    "full": ("gpt2", {}),
    "lora": ("llama", {}),
    "norms-and-biases": ("opt", {"loss": "lm"}),
    "blocks": ("llama", {}),
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
    return _recover(
        _pruned(root, family, family), out, root, mode=mode, learning_rate=RATES[mode], tokens=320,
        **{"save_minutes": 1e-9, **options, **changes},
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


def _weights(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def whole(root: Path) -> Callable[[str], Any]:
    """Weights, losses, block errors and number of watched calls of an uninterrupted run of each mode."""
    made: dict[str, Any] = {}

    def run(mode: str) -> Any:
        if mode not in made:
            queue = multiprocessing.get_context("fork").SimpleQueue()
            _pruned(root, KILLED[mode][0], KILLED[mode][0])
            assert _run(_count, mode, root, root / f"whole-{mode}", queue) == 0
            made[mode] = (_weights(root / f"whole-{mode}"), *queue.get())
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
    assert _weights(out) == expected
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
    assert _weights(tmp_path / "out") == whole("full")[0]


class Stages(Reporter):
    """Keeps the number of steps of each stage."""

    def __init__(self) -> None:
        self.totals: dict[str, int] = {}

    def stage(self, name: str, total: int) -> None:
        self.totals[name] = total


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


@pytest.mark.parametrize(
    ("steps", "seconds", "expected"), [(400, 60.0, 10), (400, 0.1, 20), (400, None, 20), (10, 1.0, 1), (400, 3e3, 1)]
)
def test_checkpoints_can_be_made_as_often_as_asked(steps: int, seconds: float | None, expected: int) -> None:
    """They are made where losses are noted."""
    assert importlib.import_module("secateur.verbs.teach")._logging_steps(steps, seconds, save_minutes=10.0) == expected


@pytest.mark.parametrize("verify", [True, False])
def test_the_verdict_says_whether_zeros_were_checked(verify: bool, root: Path, tmp_path: Path) -> None:
    told = _recover(_pruned(root, "llama", "llama"), tmp_path / "out", root, mode="blocks", verify=verify).verdict[0]
    assert ("every held zero was checked" in told) is verify


def test_a_stop_before_the_first_checkpoint_says_so(root: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="before the first checkpoint"):
        _killed_run("full", root, tmp_path / "out", reporter=StopAt("training", 2), save_minutes=1e6)


def test_without_any_whole_checkpoint_it_starts_again(whole: Callable[[str], Any], root: Path, tmp_path: Path) -> None:
    partial = _stopped("lora", root, tmp_path / "out")
    for path in (partial / "trainer").rglob(COMPLETE):
        path.unlink()
    _killed_run("lora", root, tmp_path / "out", resume=True)
    assert _weights(tmp_path / "out") == whole("lora")[0]


@pytest.mark.parametrize("mode", ["full", "blocks"])
def test_resume_of_another_run_is_refused_and_the_difference_named(mode: str, root: Path, tmp_path: Path) -> None:
    partial = _stopped(mode, root, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in partial.rglob("*")}
    family, options = KILLED[mode]
    same = {"mode": mode, "save_minutes": 1e-9, "tokens": 320, "learning_rate": RATES[mode], "resume": True, **options}
    (tmp_path / "other.txt").write_text(TEXT.replace("fox", "cat"))
    pruned = _pruned(root, family, family)
    for named, change in {
        "learning_rate": {"learning_rate": 1e-4},
        "data_sha256": {"data": str(tmp_path / "other.txt")},
        "seed": {"seed": 1},
        "tokens": {"tokens": 384},
        "compute_dtype": {"compute_dtype": "float32"},
    }.items():
        with pytest.raises(OutputError, match=rf"\b{named} was ") as caught:
            _recover(pruned, tmp_path / "out", root, **{**same, **change})
        assert caught.value.exit_code == 2
    torch.set_num_threads(2)
    try:
        with pytest.raises(OutputError, match=r"\bthreads was 1, now 2"):
            _recover(pruned, tmp_path / "out", root, **same)
    finally:
        torch.set_num_threads(1)
    for change in ({}, {"resume": False}):
        with pytest.raises(OutputError, match="is left over|nothing to resume"):
            _recover(pruned, tmp_path / ("out" if change else "fresh"), root, **{**same, **change})
    assert {path: path.stat().st_mtime_ns for path in partial.rglob("*") if path in before} == before
    _recover(pruned, tmp_path / "out", root, **{**same, "save_minutes": 5.0})  # how often it saves may change
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_overwrite_discards_what_was_left_over(whole: Callable[[str], Any], root: Path, tmp_path: Path) -> None:
    _stopped("full", root, tmp_path / "out")
    _killed_run("full", root, tmp_path / "out", overwrite=True)
    assert _weights(tmp_path / "out") == whole("full")[0]


def test_loss_that_is_not_finite_keeps_the_last_checkpoint(root: Path, tmp_path: Path) -> None:
    pruned = _pruned(root, "llama", "llama")
    with pytest.raises(RunError, match=r"not finite at step \d+; the last good checkpoint is checkpoint-\d") as caught:
        _recover(pruned, tmp_path / "out", root, learning_rate=1e30, save_minutes=1e-9)
    assert caught.value.exit_code == 1
    assert "--learning-rate" in caught.value.hint
    assert not (tmp_path / "out").exists()
    assert last_checkpoint(tmp_path / "out.partial" / "trainer") is not None
    with pytest.raises(RunError, match=r"loss of .*layers\.\d is not finite|does not fit") as caught:
        _recover(pruned, tmp_path / "blocks", root, mode="blocks", learning_rate=1e30)
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
        _recover(_pruned(root, "llama", "llama"), tmp_path / "out", root, save_minutes=1e-9)
    assert last_checkpoint(tmp_path / "out.partial" / "trainer") is not None


# Classification and embeddings

GOOD, BAD = ("good", "nice", "fine", "kind"), ("evil", "ugly", "poor", "sad!")


def _texts(path: Path, count: int, seed: int, names: bool = False) -> Path:
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        words = [chance.choice((GOOD, BAD)[number % 2]) for _ in range(chance.randint(3, 6))]
        label: Any = ("bad", "good")[1 - number % 2] if names else number % 2
        rows.append(json.dumps({"text": " ".join(words), "label": label}))
    path.write_text("\n".join(rows))
    return path


@pytest.mark.parametrize(
    ("family", "architecture", "names"),
    [("bert", "BertForSequenceClassification", True), ("llama", "LlamaForSequenceClassification", False)],
)
def test_classifier_from_base_to_recovered(
    family: str, architecture: str, names: bool, root: Path, tmp_path: Path
) -> None:
    base = save_tiny(tmp_path / "base", family)
    train, test = _texts(tmp_path / "train.jsonl", 160, 1, names), _texts(tmp_path / "test.jsonl", 50, 2, names)
    common = {"data": str(train), "evaluate": False, "verify": False, "learning_rate": 5e-3, "batch_size": 8}

    def accuracy(folder: Path) -> float:
        return float(secateur.evaluate(folder, data=None, files=[test]).accuracy["test.jsonl"])

    trained = secateur.recover(base, tmp_path / "dense", dense=True, epochs=4, **common)
    assert trained.protocol["loss"] == "labels"
    assert trained.training["held_out_loss"] < 0.3 < 0.6 < trained.training["held_out_loss_before"]
    model = _loads(tmp_path / "dense", architecture)
    assert model.config.num_labels == 2
    if names:
        assert model.config.id2label == {0: "bad", 1: "good"}
    assert model.config.pad_token_id == 0
    assert accuracy(tmp_path / "dense") > 0.95

    secateur.prune(
        tmp_path / "dense", tmp_path / "pruned", method="magnitude", sparsity=0.8, evaluate=False, verify=False
    )
    ways = [("labels", "full"), ("kd", "full")] if names else [("kd", "lora"), ("auto", "norms-and-biases")]
    for loss, mode in ways:
        out = tmp_path / f"{loss}-{mode}"
        result = secateur.recover(tmp_path / "pruned", out, loss=loss, mode=mode, epochs=2, **common)
        assert result.protocol["loss"] == ("labels" if loss == "auto" else loss)
        assert (result.teacher is not None) == (loss == "kd")
        assert _check_like_the_source(tmp_path / "pruned", out)
        assert result.sparsity == pytest.approx(0.8, abs=0.01)
        _loads(out, architecture)
        if mode == "full":
            assert accuracy(out) > 0.95
        assert result.training["held_out_loss"] <= result.training["held_out_loss_before"] + 1e-3


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "BertModel"])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_new_head_on_a_pruned_body(architecture: str, mode: str, root: Path, tmp_path: Path) -> None:
    """A body that was pruned before it had a head keeps its zeros under the names of the new model."""
    save_tiny(tmp_path / "masked", "bert")
    body = getattr(transformers, architecture).from_pretrained(tmp_path / "masked")
    shutil.copytree(tmp_path / "masked", tmp_path / "body", ignore=shutil.ignore_patterns("*.safetensors"))
    body.save_pretrained(tmp_path / "body")
    secateur.prune(tmp_path / "body", tmp_path / "pruned", method="magnitude", evaluate=False, verify=False)
    data = _texts(tmp_path / "train.jsonl", 60, 1)
    result = secateur.recover(
        tmp_path / "pruned",
        tmp_path / "out",
        data=str(data),
        mode=mode,
        learning_rate=3e-3,
        evaluate=False,
        verify=False,
    )
    _loads(tmp_path / "out", "BertForSequenceClassification")
    old, new = _tensors(tmp_path / "pruned"), _tensors(tmp_path / "out")
    compared = 0
    for key, (_, weight) in old.items():
        if "encoder.layer" in key and weight.ndim == 2:
            made = new["bert." + key.removeprefix("bert.")][1]
            assert torch.equal(made == 0, weight == 0), key
            compared += 1
    assert compared == 12
    assert result.before.sparsity == result.after.sparsity == result.sparsity == pytest.approx(0.5, abs=0.01)
    assert result.zeros_held == sum(int((weight == 0).sum()) for _, weight in old.values() if weight.ndim == 2)


def test_encoder_learns_from_its_dense_self(root: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "masked", "bert")
    body = transformers.BertModel.from_pretrained(tmp_path / "masked")
    shutil.copytree(tmp_path / "masked", tmp_path / "dense", ignore=shutil.ignore_patterns("*.safetensors"))
    body.save_pretrained(tmp_path / "dense")
    secateur.prune(tmp_path / "dense", tmp_path / "pruned", method="magnitude", evaluate=False, verify=False)
    chance = random.Random(4)
    words = [*GOOD, *BAD, "tree", "house", "river", "cloud"]
    texts = [" ".join(chance.choices(words, k=chance.randint(4, 9))) for _ in range(200)]
    (tmp_path / "texts.txt").write_text("\n\n".join(texts))
    result = secateur.recover(
        tmp_path / "pruned", tmp_path / "out", data=str(tmp_path / "texts.txt"), evaluate=False, verify=False,
        epochs=6, learning_rate=2e-3, batch_size=16,
    )  # fmt: skip
    assert result.protocol["loss"] == "features"
    losses = [value for _, value in result.training["losses"]]
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    assert _check_like_the_source(tmp_path / "pruned", tmp_path / "out")

    def apart(folder: Path) -> float:
        """Mean of 1 - cosine to the dense model's embedding, text by text, without padding."""
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ours, dense = _loads(folder, "BertModel").eval(), _loads(tmp_path / "dense", "BertModel").eval()
        total = 0.0
        with torch.no_grad():
            for text in texts[:30]:
                inputs = {"input_ids": tokenizer(text, return_tensors="pt").input_ids}
                sides = [model(**inputs).last_hidden_state[0].mean(0) for model in (ours, dense)]
                total += 1 - float(torch.cosine_similarity(*sides, dim=0))
        return total / 30

    assert apart(tmp_path / "out") < 0.6 * apart(tmp_path / "pruned")


@pytest.mark.parametrize("family", ["mixtral", "gpt_neox"])
def test_resume_loads_weights_whose_names_on_disk_differ(family: str, root: Path, tmp_path: Path) -> None:
    """Fused experts and renamed heads: the stock Trainer passes over what does not match by name."""
    options = {"learning_rate": 3e-3, "save_minutes": 1e-9, "tokens": 320, "compute_dtype": "float32"}
    model = _pruned(root, family, family)
    whole = _recover(model, tmp_path / "whole", root, **options)
    with pytest.raises(Interrupted):
        _recover(model, tmp_path / "out", root, reporter=StopAt("training", 3), **options)
    resumed = _recover(model, tmp_path / "out", root, resume=True, **options)
    assert _weights(tmp_path / "out") == _weights(tmp_path / "whole")
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
    model = _pruned(root, "bert", "bert")
    _recover(model, tmp_path / "whole", root, **options)
    with pytest.raises(Interrupted):
        _recover(model, tmp_path / "out", root, reporter=StopAt("training", 3), **options)
    _recover(model, tmp_path / "out", root, resume=True, **options)
    assert _weights(tmp_path / "out") == _weights(tmp_path / "whole")


def test_measuring_data_is_looked_at_before_training(root: Path, tmp_path: Path) -> None:
    told = Stages()
    with pytest.raises(SecateurError, match="nowhere"):
        _recover(
            _pruned(root, "llama", "llama"), tmp_path / "out", root, evaluate=True, files=[tmp_path / "nowhere.jsonl"],
            reporter=told,
        )  # fmt: skip
    assert "training" not in told.totals
    assert not list(tmp_path.iterdir())
