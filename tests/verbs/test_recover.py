"""All of `recover` on tiny models: zeros in place, files like the source's, each mode and loss, budgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.errors import Interrupted, SecateurError
from secateur.progress import Reporter
from secateur.recovery.objectives import LanguageObjective
from secateur.recovery.trainer import RecoveryTrainer
from secateur.verbs import teach
from secateur.verbs.cost import logging_steps
from tests.verbs.recovering import (
    MODES,
    RATES,
    TEXT,
    Stages,
    StopAt,
    check_like_the_source,
    loads,
    pruned_model,
    recover_tiny,
    tensors,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("cache")

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
    pruned, out = pruned_model(root, family, family), tmp_path / "out"
    loss = {} if mode == "blocks" else {"loss": "lm"}  # a random teacher's loss on a text may as well rise
    loss |= {"epochs": 4} if mode == "blocks" else {}  # the errors of the same windows, before and after
    result = recover_tiny(pruned, out, root, mode=mode, learning_rate=RATES[mode], **loss)
    changed = check_like_the_source(pruned, out)
    old = tensors(pruned)
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
    model = loads(out, FAMILIES[family])
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
    pruned, out = pruned_model(root, "llama", "llama"), tmp_path / "out"
    result = recover_tiny(pruned, out, root, verify=True, evaluate=True, measure_data=str(root / "text.txt"))
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
    assert written["protocol"]["loss"] == "kd+lm"
    assert written["schema_version"] == 1
    assert set(written["shards"]) == {path.name for path in out.glob("*.safetensors")}
    for side in ("teacher", "before", "after"):
        assert written[side]["perplexity"] > 1
    assert written["verdict"]
    card = (out / "README.md").read_text()
    assert "llama" in card
    # What is recovered can be recovered again, from the same dense model.
    again = recover_tiny(out, tmp_path / "again", root)
    assert again.source["name"] == "llama"
    assert again.student["name"] == "out"
    check_like_the_source(pruned, tmp_path / "again")


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_shards_and_a_pattern(mode: str, root: Path, tmp_path: Path) -> None:
    pruned = pruned_model(root, "half", "llama", pattern="2:4", dtype=torch.bfloat16, max_shard_size="20KB")
    assert len(list(pruned.glob("*.safetensors"))) > 2
    result = recover_tiny(pruned, tmp_path / "out", root, mode=mode, learning_rate=RATES[mode])
    assert check_like_the_source(pruned, tmp_path / "out")
    weights = {key: weight for key, (_, weight) in tensors(tmp_path / "out").items() if "proj" in key}
    assert weights
    for key, weight in weights.items():
        assert weight.dtype == torch.bfloat16
        assert bool(((weight.view(-1, 4) == 0).sum(-1) >= 2).all()), key
    assert result.after.dtype == result.before.dtype
    index = "model.safetensors.index.json"
    assert json.loads((tmp_path / "out" / index).read_text()) == json.loads((pruned / index).read_text())
    loads(tmp_path / "out", "LlamaForCausalLM")


@pytest.mark.parametrize("loss", ["lm", "kd", "kd+lm", "kd+hidden"])
def test_each_loss_falls(loss: str, root: Path, tmp_path: Path) -> None:
    result = recover_tiny(
        pruned_model(root, "llama", "llama"), tmp_path / "out", root, loss=loss, learning_rate=1e-2, tokens=1280
    )
    losses = [value for _, value in result.training["losses"]]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert result.protocol["loss"] == loss
    assert (result.teacher is None) == (loss == "lm")


def test_a_single_step_is_not_lost_to_the_warm_up(root: Path, tmp_path: Path) -> None:
    result = recover_tiny(pruned_model(root, "llama", "llama"), tmp_path / "out", root, tokens=64)
    assert result.training["steps"] == 1
    assert check_like_the_source(pruned_model(root, "llama", "llama"), tmp_path / "out")


def test_what_the_user_gives_the_trainer_counts(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = RecoveryTrainer.train
    monkeypatch.setattr(RecoveryTrainer, "train", lambda self, **kw: (seen.append(self.args), original(self, **kw))[1])
    given = {"logging_steps": "5", "weight_decay": "0.25", "lr-scheduler-type": "linear", "adam_beta2": 0.9}
    result = recover_tiny(pruned_model(root, "llama", "llama"), tmp_path / "out", root, trainer=given)
    (arguments,) = seen
    assert (arguments.weight_decay, arguments.adam_beta2) == (0.25, 0.9)
    assert arguments.lr_scheduler_type == "linear"
    assert [step for step, _ in result.training["losses"]] == [5, 10]
    check_like_the_source(pruned_model(root, "llama", "llama"), tmp_path / "out")


class Notes(Reporter):
    """Keeps what is told, in order, and the number of steps of each stage."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def stage(self, name: str, total: int) -> None:
        self.told.append(f"{name}: {total}")

    def note(self, message: str) -> None:
        self.told.append(message)

    def warn(self, message: str) -> None:
        self.told.append(message)


