"""Prunes the weights whose learned score falls below a threshold; a penalty drives the scores down (soft movement).

Mask M = σ(S) > τ, S of the shape of W and zero at the start, moved by Adam along the gradient of
L + λ_t·mean σ(S), that is (∂L/∂W')·W + λ_t·σ(S)(1 - σ(S))/n with n the number of all scores and W' = W∘M
(straight-through, as in schedule movement). λ_t rises to λ by the cubic ramp. Which sparsity comes out depends on λ,
the number of steps and the data, and differs between matrices: it cannot be asked for, and more λ gives more zeros.
Source: Sanh, Wolf and Rush 2020, arXiv 2005.07683, section 4, and its published code for σ and the mean.
Where we differ: the mean is taken over all scores at once rather than over the means of the matrices, and the learning
rate of the scores is constant; for W, W∘M and gradients see schedule movement. Memory: three float32, a shadow and a
bool for each weight; O(weights) time at each step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import CheckpointError, UsageError
from secateur.schedules._base import Pruner, Training
from secateur.schedules._ramp import check_window, cubic, window
from secateur.schedules._scored import ScoredPruner

BETAS = (0.9, 0.999)
EPSILON = 1e-8


@dataclass(frozen=True, kw_only=True)
class SoftMovement:
    """Soft movement pruning."""

    name: ClassVar[str] = "soft-movement"

    penalty: float = 100.0
    """λ, the weight of the mean of σ(S) in the loss; it decides how sparse the model becomes."""
    threshold: float = 0.1
    """τ: a weight is pruned while σ(S) is not above it; below 0.5, where scores start."""
    learning_rate: float = 0.01
    """Step size of Adam for the scores."""
    begin: float = 0.0
    """Where the penalty begins to rise: a share of the training (up to 1) or an optimiser step (above 1)."""
    end: float = 0.7
    """Where the penalty reaches its full weight."""

    def __post_init__(self) -> None:
        check_window(self.begin, self.end, self.name)
        if not 0 < self.threshold < 0.5:
            raise UsageError(
                f"threshold of schedule {self.name} is {self.threshold}",
                hint="it lies between 0 and 0.5, where σ(0) is",
            )
        for option in ("penalty", "learning_rate"):
            if not 0 < getattr(self, option) < float("inf"):
                raise UsageError(
                    f"{option} of schedule {self.name} is {getattr(self, option)}", hint="give one above 0"
                )

    def start(self, training: Training) -> Pruner:
        """Begin with all weights and scores of zero.

        Raises:
            UsageError: when the window is empty, or a matrix is frozen.
        """
        return _SoftMovement(self, training)


def penalty_gradient(score: Tensor, penalty: float, total: int) -> Tensor:
    """Gradient of penalty·mean σ(S) over ``total`` scores; the shape of ``score``."""
    squashed = torch.sigmoid(score)
    return penalty / total * squashed * (1 - squashed)


def adam_step(score: Tensor, gradient: Tensor, first: Tensor, second: Tensor, count: int, rate: float) -> None:
    """One step of Adam (arXiv 1412.6980, algorithm 1), in place; ``count`` is from 1. All of one shape."""
    first.mul_(BETAS[0]).add_(gradient, alpha=1 - BETAS[0])
    second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    scale = (second / (1 - BETAS[1] ** count)).sqrt_().add_(EPSILON)
    score.addcdiv_(first, scale, value=-rate / (1 - BETAS[0] ** count))


class _SoftMovement(ScoredPruner):
    def __init__(self, options: SoftMovement, training: Training) -> None:
        super().__init__(training, options.name)
        self.options = options
        self.window = window(options.begin, options.end, training.steps, options.name)
        self.first = {name: torch.zeros_like(score) for name, score in self.scores.items()}
        self.second = {name: torch.zeros_like(score) for name, score in self.scores.items()}
        self.count = 0
        """Steps that Adam has made."""

    def before_step(self, step: int) -> None:
        penalty = cubic(0.0, self.options.penalty, self.window.progress(step))
        total = sum(score.numel() for score in self.scores.values())
        gradients = list(self.score_gradients())
        self.count += bool(gradients)
        for matrix, gradient in gradients:
            score, first, second = (kind[matrix.name] for kind in (self.scores, self.first, self.second))
            gradient += penalty_gradient(score, penalty, total)
            adam_step(score, gradient, first, second, self.count, self.options.learning_rate)

    def after_step(self, step: int) -> bool:
        threshold = self.options.threshold
        self.remask({name: torch.sigmoid(score) <= threshold for name, score in self.scores.items()})
        return True

    def state(self) -> dict[str, Tensor]:
        moments = {"first": self.first, "second": self.second}
        tensors = {f"{kind}/{name}": moment for kind, group in moments.items() for name, moment in group.items()}
        return {**super().state(), **tensors, "count/steps": torch.tensor(self.count)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        if "count/steps" not in state:
            raise CheckpointError("the sparsity state of the checkpoint was not written by schedule soft-movement")
        self.first = self.restored(state, "first", self.first)
        self.second = self.restored(state, "second", self.second)
        self.count = int(state["count/steps"])
