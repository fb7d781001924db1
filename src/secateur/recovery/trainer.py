"""The Hugging Face Trainer with our losses, held zeros, and checkpoints that a killed run can trust."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import save_fsdp_optimizer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.trainer import SCHEDULER_NAME

from secateur.engine.device import trim_memory
from secateur.errors import CheckpointError, RunError
from secateur.progress import Reporter
from secateur.recovery.parts import fill, gather, trained_parameters, whole
from secateur.recovery.zeros import HeldZeros

TRAINED = "trained.safetensors"
"""The trained parameters in a checkpoint folder."""
COMPLETE = "complete"
"""A file in a checkpoint folder that was written to its end."""

Objective = Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]
"""Loss of a batch through a model."""


class RecoveryTrainer(transformers.Trainer):
    """A stock Trainer that minimises ``objective``, holds zeros, and stops at the first loss that is not finite.

    Args:
        held: zeros under the names of ``owner``; None when nothing needs to be held.
        owner: the model whose names they are; adapters are wrapped around it.
    """

    def __init__(
        self, *args: Any, objective: Objective, held: HeldZeros | None = None, owner: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self._objective = objective
        # The objective is a mean over the batch: the Trainer divides it by the number of accumulated batches.
        self.model_accepts_loss_kwargs = False
        self._loss_failed = False
        self._hold = HoldZeros(held, owner) if held is not None and owner is not None else None
        if self._hold is not None:
            self.add_callback(self._hold)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = self._objective(model, inputs)
        if not torch.isfinite(loss):
            if self.args.world_size == 1:
                raise _not_finite("loss", self.state.global_step, Path(self.args.output_dir))
            self._loss_failed = True  # all processes stop at the end of the step: none may wait for one that has left
        return (loss, {}) if return_outputs else loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            raise RunError(
                f"a checkpoint could not be written: {error}", hint="free some space and go on with --resume"
            ) from error
        self.accelerator.wait_for_everyone()  # it is whole when every process has written its files

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained, under the model's own names; parts are gathered, one parameter at a time.

        The stock way goes through ``save_pretrained`` and reads back without asking whether everything matched: models
        whose files are laid out otherwise (fused experts) and heads beside adapters would be lost on resuming.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        saved = gather(trained_parameters(self.model), keep=self.args.should_save)
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in saved.values())
        if not self._agreed(finite):
            raise _not_finite("weights", self.state.global_step - 1, Path(str(self.args.output_dir)))
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(saved, folder / TRAINED)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # The stock way would write the weights once more, in a form of its own.
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        trained = trained_parameters(model or self.model)
        with safe_open(Path(resume_from_checkpoint) / TRAINED, framework="pt") as saved:
            if set(saved.keys()) != trained.keys():
                raise CheckpointError(f"{resume_from_checkpoint} does not hold the weights of this run")
            for name, parameter in trained.items():
                fill(parameter, saved.get_tensor(name))

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self._hold is not None:
            self._hold.clear_gradients()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The last thing before the optimiser's step, in every process: none makes it when a number is not finite."""
        if grad_norm is None and self._hold is not None:
            self._hold.clear_gradients()
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self._agreed(not self._loss_failed):
            raise _not_finite("loss", self.state.global_step, Path(self.args.output_dir))
        # Half precision with a scaler overflows on purpose now and then and skips the step.
        if norm is not None and not self.args.fp16 and not torch.isfinite(whole(torch.as_tensor(norm))):
            raise _not_finite("gradient", self.state.global_step, Path(self.args.output_dir))
        return norm

    def _agreed(self, good: bool) -> bool:
        """Whether it is so in every process."""
        if self.args.world_size == 1:
            return good
        all_good = torch.tensor(int(good), device=self.args.device)
        torch.distributed.all_reduce(all_good, torch.distributed.ReduceOp.MIN)
        return bool(all_good)


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
        self._held, self._model = HeldZeros(held.pruned), model  # its own, since the masks of parts are cut
        self._handles: list[Any] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._held.clear_weights(self._model)
        self._handles = self._held.watch_gradients(self._model)

    def clear_gradients(self) -> None:
        """Those that could not be watched; the Trainer calls it before it clips."""
        self._held.clear_gradients(self._model, only_parts=True)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._held.clear_weights(self._model)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        for handle in self._handles:
            handle.remove()


class Checkpoints(transformers.TrainerCallback):
    """Asks for a checkpoint every so many minutes, marks it when it is whole, and removes the one before.

    Args:
        reporter: told once when losses are logged so rarely that a checkpoint is half as long again in coming.
    """

    def __init__(self, minutes: float, reporter: Reporter | None = None) -> None:
        self._seconds = 60 * minutes
        self._reporter = reporter
        self._last = time.monotonic()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        # Where losses are logged: a resumed run averages them over the same steps.
        logged = state.global_step % max(1, int(state.logging_steps)) == 0
        if logged and state.global_step < state.max_steps:
            control.should_save |= self._due(args)
        elif self._reporter is not None and time.monotonic() - self._last > 1.5 * self._seconds:
            every = max(1, int(state.logging_steps))
            self._reporter.warn(
                f"a checkpoint is late: they are made where losses are logged, every {every:,} steps, and "
                f"{time.monotonic() - self._last:,.0f} s have gone; --trainer logging_steps=N sets another number"
            )
            self._reporter = None
        return control

    def _due(self, args: Any) -> bool:
        """Whether it is time, by the clock of the first process: all must save at the same step."""
        due = torch.tensor(int(time.monotonic() - self._last >= self._seconds), device=args.device)
        if args.world_size > 1:
            torch.distributed.broadcast(due, 0)
        return bool(due)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = time.monotonic()
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())
        (folder / COMPLETE).touch()
        for other in Path(args.output_dir).glob("checkpoint-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)


class TrimMemory(transformers.TrainerCallback):
    """Hands freed memory back after each step.

    Activations are many tensors of a few megabytes, and what lives on between them (moments, gradients of adapters)
    keeps the C library from returning the rest: about a third of a process's memory when little is trained.
    """

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        trim_memory()


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
            del loss, inputs
            trim_memory()
    return seconds * accumulation
