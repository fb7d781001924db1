"""A callback that prunes, or keeps pruned, the model of any stock ``transformers.Trainer``."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback

from secateur.engine.blocks import MatrixSpec, find_structure
from secateur.errors import CheckpointError, TargetError, UsageError, VerificationError
from secateur.recovery.parts import cut_like, in_parts, whole
from secateur.recovery.placement import check_placement
from secateur.recovery.zeros import HeldZeros
from secateur.schedules import Matrix, Pruner, Schedule, Training, make_schedule
from secateur.targets import select

STATE_FILE = "sparsity.safetensors"
"""Masks, scores and copies of a schedule, beside the weights of a checkpoint."""

logger = logging.getLogger(__name__)


class SparsityCallback(TrainerCallback):
    """Follows a schedule of `secateur.schedules` while a Trainer trains.

    Pruned weights are exactly +0.0 after every step of any optimiser, so every checkpoint is an ordinary one. A resumed
    training goes on as if it had never stopped: what it needs lies in ``sparsity.safetensors`` in the checkpoint.

    Args:
        schedule: a name (hold, gradual, movement, soft-movement, lottery), or an object with the same contract.
        targets: globs or ``re:`` patterns over the names of the prunable matrices.
        ignore: the same, for matrices to leave alone.
        resume_from: the checkpoint that training resumes from, when it is not in the output folder.
        options: those of the named schedule.

    Raises:
        UnknownNameError: for an unknown schedule or option.
        UsageError: for an option with a value the schedule refuses, or options beside an object.
    """

    def __init__(
        self,
        schedule: str | Schedule = "hold",
        *,
        targets: Sequence[str] = ("*",),
        ignore: Sequence[str] = (),
        resume_from: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        if isinstance(schedule, str):
            schedule = make_schedule(schedule, options)
        elif options:
            raise UsageError(
                f"options {', '.join(sorted(options))} were given beside a schedule object",
                hint="set them on the object, or give the schedule by name",
            )
        self.schedule: Schedule = schedule
        self.targets = (targets,) if isinstance(targets, str) else tuple(targets)
        self.ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        self.resume_from = resume_from
        self.sparsity = 0.0
        """Share of the weights of the targeted matrices that are held at zero."""
        self.history: list[tuple[int, float]] = []
        """(optimiser steps, sparsity) at the start and wherever it changed."""
        self._pruner: Pruner | None = None
        self._held = HeldZeros({})
        self._hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Find the matrices, start the schedule, and take over the state of a checkpoint when training resumes.

        Raises:
            TargetError: when a target or ignore pattern matches nothing.
            UsageError: when the schedule cannot be followed, or not where the parameters are.
            CheckpointError: when training resumes and the state of the schedule is missing or does not fit.
        """
        self._release()  # a training that ended by an exception has left its hooks
        model = unwrapped(model)
        matrices = targeted(model, self.targets, self.ignore)
        check_placement(args, model, matrices, self.schedule)
        saved: dict[str, torch.Tensor] = {}
        history: list[tuple[int, float]] = []
        if state.global_step > 0:
            folder = self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}"
            saved, history = read_state(Path(folder), self._described())
        pruner = self.schedule.start(
            Training(
                steps=state.max_steps,
                matrices=matrices,
                zeros=_pruned_of(saved, matrices)
                if saved
                else HeldZeros.of({m.name: m.parameter for m in matrices}).pruned,
                trainable={name: p for name, p in model.named_parameters() if p.requires_grad},
                optimizer=kwargs.get("optimizer"),
                scheduler=kwargs.get("lr_scheduler"),
            )
        )
        if saved:
            pruner.load(saved)
        self._pruner, self.history = pruner, history
        if saved:
            _check_loaded(model, pruner.pruned)
        self._hold(model, state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Let the schedule see the gradients; then those of pruned weights are cleared that are not yet."""
        if self._pruner is not None:
            self._pruner.before_step(state.global_step + 1)
            self._held.clear_gradients(unwrapped(model), only_parts=not self._pruner.dense_gradients)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Clear what weight decay and old moments have moved; then the schedule may prune more."""
        if self._pruner is not None:
            model = unwrapped(model)
            self._held.clear_weights(model)
            if self._pruner.after_step(state.global_step + 1):
                self._hold(model, state.global_step + 1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the sparsity to what is logged. Reporting callbacks that run before this one do not see it."""
        if self._pruner is not None and logs is not None:
            logs["sparsity"] = self.sparsity
            if state.log_history:
                state.log_history[-1]["sparsity"] = self.sparsity

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the state of the schedule into the checkpoint that was just written."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._pruner is None:
            return
        # Parts are gathered, and all processes take part in that.
        tensors = {
            key: whole(tensor).cpu() if in_parts(tensor) else tensor for key, tensor in self._pruner.state().items()
        }
        if not state.is_world_process_zero:
            return
        if not folder.is_dir():
            logger.warning("%s is not there: the sparsity state is not saved, training cannot resume", folder)
            return
        write_state(folder, tensors, self._described(), self.history)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check that every pruned weight is zero.

        Raises:
            VerificationError: when one is not.
            CheckpointError: when the best checkpoint was loaded and its masks are not there.
        """
        if self._pruner is None:
            return
        self._release()
        self._pruner.finish()
        model = unwrapped(model)
        best = getattr(state, "best_model_checkpoint", None)
        if args.load_best_model_at_end and best is not None:
            # The weights are now those of an earlier step, and so must the masks be.
            saved, history = read_state(Path(best), self._described())
            held = HeldZeros(_pruned_of(saved, self._pruner.training.matrices))
            sparsity = self._share(held)
            if sparsity < self.sparsity:
                logger.warning("the best checkpoint %s has a sparsity of %g, not %g", best, sparsity, self.sparsity)
            self._held, self.sparsity, self.history = held, sparsity, history
        self._held.check({name: model.get_parameter(name) for name in self._held.pruned})

    def _hold(self, model: nn.Module, step: int) -> None:
        """Take over the pruner's masks: zero the weights, watch the gradients, note the sparsity."""
        assert self._pruner is not None
        self._release()
        self._held = HeldZeros(self._pruner.pruned)
        self._held.clear_weights(model)
        if not self._pruner.dense_gradients:
            self._hooks = self._held.watch_gradients(model)
        self.sparsity = self._share(self._held)
        if not self.history or self.history[-1][1] != self.sparsity:
            self.history.append((step, self.sparsity))

    def _described(self) -> str:
        """Schedule, options and targets as a text, to tell whether a checkpoint was written by the same."""
        plain: Any = self.schedule
        names = [field.name for field in dataclasses.fields(plain)] if dataclasses.is_dataclass(plain) else []
        options = ", ".join(f"{name}={getattr(plain, name)!r}" for name in names)
        without = f" without {' '.join(self.ignore)}" if self.ignore else ""
        return f"{self.schedule.name}({options}) on {' '.join(self.targets)}{without}"

    def _share(self, held: HeldZeros) -> float:
        assert self._pruner is not None
        return len(held) / sum(matrix.parameter.numel() for matrix in self._pruner.training.matrices)

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _check_loaded(model: nn.Module, pruned: Mapping[str, torch.Tensor]) -> None:
    """See that the Trainer did load the weights of the checkpoint: it passes over names that do not match.

    Raises:
        CheckpointError: when pruned weights are not zero.
    """
    try:
        HeldZeros(pruned).check({name: model.get_parameter(name) for name in pruned})
    except VerificationError as error:
        raise CheckpointError(
            f"the weights in memory are not those of the checkpoint: {error.message}",
            hint="transformers does not load checkpoints of this family back into a training; start again",
        ) from None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of data-parallel training and of ``torch.compile``."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def targeted(model: nn.Module, targets: Sequence[str], ignore: Sequence[str]) -> tuple[Matrix, ...]:
    """The prunable matrices of a model that patterns choose; adapters that PEFT added are not among them.

    Raises:
        TargetError: when a pattern matches none, or nothing is left.
    """
    adapters = tuple(
        f"{path}.{name}."
        for path, module in model.named_modules()
        for name in getattr(module, "adapter_layer_names", ())
    )
    specs = [spec for spec in find_structure(model).matrices if not spec.name.startswith(adapters)]
    names = [spec.name for spec in specs]
    chosen = {name for pattern in targets for name in select(pattern, names, "target")}
    for pattern in ignore:
        chosen -= set(select(pattern, names, "ignore"))
    if not chosen:
        raise TargetError("targets and ignore together leave no matrix", hint="`secateur inspect` lists the matrices")
    return tuple(_matrix(model, spec) for spec in specs if spec.name in chosen)


def _matrix(model: nn.Module, spec: MatrixSpec) -> Matrix:
    return Matrix(spec.name, model.get_parameter(spec.name), spec.slices)


def write_state(
    folder: Path, tensors: Mapping[str, torch.Tensor], schedule: str, history: Sequence[tuple[int, float]]
) -> None:
    """Write ``sparsity.safetensors``, whole or not at all."""
    scratch = folder / f"{STATE_FILE}.partial"
    metadata = {"schedule": schedule, "history": json.dumps(history)}
    save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, scratch, metadata)
    scratch.replace(folder / STATE_FILE)


def read_state(folder: Path, schedule: str) -> tuple[dict[str, torch.Tensor], list[tuple[int, float]]]:
    """Tensors and history of ``sparsity.safetensors``.

    Raises:
        CheckpointError: when the file is missing, unreadable, or of another schedule or other targets.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: the schedule cannot go on from this checkpoint",
            hint="give the checkpoint that training resumes from as resume_from, or take one that was saved with "
            "SparsityCallback",
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
        history = [(int(step), float(share)) for step, share in json.loads(metadata.get("history", "[]"))]
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", hint="resume from an earlier checkpoint") from None
    if metadata.get("schedule") != schedule:
        raise CheckpointError(
            f"{path} was written by {metadata.get('schedule')}, not by {schedule}",
            hint="resume with the same schedule and options, or start a new training from these weights",
        )
    return tensors, history


def _pruned_of(saved: Mapping[str, torch.Tensor], matrices: Sequence[Matrix]) -> dict[str, torch.Tensor]:
    """The masks of a saved state, on the devices of the parameters, and in parts where these are.

    Raises:
        CheckpointError: when one is of no matrix of the model, or of another shape, or there are none.
    """
    masks = {key.removeprefix("pruned/"): mask for key, mask in saved.items() if key.startswith("pruned/")}
    parameters = {matrix.name: matrix.parameter for matrix in matrices}
    strange = [n for n, mask in masks.items() if n not in parameters or parameters[n].shape != mask.shape]
    if strange or not masks:
        raise CheckpointError(
            f"the sparsity state of the checkpoint does not fit the model: {strange[0] if strange else 'no masks'}",
            hint="resume with the model that the training was started with",
        )
    return {name: cut_like(mask, parameters[name]) for name, mask in masks.items()}
