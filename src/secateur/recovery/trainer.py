"""The Hugging Face Trainer with our losses, held zeros, and checkpoints that a killed run can trust."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.errors import CheckpointError, RunError, UnknownNameError, UsageError
from secateur.progress import Reporter
from secateur.recovery.zeros import HeldZeros

DECIDED = frozenset({
    "output_dir", "max_steps", "num_train_epochs", "save_strategy", "save_steps", "save_total_limit",
    "load_best_model_at_end", "eval_strategy", "do_eval", "do_predict", "remove_unused_columns",
    "label_smoothing_factor", "resume_from_checkpoint", "push_to_hub", "fsdp", "fsdp_config", "deepspeed",
    "parallelism_config", "auto_find_batch_size", "use_cpu", "seed",
})  # fmt: skip
"""Arguments of the stock Trainer that would contradict what recover does itself."""
TRAINED = "trained.safetensors"
"""The trained parameters in a checkpoint folder."""
COMPLETE = "complete"
"""A file in a checkpoint folder that was written to its end."""

Objective = Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]
"""Loss of a batch through a model."""


class RecoveryTrainer(transformers.Trainer):
    """A stock Trainer that minimises ``objective`` and stops at the first loss that is not finite."""

    def __init__(self, *args: Any, objective: Objective, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._objective = objective
        # The objective is a mean over the batch: the Trainer divides it by the number of accumulated batches.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = self._objective(model, inputs)
        if not torch.isfinite(loss):
            raise _not_finite("loss", self.state.global_step, Path(self.args.output_dir))
        return (loss, {}) if return_outputs else loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            raise RunError(
                f"a checkpoint could not be written: {error}", hint="free some space and go on with --resume"
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write what is trained, under the model's own names.

        The stock way goes through ``save_pretrained`` and reads back without asking whether everything matched: models
        whose files are laid out otherwise (fused experts) and heads beside adapters would be lost on resuming.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        trained = _trained(self.model)
        for parameter in trained.values():
            if not torch.isfinite(parameter).all():
                raise _not_finite("weights", self.state.global_step - 1, Path(str(self.args.output_dir)))
        save_file({name: parameter.detach().contiguous() for name, parameter in trained.items()}, folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / TRAINED)
        trained = _trained(model or self.model)
        if saved.keys() != trained.keys():
            raise CheckpointError(f"{resume_from_checkpoint} does not hold the weights of this run")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        # Half precision with a scaler overflows on purpose now and then and skips the step.
        if norm is not None and not self.args.fp16 and not torch.isfinite(torch.as_tensor(norm)):
            raise _not_finite("gradient", self.state.global_step, Path(self.args.output_dir))
        return norm


def _trained(model: Any) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _not_finite(what: str, step: int, folder: Path) -> RunError:
    last = last_checkpoint(folder)
    what = f"{what} are" if what == "weights" else f"{what} is"
    kept = f"the last good checkpoint is {last.name}" if last else "there is no checkpoint yet"
    return RunError(
        f"the {what} not finite at step {step + 1}; {kept}",
        hint="start again with --overwrite and a smaller --learning-rate",
    )


class HoldZeros(transformers.TrainerCallback):
    """Clears gradients after each backward and weights after each step."""

    def __init__(self, held: HeldZeros, model: nn.Module) -> None:
        self._held, self._model = held, model
        self._handles: list[Any] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._held.clear_weights(self._model)
        self._handles = self._held.watch_gradients(self._model)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._held.clear_weights(self._model)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        for handle in self._handles:
            handle.remove()


class Checkpoints(transformers.TrainerCallback):
    """Asks for a checkpoint every so many minutes, marks it when it is whole, and removes the one before."""

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes
        self._last = time.monotonic()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        # Where losses are logged: a resumed run averages them over the same steps.
        logged = state.global_step % max(1, int(state.logging_steps)) == 0
        if logged and time.monotonic() - self._last >= self._seconds and state.global_step < state.max_steps:
            control.should_save = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())
        (folder / COMPLETE).touch()
        for other in Path(args.output_dir).glob("checkpoint-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        self._last = time.monotonic()


class Tell(transformers.TrainerCallback):
    """Passes progress on, keeps the losses, and counts the seconds."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self.losses: list[tuple[int, float]] = []
        """(step, mean training loss since the last entry)."""
        self.seconds = 0.0
        self._started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._reporter.stage("training", state.max_steps - state.global_step)
        self._started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._reporter.advance(f"loss {self.losses[-1][1]:.3f}" if self.losses else "")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append((state.global_step, float(logs["loss"])))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = time.monotonic() - self._started


