"""Prunes the smallest weights step by step while the model is trained.

After t optimiser steps the sparsity is s_t = s_f + (s_i - s_f)·(1 - (t - t₀)/(n·Δt))³ with t = t₀, t₀ + Δt, ...,
t₀ + n·Δt: cubic, from the sparsity s_i that the model has to s_f. Of a group of n weights, a matrix (r, c) or the whole
model, round(s_t·n) are zero, those of smallest |W_ij|. Source: Zhu and Gupta 2017, arXiv 1710.01878.
Where we differ: a weight once pruned stays zero, since its gradient is cleared and the weight is zero when magnitudes
are compared again; the paper's masks allow a return in principle, not with weights that are held at zero. The last Δt
is shorter when `every` does not divide the distance. For N:M, s_t grows by whole groups: the share of groups in the
pattern follows the ramp, those first that lose the least Σ|W|. O(weights) time at each change, and a bool for each
weight; the global scope holds all magnitudes at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import CheckpointError, SparsityError
from secateur.masks import zero_count
from secateur.patterns import parse_pattern
from secateur.schedules._base import Pruner, Training, require_sparsity
from secateur.schedules._groups import Groups, check_scope, complete_groups, grow, grow_nm
from secateur.schedules._ramp import check_every, check_window, cubic, window


@dataclass(frozen=True, kw_only=True)
class Gradual:
    """Gradual magnitude pruning."""

    name: ClassVar[str] = "gradual"

    sparsity: float | None = None
    """Share of the weights that are zero at the end; for N:M it follows from the pattern."""
    begin: float = 0.0
    """Where pruning begins: a share of the training (up to 1) or an optimiser step (above 1)."""
    end: float = 0.7
    """Where the final sparsity is reached; the rest of the training recovers."""
    every: int = 10
    """Optimiser steps between two changes of the mask."""
    scope: str = "matrix"
    """Which weights are compared with each other: those of a matrix, or of the whole model (global)."""
    pattern: str = "unstructured"
    """unstructured, or N:M: N of every M consecutive inputs stay."""

    def __post_init__(self) -> None:
        check_window(self.begin, self.end, self.name)
        check_every(self.every, self.name)
        check_scope(self.scope, self.name)
        implied = parse_pattern(self.pattern).sparsity
        if implied is None:
            require_sparsity(self.sparsity, self.name)
        elif self.sparsity is not None and abs(self.sparsity - implied) > 1e-9:
            raise SparsityError(
                f"pattern {self.pattern} is a sparsity of {implied:g}, not {self.sparsity}", hint="leave sparsity out"
            )

    def start(self, training: Training) -> Pruner:
        """Begin at the zeros the model has.

        Raises:
            UsageError: when the window is empty, or the model is sparser than asked.
            PatternError: when M does not divide the inputs of a matrix.
        """
        return _Gradual(self, training)


class _Gradual(Pruner):
    def __init__(self, options: Gradual, training: Training) -> None:
        super().__init__(training)
        self.pruned.update(training.zeros)
        self.options = options
        self.pattern = parse_pattern(options.pattern)
        self.sparsity = 1.0 if not self.pattern.unstructured else require_sparsity(options.sparsity, options.name)
        self.window = window(options.begin, options.end, training.steps, options.name)
        for matrix in training.matrices:
            for part in matrix.slices(matrix.parameter):
                self.pattern.check_divides(matrix.name, part.shape[1])
        self.groups = Groups(training.matrices, options.scope)
        # Units are weights, or groups of M for N:M.
        self.units = [size // (self.pattern.group or 1) for size in self.groups.sizes]
        self.initial = [self._done(part) for part in self.groups.split(self.pruned)]
        self._check_room()

    def _done(self, pruned: Tensor) -> int:
        return int((pruned if self.pattern.unstructured else complete_groups(pruned, self.pattern)).sum())

    def _check_room(self) -> None:
        parts = self.groups.split(self.pruned)
        for name, part, initial, units in zip(self.groups.names, parts, self.initial, self.units, strict=True):
            if self.pattern.unstructured:
                too_sparse = initial > zero_count(self.sparsity, units)
                wanted = f"{self.sparsity:g}"
            else:
                most = self.pattern.group - self.pattern.keep
                too_sparse = bool((part.reshape(-1, self.pattern.group).sum(dim=1) > most).any())
                wanted = str(self.pattern)
            if too_sparse:
                raise SparsityError(
                    f"{name} is sparser than {wanted} already, and pruned weights stay pruned",
                    hint="ask for more, or leave it out with ignore",
                )

    def after_step(self, step: int) -> bool:
        begin, end = self.window.begin, self.window.end
        if not begin < step <= end or ((step - begin) % self.options.every and step != end):
            return False
        progress = self.window.progress(step)
        weights = self.groups.split({m.name: m.parameter.detach().abs() for m in self.training.matrices})
        grown = []
        for weight, pruned, initial, units in zip(
            weights, self.groups.split(self.pruned), self.initial, self.units, strict=True
        ):
            count = zero_count(cubic(initial / units, self.sparsity, progress), units)
            if self.pattern.unstructured:
                grown.append(grow(weight, pruned, count))
            else:
                grown.append(grow_nm(weight, pruned, self.pattern, count))
        self.pruned = self.groups.join(grown)
        return True

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "initial/counts": torch.tensor(self.initial)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        initial = state.get("initial/counts")
        if initial is None or len(initial) != len(self.initial):
            raise CheckpointError("the sparsity state of the checkpoint was not written by schedule gradual")
        self.initial = initial.tolist()
