"""The callback in stock Trainer scripts: zeros hold, counts are exact, a resumed run is the uninterrupted one."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from secateur.engine.blocks import find_structure
from secateur.errors import CheckpointError, TargetError, UnknownNameError, UsageError, VerificationError
from secateur.recovery.callback import STATE_FILE, SparsityCallback, targeted, unwrapped
from secateur.schedules import Pruner
from secateur.schedules.gradual import Gradual
from tests.models import VOCABULARY, tiny_model

STEPS = 12
SCHEDULES = {
    "hold": {},
    "gradual": {"sparsity": 0.7, "begin": 0.1, "end": 0.7, "every": 2},
    "movement": {"sparsity": 0.7, "begin": 0.1, "end": 0.7},
    "soft-movement": {"penalty": 50.0, "threshold": 0.47, "end": 0.5},
    "lottery": {"sparsity": 0.7, "rounds": 3, "rewind": 2},
}


def rows(count=48, length=8):
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, VOCABULARY, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def pruned_model(family="llama", share=0.5, dtype=None):
    """Half of the weights of every matrix are zero, the other half is never."""
    model = tiny_model(family)
    for matrix in find_structure(model).matrices:
        weight = model.get_parameter(matrix.name)
        order = weight.detach().abs().flatten().argsort()
        weight.data.view(-1)[order[: round(share * weight.numel())]] = 0.0
    return model.to(dtype) if dtype else model


def zeros_of(model):
    return {m.name: model.get_parameter(m.name).detach() == 0 for m in find_structure(model).matrices}


class Watch(TrainerCallback):
    """Runs after the callback under test and looks at what it left."""

    def __init__(self, callback):
        self.callback, self.steps, self.norms = callback, 0, []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        for name, mask in self.callback._held.pruned.items():
            weight = model.get_parameter(name).detach()[mask]
            assert not bool(weight.any()), name
            assert not bool(weight.signbit().any()), name
        self.steps += 1

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for name, mask in self.callback._held.pruned.items():
            gradient = model.get_parameter(name).grad
            assert not bool(gradient[mask].any()), name
            assert bool(gradient[~mask].any()) or bool(mask.all()), name


def trainer_of(folder, model, callback, *more, **changes):
    values = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 11,
        **changes,
    }
    return Trainer(
        model, TrainingArguments(**values), train_dataset=rows(), eval_dataset=rows(8), callbacks=[callback, *more]
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_works_in_a_stock_trainer(name, tmp_path):
    model = pruned_model() if name == "hold" else tiny_model("llama")
    before = zeros_of(model)
    callback = SparsityCallback(name, **SCHEDULES[name])
    watch = Watch(callback)
    trainer = trainer_of(tmp_path, model, callback, watch, weight_decay=0.1)
    trainer.train()
    assert watch.steps == STEPS
    after = zeros_of(model)
    total = sum(mask.numel() for mask in after.values())
    assert callback.sparsity == sum(int(mask.sum()) for mask in after.values()) / total
    if name == "hold":
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert callback.history == [(0, 0.5)]
    elif name == "soft-movement":
        assert 0 < callback.sparsity < 1
    else:
        assert all(int(mask.sum()) == round(0.7 * mask.numel()) for mask in after.values())
        assert len(callback.history) >= 3
        assert [share for _, share in callback.history] == sorted(share for _, share in callback.history)
    assert callback.history[-1][1] == callback.sparsity
    logged = [entry["sparsity"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == STEPS
    assert logged[-1] == callback.sparsity


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.1},
        {"optim": "adamw_torch", "weight_decay": 0.1},
        {"optim": "adafactor"},
        {"optim": "adamw_torch", "gradient_accumulation_steps": 3, "max_grad_norm": 0.01},
    ],
    ids=["sgd", "adamw", "adafactor", "accumulation"],
)
@pytest.mark.parametrize("name", ["hold", "gradual"])
def test_zeros_hold_under_every_optimiser(name, changes, tmp_path):
    model = pruned_model(share=0.4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    callback = SparsityCallback(name, **SCHEDULES[name])
    watch = Watch(callback)
    trainer_of(tmp_path, model, callback, watch, max_steps=6, **changes).train()
    assert watch.steps == 6
    for key, mask in zeros_of(model).items():
        assert bool(mask[before[key] == 0].all())
        assert not torch.equal(model.state_dict()[key], before[key])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_few_bits(name, dtype, tmp_path):
    model = pruned_model(dtype=dtype) if name == "hold" else tiny_model("llama").to(dtype)
    callback = SparsityCallback(name, **SCHEDULES[name])
    watch = Watch(callback)
    trainer_of(tmp_path, model, callback, watch, optim="sgd").train()
    assert model.dtype == dtype
    assert watch.steps == STEPS
    if "sparsity" in SCHEDULES[name]:
        assert all(int(m.sum()) == round(0.7 * m.numel()) for m in callback._held.pruned.values())


def test_the_norm_that_clips_is_that_of_the_kept_weights(tmp_path):
    model = pruned_model()
    callback = SparsityCallback()
    trainer = trainer_of(tmp_path, model, callback, max_steps=1, learning_rate=0.0, per_device_train_batch_size=48)
    trainer.train()
    zeros = zeros_of(model)
    batch = rows()
    model(
        input_ids=torch.stack([row["input_ids"] for row in batch]), labels=torch.stack([row["labels"] for row in batch])
    ).loss.backward()
    squares = 0.0
    for key, parameter in model.named_parameters():
        gradient = parameter.grad.masked_fill(zeros[key], 0) if key in zeros else parameter.grad
        squares += float((gradient.double() ** 2).sum())
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(squares**0.5, rel=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    def run(folder, resume=None, **callback_options):
        model = pruned_model() if name == "hold" else tiny_model("llama")
        callback = SparsityCallback(name, **SCHEDULES[name], **callback_options)
        trainer = trainer_of(folder, model, callback, save_strategy="steps", save_steps=5, weight_decay=0.1)
        trainer.train(resume_from_checkpoint=resume)
        losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        return model.state_dict(), losses, callback

    whole, losses, callback = run(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    weights, again, resumed = run(tmp_path / "again", str(checkpoint), resume_from=checkpoint)
    assert again == losses
    assert all(torch.equal(weights[key], whole[key]) for key in whole)
    assert resumed.history == callback.history
    assert resumed.sparsity == callback.sparsity
    # In the folder of the run itself no path is needed, from a checkpoint of a later round either.
    weights, again, _ = run(tmp_path / "whole", str(tmp_path / "whole" / "checkpoint-10"))
    assert again == losses
    assert all(torch.equal(weights[key], whole[key]) for key in whole)


def test_lottery_rewinds_the_learning_rate_of_the_trainer(tmp_path):
    callback = SparsityCallback("lottery", sparsity=0.5, rounds=3)
    trainer = trainer_of(tmp_path, tiny_model("llama"), callback, lr_scheduler_type="cosine", warmup_steps=3)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates[:4] == rates[4:8] == rates[8:]
    assert rates[0] == 0
    assert max(rates) == pytest.approx(1e-2)


def test_what_cannot_be_resumed_is_said(tmp_path):
    def run(callback, resume=None):
        options = {"save_strategy": "steps", "save_steps": 5, "max_steps": 6}
        trainer_of(tmp_path, pruned_model(), callback, **options).train(resume_from_checkpoint=resume)

    run(SparsityCallback())
    checkpoint = tmp_path / "checkpoint-5"
    with pytest.raises(CheckpointError, match=r"written by hold\(\) on \*, not by gradual"):
        run(SparsityCallback("gradual", sparsity=0.7), str(checkpoint))
    with pytest.raises(CheckpointError, match=r"not by hold\(\) on \*mlp\*"):
        run(SparsityCallback(targets="*mlp*"), str(checkpoint))
    renamed = (checkpoint / STATE_FILE).read_bytes().replace(b"pruned/model", b"mislaid/mode")
    (checkpoint / STATE_FILE).write_bytes(renamed)
    with pytest.raises(CheckpointError, match="does not fit"):
        run(SparsityCallback(), str(checkpoint))
    (checkpoint / STATE_FILE).write_bytes(b"\x08")
    with pytest.raises(CheckpointError, match="cannot be read"):
        run(SparsityCallback(), str(checkpoint))
    (checkpoint / STATE_FILE).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        run(SparsityCallback(), str(checkpoint))


def test_the_best_checkpoint_comes_with_its_masks(tmp_path):
    class Worse(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

    model = tiny_model("llama")
    callback = SparsityCallback("gradual", sparsity=0.7, end=1.0, every=2)
    options = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    trainer = trainer_of(tmp_path, model, callback, Worse(), load_best_model_at_end=True, **options)
    trainer.train()
    assert trainer.state.best_global_step == 4
    assert callback.history == [(0, 0.0), (2, callback.history[1][1]), (4, callback.sparsity)]
    assert callback.sparsity == pytest.approx(0.7 - 0.7 * (2 / 3) ** 3, abs=1e-3)
    masks = zeros_of(model).values()
    assert callback.sparsity == sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


def test_targets_ignore_and_frozen_weights(tmp_path):
    model = pruned_model()
    callback = SparsityCallback("gradual", sparsity=0.75, end=1.0, targets=["*mlp*"], ignore=["*down_proj"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("gate_proj" not in name)
    trainer_of(tmp_path, model, callback).train()
    for name, mask in zeros_of(model).items():
        if "gate_proj" in name or "up_proj" in name:
            assert int(mask.sum()) == round(0.75 * mask.numel())
        else:
            assert int(mask.sum()) < round(0.5 * mask.numel())  # not held
    assert callback.sparsity == 0.75
    frozen = SparsityCallback("movement", sparsity=0.5)
    with pytest.raises(UsageError, match="gate_proj.*frozen"):
        trainer_of(tmp_path, model, frozen).train()
    model.requires_grad_(False).get_parameter("model.norm.weight").requires_grad_(True)
    hold = SparsityCallback("hold", targets="*gate_proj")
    trainer_of(tmp_path, model, hold).train()
    assert hold.sparsity == 0.75


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
@pytest.mark.parametrize("name", ["gradual", "movement"])
def test_transposed_matrices_and_experts_are_groups_of_their_own(family, name, tmp_path):
    model = tiny_model(family)
    callback = SparsityCallback(name, sparsity=0.6, begin=0.0, end=1.0, every=3)
    trainer_of(tmp_path, model, callback, max_steps=3).train()
    matrices = find_structure(model).matrices
    assert any(matrix.transposed or matrix.experts for matrix in matrices)
    for matrix in matrices:
        for part in matrix.slices(callback._held.pruned[matrix.name]):
            assert int(part.sum()) == round(0.6 * part.numel())


def test_n_m_lies_along_the_inputs_of_a_transposed_matrix(tmp_path):
    model = tiny_model("gpt2")
    trainer_of(tmp_path, model, SparsityCallback("gradual", pattern="2:4", end=1.0), max_steps=3).train()
    for matrix in find_structure(model).matrices:
        (part,) = matrix.slices(model.get_parameter(matrix.name).detach())
        assert bool(((part.reshape(part.shape[0], -1, 4) == 0).sum(-1) == 2).all())


def test_refusals_come_before_the_first_step(tmp_path):
    with pytest.raises(UnknownNameError, match="gradul"):
        SparsityCallback("gradul")
    with pytest.raises(UnknownNameError, match="speed"):
        SparsityCallback("gradual", sparsity=0.5, speed=2)
    with pytest.raises(UsageError, match="beside a schedule object"):
        SparsityCallback(Gradual(sparsity=0.5), every=2)
    refused = {
        "no zeros": (UsageError, SparsityCallback(), {}),
        "matches no prunable": (TargetError, SparsityCallback("gradual", sparsity=0.5, targets=["*convolution*"]), {}),
        "leave no matrix": (TargetError, SparsityCallback("gradual", sparsity=0.5, ignore=["*"]), {}),
        "too few": (UsageError, SparsityCallback("lottery", sparsity=0.5, rounds=20), {}),
    }
    for message, (error, callback, changes) in refused.items():
        model = tiny_model("llama")
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(error, match=message):
            trainer_of(tmp_path, model, callback, **changes).train()
        assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)


def test_a_weight_that_is_filled_behind_the_callback_is_noticed(tmp_path):
    class Vandal(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == STEPS:
                model.get_parameter("model.layers.0.mlp.up_proj.weight").data.fill_(1.0)

    with pytest.raises(VerificationError, match="up_proj"):
        trainer_of(tmp_path, pruned_model(), SparsityCallback(), Vandal()).train()


def test_a_schedule_of_one_s_own(tmp_path):
    class First(Pruner):
        def after_step(self, step):
            self.pruned = {name: mask.clone() for name, mask in self.pruned.items()}
            for mask in self.pruned.values():
                mask[0] = True
            return step == 2

    class Schedule:
        name = "first-row"

        def start(self, training):
            return First(training)

    model = tiny_model("llama")
    callback = SparsityCallback(Schedule())
    trainer_of(tmp_path, model, callback, Watch(callback), max_steps=4, save_strategy="steps", save_steps=2).train()
    assert (tmp_path / "checkpoint-2" / STATE_FILE).is_file()
    assert [step for step, _ in callback.history] == [0, 2]
    assert all(bool(mask[0].all()) and not bool(mask[1:].any()) for mask in zeros_of(model).values())


def test_wrappers_are_looked_through_and_adapters_left_alone():
    model = tiny_model("llama")
    assert unwrapped(torch.nn.DataParallel(model)) is model
    assert unwrapped(torch.compile(model)) is model

    class Adapted(torch.nn.Module):
        adapter_layer_names = ("lora_a",)

        def __init__(self, base):
            super().__init__()
            self.base_layer, self.lora_a = base, torch.nn.Linear(32, 4)

    layer = model.model.layers[0].mlp
    layer.up_proj = Adapted(layer.up_proj)
    names = {matrix.name for matrix in targeted(model, ("*layers.0.mlp.up_proj*",), ())}
    assert names == {"model.layers.0.mlp.up_proj.base_layer.weight"}
