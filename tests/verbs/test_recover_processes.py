"""`recover` in several processes: the model of one process with the same batches, one OUT, and one end for all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import secateur
from secateur import processes
from secateur.errors import Interrupted, OutputError, UsageError
from secateur.recovery import trainer as training
from secateur.recovery.arguments import check_launch, local_device
from secateur.recovery.objectives import LanguageObjective
from secateur.recovery.parts import in_parts, whole
from secateur.recovery.trainer import Tell, last_checkpoint
from secateur.verbs import teach
from tests.forking import Forking
from tests.models import save_tiny
from tests.processes import divide_on_cpu, run_together

COUNT = 2
MODES = ("full", "lora", "norms-and-biases")
TEXT = "The quick brown fox jumps over the lazy dog, and 12 others follow it; nobody knows why. " * 14
FSDP = {"trainer": {"fsdp": "true", "fsdp_config": {}}}
RECOMPUTED = {"activation_checkpointing": True, "reshard_after_forward": False}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "text.txt").write_text(TEXT)
    for family in ("llama", "gpt2"):
        save_tiny(folder / family, family)
        secateur.prune(
            folder / family, folder / f"{family}-pruned", method="magnitude", sparsity=0.5, evaluate=False, verify=False
        )
    return folder


@pytest.fixture(autouse=True)
def cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(root / "cache"))


def _recover(root: Path, out: Path, family: str = "llama", **changes: Any) -> Any:
    values = {
        "data": str(root / "text.txt"), "sequence_length": 32, "tokens": 640, "batch_size": 2, "evaluate": False,
        "verify": False, "device": "cpu", "compute_dtype": "float32", "learning_rate": 3e-3, **changes,
    }  # fmt: skip
    return secateur.recover(root / f"{family}-pruned", out, **values)


def _is_first() -> bool:
    return os.environ["RANK"] == "0"


def _watch_parts() -> None:
    """FSDP must have divided the model, and Adam must never have seen a gradient where a weight is held."""
    original = training.HoldZeros.on_optimizer_step

    def watched(self: Any, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        for name, mask in self._held.pruned.items():
            parameter = self._model.get_parameter(name)
            assert in_parts(parameter)
            assert 0 < parameter.to_local().numel() < parameter.numel()
            assert not bool(whole(optimizer.state[parameter]["exp_avg"])[whole(mask)].any())

    training.HoldZeros.on_optimizer_step = watched


def _all_ways(root: Path, folder: Path) -> None:
    """Every mode, data parallel and then divided; each process keeps what it was given."""
    given = {}
    for mode in MODES:
        result = _recover(root, folder / mode, mode=mode, verify=mode == "full", evaluate=False)
        given[mode] = result.to_dict()
    divide_on_cpu()
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"  # as `accelerate config` proposes
    trainer = {
        "fsdp": "true",
        "fsdp_config": {"activation_checkpointing": True, "state_dict_type": "SHARDED_STATE_DICT"},
    }
    _recover(root, folder / "fsdp-lora", mode="lora", trainer=trainer)
    _watch_parts()
    _recover(root, folder / "fsdp-full", mode="full", **FSDP)
    _stopped_and_resumed(root, folder / "fsdp-resumed")
    (folder / f"given{os.environ['RANK']}.json").write_text(json.dumps(given))


def _stopped_and_resumed(root: Path, out: Path) -> None:
    """Ctrl-C in all processes, with the optimiser's state saved in parts."""
    options = {
        "trainer": {"fsdp": "true", "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}},
        "save_minutes": 1e-9,
    }
    original = Tell.on_step_end

    def stop(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        original(self, args, state, *rest, **kwargs)
        if state.global_step == 3:
            raise KeyboardInterrupt

    Tell.on_step_end = stop
    processes._PATIENCE = 0.5  # the first lives on here, and the others wait to see it leave
    with pytest.raises(UsageError, match="--minutes needs a measured step"):
        _recover(root, out, **{**options, "tokens": None, "minutes": 1.0})
    with pytest.raises(Interrupted, match="what was done is kept"):
        _recover(root, out, **options)
    Tell.on_step_end = original
    assert (out.with_name("fsdp-resumed.partial") / "trainer" / "checkpoint-2" / "optimizer_0").is_dir()
    _recover(root, out, resume=True, **options)


@pytest.fixture(scope="module")
def together(root: Path, forking: Forking, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    os.environ["SECATEUR_CACHE"] = str(root / "cache")
    assert run_together(forking.executable, COUNT, _all_ways, root, folder) == [0] * COUNT
    return folder


def _weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(out / "model.safetensors"))


def _check_zeros(root: Path, out: Path, family: str = "llama") -> None:
    made = _weights(out)
    for name, weight in _weights(root / f"{family}-pruned").items():
        if weight.ndim == 2 and float((weight == 0).float().mean()) > 0.1:
            assert torch.equal(made[name] == 0, weight == 0), name


@pytest.mark.parametrize("kind", [*MODES, "fsdp-lora", "fsdp-full", "fsdp-resumed"])
def test_it_is_the_model_of_one_process_with_the_same_batches(
    kind: str, together: Path, root: Path, tmp_path: Path
) -> None:
    mode = kind.removeprefix("fsdp-").replace("resumed", "full")
    alone = _recover(root, tmp_path / "alone", mode=mode, batch_size=2 * COUNT)
    expected, made, before = (_weights(out) for out in (tmp_path / "alone", together / kind, root / "llama-pruned"))
    assert made.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(made[name], weight, rtol=0, atol=1e-5)
    assert max(float((made[name] - before[name]).abs().max()) for name in made) > 1e-3
    _check_zeros(root, together / kind)
    result = json.loads((together / kind / "secateur.json").read_text())
    assert result["training"]["tokens"] == 640
    assert result["training"]["steps"] == 5 == alone.training["steps"]
    assert result["protocol"]["processes"] == COUNT
    for (step, loss), (own_step, own_loss) in zip(alone.training["losses"], result["training"]["losses"], strict=True):
        assert (step, loss) == (own_step, pytest.approx(own_loss, abs=1e-5))


def test_every_process_is_given_the_result_and_one_folder_is_there(together: Path) -> None:
    first, second = (json.loads((together / f"given{rank}.json").read_text()) for rank in range(COUNT))
    assert first == second
    for mode in MODES:
        assert first[mode] == json.loads((together / mode / "secateur.json").read_text())
    assert first["full"]["verified"]
    assert {path.name for path in together.iterdir() if path.is_dir()} == {
        *MODES, "fsdp-lora", "fsdp-full", "fsdp-resumed",
    }  # fmt: skip


# Kill and resume


def _whole_and_killed(root: Path, folder: Path) -> None:
    options: dict[str, Any] = {"family": "gpt2", "save_minutes": 1e-9}
    _recover(root, folder / "whole", **options)
    original = Tell.on_step_end

    def deadly(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if state.global_step == 4 and _is_first():
            os.kill(os.getpid(), signal.SIGKILL)

    Tell.on_step_end = deadly
    _recover(root, folder / "out", **options)


def _resumed(root: Path, folder: Path) -> None:
    _recover(root, folder / "out", family="gpt2", save_minutes=1e-9, resume=True)


def test_killed_and_resumed_is_the_uninterrupted_run(root: Path, forking: Forking, tmp_path: Path) -> None:
    """GPT-2 has dropout, so that random numbers of each process count."""
    first, second = run_together(forking.executable, COUNT, _whole_and_killed, root, tmp_path)
    assert first == -signal.SIGKILL
    assert second not in (0, None)
    assert last_checkpoint(tmp_path / "out.partial" / "trainer") is not None
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="processes was 2, now 1"):
        _recover(root, tmp_path / "out", family="gpt2", save_minutes=1e-9, resume=True)
    assert run_together(forking.executable, COUNT, _resumed, root, tmp_path) == [0] * COUNT
    expected, made = _weights(tmp_path / "whole"), _weights(tmp_path / "out")
    assert all(torch.equal(made[name], weight) for name, weight in expected.items())
    assert not (tmp_path / "out.partial").exists()


# One failing process ends all


def _sees_no_cache(root: Path, folder: Path) -> None:
    if not _is_first():
        teach.cached_folder = lambda key: folder / "nowhere"
    _recover(root, folder / "out")


def _loss_is_nan_in_one(root: Path, folder: Path) -> None:
    original, calls = LanguageObjective.__call__, [0]

    def poisoned(self: Any, *args: Any) -> Any:
        calls[0] += 1
        loss = original(self, *args)
        return loss * float("nan") if calls[0] == 6 and not _is_first() else loss

    LanguageObjective.__call__ = poisoned
    _recover(root, folder / "out", save_minutes=1e-9)


def _breaks_in_one(root: Path, folder: Path) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("of this process")

    processes._PATIENCE = 2.0  # nobody answers
    if not _is_first():
        Tell.on_step_end = broken
    _recover(root, folder / "out", save_minutes=1e-9)


@pytest.mark.parametrize(
    ("what", "statuses", "told", "kept"),
    [
        (_sees_no_cache, [2, 2], ["process 0 told: process 1: process 1 does not see"], False),
        (_loss_is_nan_in_one, [1, 1], ["process 0 told: the loss is not finite at step 3"], True),
        (_breaks_in_one, [1, 1], ["MemoryError"], True),
    ],
    ids=["before", "loss", "broken"],
)
def test_an_error_in_one_process_ends_all(
    what: Any, statuses: list[int], told: list[str], kept: bool, root: Path, forking: Forking, tmp_path: Path,
    capfd: Any,
) -> None:  # fmt: skip
    assert run_together(forking.executable, COUNT, what, root, tmp_path) == statuses
    said = capfd.readouterr().err
    for words in told:
        assert words in said
    assert said.count(" told: ") <= 1
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists() == kept


# What the first process decides


def _minutes(root: Path, folder: Path) -> None:
    def seconds(*args: Any) -> float:
        assert _is_first()
        return 2.0

    teach.time_of_step = seconds
    result = _recover(root, folder / "out", tokens=None, minutes=0.1)
    assert result.training["steps"] == 3
    assert result.training["tokens"] == 3 * COUNT * 2 * 32


def test_minutes_are_measured_by_the_first(root: Path, forking: Forking, tmp_path: Path) -> None:
    assert run_together(forking.executable, COUNT, _minutes, root, tmp_path) == [0] * COUNT


def test_the_launcher(root: Path, tmp_path: Path) -> None:
    """In earnest, by the command line: one JSON object, said by one process."""
    start = ["--multi_gpu", "--num_processes", str(COUNT), "--num_machines", "1", "--mixed_precision", "no",
             "--dynamo_backend", "no"]  # fmt: skip
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *start, "-m", "secateur", "recover"]
    command = [
        *launcher, str(root / "llama-pruned"), "-o", str(tmp_path / "out"), "--data", str(root / "text.txt"),
        "--sequence-length", "32", "--tokens", "256", "--no-evaluate", "--no-verify", "--device", "cpu", "--json",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(secateur.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["protocol"]["processes"] == COUNT
    assert done.stderr.count("4 steps of 64 tokens in 2 processes") == 1
    _check_zeros(root, tmp_path / "out")


# Refused before anything is read


@pytest.mark.parametrize(
    ("given", "mode", "count", "environment", "words"),
    [
        ({}, "blocks", 2, {}, "--mode blocks runs in one process, and 2 were started"),
        ({"deepspeed": "x.json"}, "full", 2, {}, "--trainer deepspeed is not supported: DeepSpeed"),
        ({"parallelism-config": "x"}, "full", 2, {}, "--trainer parallelism-config is not supported: tensor"),
        ({}, "full", 2, {"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED is not supported"),
        ({}, "full", 2, {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "PARALLELISM_CONFIG is not supported"),
        ({}, "full", 2, {"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron"),
        ({}, "full", 2, {"ACCELERATE_USE_FSDP": "true"}, "FSDP_VERSION 1 is not supported"),
        ({"fsdp": "true"}, "full", 1, {}, "FSDP divides a model among processes, and there is one"),
    ],
)
def test_what_cannot_be_trained_that_way(
    given: dict[str, str], mode: str, count: int, environment: dict[str, str], words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as caught:
        check_launch(given, mode, count)
    assert words in caught.value.message
    assert caught.value.hint


def test_what_can_be_trained_that_way(monkeypatch: pytest.MonkeyPatch) -> None:
    check_launch({"fsdp": "true", "fsdp_config": "{}"}, "full", 2)
    check_launch({"fsdp": "false"}, "lora", 1)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_launch({}, "norms-and-biases", 2)


def test_each_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert local_device(torch.device("cuda"), 2) == torch.device("cuda", rank)
    assert local_device(torch.device("cuda", 1), 1) == torch.device("cuda", 1)
    assert local_device(torch.device("cpu"), 2) == torch.device("cpu")
    with pytest.raises(UsageError, match="is one device, and 2 processes were started"):
        local_device(torch.device("cuda", 1), 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match="process 2 of this machine has no device: there are 2"):
        local_device(torch.device("cuda"), 3)


def test_processes_that_cannot_be_found(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="WORLD_SIZE is 2, but the other processes cannot be found") as caught:
        _recover(root, tmp_path / "out")
    assert "torchrun" in caught.value.hint
    assert not list(tmp_path.iterdir())
