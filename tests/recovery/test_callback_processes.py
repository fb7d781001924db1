"""The callback where several processes train: each holds the same masks, and the result is that of one process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from secateur.errors import UsageError
from secateur.recovery.callback import SparsityCallback
from secateur.recovery.parts import gather, in_parts, whole
from secateur.recovery.placement import check_placement
from secateur.schedules import Matrix, make_schedule
from tests.processes import divide_on_cpu, run_together
from tests.recovery.test_callback import SCHEDULES, pruned_model, rows

STEPS = 8
COUNT = 2


class Moments(TrainerCallback):
    """Looks into Adam after every step: where a weight is held, it has never seen a gradient."""

    def __init__(self, callback):
        self.callback, self.seen, self.parts = callback, 0, set()

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        for name, mask in self.callback._held.pruned.items():
            parameter = model.get_parameter(name)
            self.parts.add(in_parts(parameter))
            moment = whole(optimizer.state[parameter]["exp_avg"])
            assert not bool(moment[whole(mask)].any()), name
            self.seen += 1


def train(schedule, folder, *, batch, fsdp=False, until=None):
    """One training; afterwards whole weights and masks, in every process."""
    model, callback = pruned_model(), SparsityCallback(schedule, **SCHEDULES[schedule])
    moments = Moments(callback)
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=batch, gradient_accumulation_steps=2, use_cpu=True,
        learning_rate=5e-3, weight_decay=0.1, max_grad_norm=1e9, report_to="none", disable_tqdm=True, logging_steps=2,
        save_steps=4, **({"fsdp": True, "fsdp_config": {}} if fsdp else {}),
    )  # fmt: skip
    watching = [callback, moments] if schedule == "hold" else [callback]
    trainer = Trainer(model, arguments, train_dataset=rows(64), callbacks=watching)
    trainer.train(resume_from_checkpoint=until)
    assert schedule != "hold" or moments.seen
    assert schedule != "hold" or moments.parts == {fsdp}
    weights = gather({name.removeprefix("module."): p for name, p in trainer.model.named_parameters()}, keep=True)
    masks = {name: whole(mask) for name, mask in callback._held.pruned.items()}
    return {"weights": weights, "masks": masks, "history": callback.history}


def _all_of(folder: Path):
    """What a process of two does, and keeps for the test to look at."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    kept = {name: train(name, folder / name, batch=2) for name in SCHEDULES}
    divide_on_cpu()
    kept["fsdp"] = train("hold", folder / "fsdp", batch=2, fsdp=True)
    kept["resumed"] = train("hold", folder / "fsdp", batch=2, fsdp=True, until=str(folder / "fsdp" / "checkpoint-4"))
    with pytest.raises(UsageError, match="schedule gradual compares the weights of whole matrices"):
        train("gradual", folder / "refused", batch=2, fsdp=True)
    layer = torch.nn.Linear(4, 4)
    cut = distribute_tensor(layer.weight.detach(), init_device_mesh("cpu", (COUNT,)), [Shard(1)])
    layer.weight = torch.nn.Parameter(cut)
    matrices = [Matrix("weight", layer.weight, lambda tensor: [tensor])]
    with pytest.raises(UsageError, match="tensor parallelism, which cuts weight"):
        check_placement(SimpleNamespace(deepspeed=None), layer, matrices, make_schedule("hold"))
    torch.save(kept, folder / f"rank{dist.get_rank()}.pt")


@pytest.fixture(scope="module")
def ranks(forking, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    assert run_together(forking.executable, COUNT, _all_of, folder) == [0] * COUNT
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(COUNT)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_data_parallel_is_one_process_with_the_same_batches(schedule, ranks, tmp_path):
    alone = train(schedule, tmp_path, batch=2 * COUNT)
    for rank in ranks:
        made = rank[schedule]
        assert made["history"] == alone["history"]
        assert made["masks"].keys() == alone["masks"].keys()
        for name, mask in alone["masks"].items():
            assert torch.equal(made["masks"][name], mask), name
            assert torch.equal(made["weights"][name] == 0, mask), name
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(made["weights"][name], weight, rtol=0, atol=1e-5)


def test_fsdp2_holds_the_same_zeros(ranks):
    for rank in ranks:
        for kind in ("fsdp", "resumed"):
            made, expected = rank[kind], rank["hold"]
            for name, mask in expected["masks"].items():
                assert torch.equal(made["masks"][name], mask), name
                assert torch.equal(made["weights"][name] == 0, mask), name
            for name, weight in expected["weights"].items():
                torch.testing.assert_close(made["weights"][name], weight, rtol=0, atol=1e-5)
        for name, weight in rank["fsdp"]["weights"].items():
            assert torch.equal(rank["resumed"]["weights"][name], weight), name


class FullyShardedDataParallel(torch.nn.Module):
    """The name FSDP1 goes by."""


def test_what_cannot_be_followed_is_named(monkeypatch):
    model, hold = torch.nn.Sequential(torch.nn.Linear(4, 4)), make_schedule("hold")
    matrices = [Matrix("0.weight", model[0].weight, lambda tensor: [tensor])]
    nothing, deepspeed = SimpleNamespace(deepspeed=None), SimpleNamespace(deepspeed={"zero": 3})
    check_placement(nothing, model, matrices, hold)
    with pytest.raises(UsageError, match="DeepSpeed"):
        check_placement(deepspeed, model, matrices, hold)
    with pytest.raises(UsageError, match="FSDP1"):
        check_placement(nothing, torch.nn.Sequential(FullyShardedDataParallel()), matrices, hold)
    empty = [Matrix("0.weight", torch.nn.Parameter(torch.empty(0)), lambda tensor: [tensor])]
    with pytest.raises(UsageError, match="FSDP1"):
        check_placement(nothing, model, empty, hold)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match="DeepSpeed"):
        check_placement(nothing, model, matrices, hold)
