"""Prunes the weights that fine-tuning moves towards zero; they may come back (movement pruning).

Score S ← S - (∂L/∂W')·W at every step, W' = W∘M the weight that the model uses and M the mask of the highest scores:
all but round(s_t·n) of a group of n, a matrix (r, c) or the whole model, s_t the cubic ramp from 0. The gradient of W'
counts for pruned weights too (straight-through). A pruned weight keeps its value in a shadow and returns with it; kept
weights are trained with the masked gradient. Source: Sanh, Wolf and Rush 2020, arXiv 2005.07683, eq. 3.
Where we differ: the parameter holds W∘M, so checkpoints are ordinary; a pruned weight takes no weight decay; the
learning rate of S is 1, only its order matters. Scores take the gradient as the optimiser gets it, after clipping, and
the norm that clipping uses counts the gradients of pruned weights. Zeros that the model has at the start are ordinary
weights. Memory: float32 score, shadow and bool for each weight; O(weights) time at each step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.masks import lowest_of_matrix, zero_count
from secateur.schedules._base import Pruner, Training, require_sparsity
from secateur.schedules._groups import Groups, check_scope
from secateur.schedules._ramp import check_every, check_window, cubic, window
from secateur.schedules._scored import ScoredPruner


@dataclass(frozen=True, kw_only=True)
class Movement:
    """Movement pruning, the hard variant with an exact sparsity."""

    name: ClassVar[str] = "movement"

    sparsity: float | None = None
    """Share of the weights that are zero at the end."""
    begin: float = 0.1
    """Where pruning begins: a share of the training (up to 1) or an optimiser step (above 1). Scores count from 0."""
    end: float = 0.7
    """Where the final sparsity is reached; afterwards the mask still follows the scores."""
    every: int = 1
    """Optimiser steps between two changes of the mask."""
    scope: str = "matrix"
    """Which scores are compared with each other: those of a matrix, or of the whole model (global)."""

    def __post_init__(self) -> None:
        require_sparsity(self.sparsity, self.name)
        check_window(self.begin, self.end, self.name)
        check_every(self.every, self.name)
        check_scope(self.scope, self.name)

    def start(self, training: Training) -> Pruner:
        """Begin with all weights and scores of zero.

        Raises:
            UsageError: when the window is empty, or a matrix is frozen.
        """
        return _Movement(self, training)


def movement_mask(score: Tensor, sparsity: float) -> Tensor:
    """Bool of the shape of ``score``, (out, in), True at the round(sparsity·n) lowest scores: those to prune."""
    return ~lowest_of_matrix(score, zero_count(sparsity, score.numel()))


class _Movement(ScoredPruner):
    def __init__(self, options: Movement, training: Training) -> None:
        super().__init__(training, options.name)
        self.options = options
        self.sparsity = require_sparsity(options.sparsity, options.name)
        self.window = window(options.begin, options.end, training.steps, options.name)
        self.groups = Groups(training.matrices, options.scope)

    def before_step(self, step: int) -> None:
        for matrix, gradient in self.score_gradients():
            self.scores[matrix.name] -= gradient

    def after_step(self, step: int) -> bool:
        begin, end = self.window.begin, self.window.end
        if step <= begin or ((step - begin) % self.options.every and step != end):
            return False
        sparsity = cubic(0.0, self.sparsity, self.window.progress(step))
        self.remask(self.groups.join([movement_mask(score, sparsity) for score in self.groups.split(self.scores)]))
        return True