def training_arguments(
    folder: Path, given: Mapping[str, Any], *, seed: int, device: torch.device, steps: int, rate: float, batch: int,
    single_texts: bool, checkpointing: bool,
) -> transformers.TrainingArguments:  # fmt: skip
    """Our defaults with what the user gave laid over them, values turned into the types of the fields.

    Windows of running text are long: they go through the model one by one and their gradients are added up.

    Raises:
        UnknownNameError: for a name that TrainingArguments does not have.
        UsageError: for a value that it refuses, or a step of another number of sequences than ``batch``.
    """
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": batch if single_texts else 1,
        "gradient_accumulation_steps": 1 if single_texts else batch,
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.0,
        "adam_beta2": 0.95,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": device.type == "cuda",
        "seed": seed,
        "use_cpu": device.type == "cpu",
        "activation_checkpointing": checkpointing,
    }
    if checkpointing:
        defaults["activation_checkpointing_kwargs"] = {"use_reentrant": False}
    known = {entry.name for entry in dataclasses.fields(transformers.TrainingArguments) if entry.init}
    words: list[str] = []
    for key, value in given.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UnknownNameError("training argument", key, known)
        if name in DECIDED:
            raise UsageError(f"--trainer {key} is decided by secateur", hint="use the flags of recover")
        defaults.pop(name, None)
        words += [f"--{name}", json.dumps(value) if isinstance(value, dict | list | bool) else str(value)]
    for name, value in defaults.items():
        if isinstance(value, dict | bool):
            value = json.dumps(value)
        words += [f"--{name}", str(value)]
    parser = transformers.HfArgumentParser(transformers.TrainingArguments)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as told:
            (arguments,) = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    except (SystemExit, ValueError, TypeError, ImportError) as error:
        reason = (told.getvalue().strip().splitlines() or [str(error)])[-1]
        raise UsageError(f"--trainer: {reason}", hint="see transformers.TrainingArguments") from None
    each, times = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    if each * times != batch:
        raise UsageError(
            f"--trainer: per_device_train_batch_size {each} x gradient_accumulation_steps {times} is not the batch "
            f"size of {batch}",
            hint="give both so that their product is --batch-size",
        )
    if device.type != "cpu":
        if arguments.device != device and device.index is not None:
            raise UsageError(
                f"training runs on {arguments.device}, not on {device}", hint="choose with CUDA_VISIBLE_DEVICES"
            )
        arguments._n_gpu = 1  # several would each take a batch, behind the back of the budget
    return arguments


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; None when there is none."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / COMPLETE).is_file()]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def time_of_step(trainer: RecoveryTrainer, batch: dict[str, torch.Tensor], accumulation: int) -> float:
    """Seconds that forward and backward of an optimiser step take, from one batch; nothing is changed by it.

    The first run warms up and is not counted.
    """
    model = trainer.model
    assert isinstance(model, nn.Module)
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None)
    if trainer.args.activation_checkpointing and enable is not None:
        # The Trainer does this when it starts; without it this step would be the one that needs the most memory.
        enable(activation_checkpointing_kwargs=dict(trainer.args.activation_checkpointing_kwargs or {}))
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    seconds = 0.0
    with torch.random.fork_rng(devices=devices):
        for _ in range(2):
            started = time.monotonic()
            inputs = trainer._prepare_inputs(dict(batch))
            with trainer.accelerator.autocast():
                loss = trainer.compute_loss(model, inputs)
            loss.backward()
            if trainer.args.device.type != "cpu":
                torch.accelerator.synchronize()
            model.zero_grad(set_to_none=True)
            seconds = time.monotonic() - started
    return seconds * accumulation
