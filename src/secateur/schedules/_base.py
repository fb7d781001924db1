"""What a schedule is: options that start a pruner, and the pruner, which follows the optimiser's steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.errors import CheckpointError, UsageError
from secateur.patterns import check_sparsity


@dataclass(frozen=True)
class Matrix:
    """One prunable parameter of the model that is trained."""

    name: str
    parameter: nn.Parameter
    slices: Callable[[Tensor], list[Tensor]]
    """Views of a tensor of the parameter's shape as (out, in) matrices: one, or one for each expert."""


@dataclass(frozen=True)
class Training:
    """What a pruner may know of the training it follows."""

    steps: int
    """Optimiser steps of the whole training."""
    matrices: tuple[Matrix, ...]
    """The parameters to prune."""
    zeros: Mapping[str, Tensor]
    """Zeros the pruned ones among them have at the start: name -> bool of the parameter's shape, True where zero."""
    trainable: Mapping[str, nn.Parameter]
    """Every parameter of the model that has a gradient."""
    optimizer: Any = None
    scheduler: Any = None
    """Of the learning rate."""


class Pruner:
    """Follows one training. This one prunes nothing; the schedules override what they need.

    Every mask and every state is in the shape of the stored parameter.
    """

    dense_gradients: ClassVar[bool] = False
    """Whether `before_step` needs the gradients of pruned weights. If not, they are cleared right after backward."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.pruned: dict[str, Tensor] = {
            matrix.name: torch.zeros_like(matrix.parameter, dtype=torch.bool) for matrix in training.matrices
        }
        """Parameter name -> bool, True where the weight is zero until this mask is replaced."""

    def before_step(self, step: int) -> None:
        """Called when the gradients are complete. ``step`` counts the optimiser's steps, this one included."""

    def after_step(self, step: int) -> bool:
        """Called when the weights were updated and held zeros cleared; True when ``pruned`` was replaced.

        The caller then writes zeros over what is pruned.
        """
        return False

    def finish(self) -> None:
        """Called once at the end of training."""

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a resumed training needs; the keys are ``kind/name``."""
        return {f"pruned/{name}": mask for name, mask in self.pruned.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave.

        Raises:
            CheckpointError: when a tensor is missing or of another shape.
        """
        self.pruned = self.restored(state, "pruned", self.pruned)

    def restored(self, state: Mapping[str, Tensor], kind: str, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors ``kind/name`` of a state, each on the device of its parameter.

        Raises:
            CheckpointError: when one is missing or of another shape.
        """
        parameters = {**self.training.trainable, **{m.name: m.parameter for m in self.training.matrices}}
        found = {}
        for name in names:
            tensor, parameter = state.get(f"{kind}/{name}"), parameters[name]
            if tensor is None or tensor.shape != parameter.shape:
                raise CheckpointError(
                    f"the sparsity state of the checkpoint does not fit {name}: no tensor {kind}/{name} of its shape",
                    hint="resume with the model, targets and schedule that the training was started with",
                )
            found[name] = tensor.to(parameter.device)
        return found


@runtime_checkable
class Schedule(Protocol):
    """The whole contract of a schedule: a name, and a pruner for a training that is about to start or to go on."""

    @property
    def name(self) -> str: ...

    def start(self, training: Training) -> Pruner:
        """Called before the first step; a resumed training then calls `Pruner.load`.

        Raises:
            UsageError: when the schedule cannot be followed on this model or in this many steps.
        """
        ...


def require_sparsity(value: float | None, schedule: str) -> float:
    """The sparsity an option gives.

    Raises:
        UsageError: when it was left out.
        SparsityError: when it is not in [0, 1).
    """
    if value is None:
        raise UsageError(f"schedule {schedule} needs a sparsity", hint="0.5 means that half of the weights become zero")
    return check_sparsity(value)


def require_trainable(training: Training, schedule: str) -> None:
    """Refuse matrices without gradients.

    Raises:
        UsageError: naming the first that is frozen.
    """
    for matrix in training.matrices:
        if not matrix.parameter.requires_grad:
            raise UsageError(
                f"schedule {schedule} scores weights by their gradients, and {matrix.name} is frozen",
                hint="unfreeze it, leave it out with ignore, or use schedule gradual",
            )
