"""All of `recover` on tiny models: zeros in place, files like the source's, each mode and loss, budgets."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.errors import SecateurError
from secateur.recovery.trainer import RecoveryTrainer
from secateur.verbs import teach
from tests.verbs.recovering import (
    MODES,
    RATES,
    Stages,
    check_like_the_source,
    loads,
    pruned_model,
    recover_tiny,
    tensors,
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
    assert written["protocol"]["loss"] == "kd"
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


@pytest.mark.parametrize("loss", ["lm", "kd", "kd+hidden"])
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


def test_budget_in_minutes(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(teach, "time_of_step", lambda *a: 2.0)
    result = recover_tiny(pruned_model(root, "llama", "llama"), tmp_path / "out", root, tokens=None, minutes=0.2)
    assert result.training["steps"] == 6
    assert result.training["expected_seconds"] == 12.0


@pytest.mark.parametrize(
    ("steps", "seconds", "expected"), [(400, 60.0, 10), (400, 0.1, 20), (400, None, 20), (10, 1.0, 1), (400, 3e3, 1)]
)
def test_checkpoints_can_be_made_as_often_as_asked(steps: int, seconds: float | None, expected: int) -> None:
    """They are made where losses are noted."""
    assert importlib.import_module("secateur.verbs.teach")._logging_steps(steps, seconds, save_minutes=10.0) == expected


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