def test_budget_in_minutes(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher is asked about no more than the steps that the minutes pay for, and after they are known."""
    monkeypatch.setattr(teach, "time_of_step", lambda *a: 2.0)
    (tmp_path / "long.txt").write_text(TEXT.replace("lazy", "sleepy") * 20)
    told, data = Notes(), str(tmp_path / "long.txt")
    options = {"tokens": None, "minutes": 0.2, "data": data, "batch_size": 2, "held_out": 0.01}
    result = recover_tiny(pruned_model(root, "llama", "llama"), tmp_path / "out", root, reporter=told, **options)
    assert result.training["steps"] == 6
    assert result.training["expected_seconds"] == 12.0
    assert told.told.index("asking the teacher: 12") > next(
        number for number, line in enumerate(told.told) if "6 steps of 64 tokens" in line and "on top" in line
    )
    same = recover_tiny(
        pruned_model(root, "llama", "llama"), tmp_path / "same", root, **{**options, "minutes": None, "tokens": 6 * 64}
    )
    assert same.training["losses"] == result.training["losses"]
    assert same.protocol == result.protocol
    assert weights_of(tmp_path / "same") == weights_of(tmp_path / "out")


def test_a_budget_in_minutes_is_measured_once(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run goes on with the steps, and so with the windows, of the first measurement."""
    monkeypatch.setattr(teach, "time_of_step", lambda *a: 2.0)
    pruned, options = pruned_model(root, "llama", "llama"), {"tokens": None, "minutes": 0.2, "save_minutes": 1e-9}
    with pytest.raises(Interrupted):
        recover_tiny(pruned, tmp_path / "out", root, reporter=StopAt("training", 3), **options)
    monkeypatch.setattr(teach, "time_of_step", lambda *a: 0.5)
    monkeypatch.setattr(teach, "build_cache", lambda *a, **k: pytest.fail("the teacher was asked about other windows"))
    result = recover_tiny(pruned, tmp_path / "out", root, resume=True, **options)
    assert result.training["steps"] == 6


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_step_that_is_measured_is_the_real_one(
    mode: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the teacher: a batch of the same sizes and kinds, and a finite loss."""
    seen: list[dict[str, Any]] = []
    original = LanguageObjective.__call__

    def see(self: Any, model: Any, batch: dict[str, torch.Tensor]) -> Any:
        loss = original(self, model, batch)
        learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        kinds = {name: (value.shape, value.dtype) for name, value in batch.items()}
        seen.append({**kinds, "learning": learning, "finite": bool(torch.isfinite(loss))})
        return loss

    monkeypatch.setattr(LanguageObjective, "__call__", see)
    measured = teach.time_of_step
    monkeypatch.setattr(teach, "time_of_step", lambda *a: 4.0 * min(1.0, 1.0 + measured(*a)))
    pruned = pruned_model(root, "llama", "llama")
    recover_tiny(pruned, tmp_path / "out", root, tokens=None, minutes=0.2, mode=mode, top_k=5)
    assert len(seen) == 2 + 2 * 3  # two for the timing, two in each step
    assert all(each == seen[0] for each in seen)


@pytest.mark.parametrize(("logging", "late"), [("5", True), ("2", False), ("0.5", True)])
def test_logging_that_makes_checkpoints_rarer_than_asked_is_told(
    logging: str, late: bool, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teach, "time_of_step", lambda *a: 60.0)
    result = recover_tiny(
        pruned_model(root, "llama", "llama"), tmp_path / "out", root, trainer={"logging_steps": logging},
        save_minutes=3.0,
    )  # fmt: skip
    told = [line for line in result.warnings if "checkpoints are made where losses are noted" in line]
    assert bool(told) is late
    if late:
        assert "about every 5 min" in told[0]
        assert "not every 3 min" in told[0]


def test_a_checkpoint_that_is_late_is_told_once(root: Path, tmp_path: Path) -> None:
    """Where no step was measured, or the measured one was too fast, it is seen while it trains."""
    result = recover_tiny(
        pruned_model(root, "llama", "llama"), tmp_path / "out", root, trainer={"logging_steps": "4"}, save_minutes=1e-9
    )
    assert sum("a checkpoint is late" in line and "every 4 steps" in line for line in result.warnings) == 1


@pytest.mark.parametrize(
    ("steps", "seconds", "expected"), [(400, 60.0, 10), (400, 0.1, 20), (400, None, 20), (10, 1.0, 1), (400, 3e3, 1)]
)
def test_checkpoints_can_be_made_as_often_as_asked(steps: int, seconds: float | None, expected: int) -> None:
    """They are made where losses are noted."""
    assert logging_steps(steps, seconds, save_minutes=10.0) == expected


@pytest.mark.parametrize("verify", [True, False])
def test_the_verdict_says_whether_zeros_were_checked(verify: bool, root: Path, tmp_path: Path) -> None:
    told = recover_tiny(
        pruned_model(root, "llama", "llama"), tmp_path / "out", root, mode="blocks", verify=verify
    ).verdict[0]
    assert ("every held zero was checked" in told) is verify


def test_measuring_data_is_looked_at_before_training(root: Path, tmp_path: Path) -> None:
    told = Stages()
    with pytest.raises(SecateurError, match="nowhere"):
        recover_tiny(
            pruned_model(root, "llama", "llama"), tmp_path / "out", root, evaluate=True,
            files=[tmp_path / "nowhere.jsonl"], reporter=told,
        )  # fmt: skip
    assert "training" not in told.totals
    assert not list(tmp_path.iterdir())
