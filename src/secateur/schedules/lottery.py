"""Prunes the smallest weights in rounds, each time rewinding the kept ones to an early value (lottery tickets).

The training is R rounds of equal length. At the end of each but the last, the smallest |W_ij| go until, of a group of n
weights that had a share s_i of zeros, round(s_r·n) are zero with 1 - s_r = (1 - s_i)·((1 - s_f)/(1 - s_i))^(r/(R-1)):
the same share of what remains in every round, s_f exactly after the last. Then all trainable parameters go back to the
values they had after `rewind` steps of the first round, the optimiser starts anew, and so does the learning rate, whose
whole schedule runs in every round. Group: a matrix (r, c), or the whole model. Sources: Frankle et al. 2019, arXiv
1903.01611 (rewinding), and 2020, arXiv 1912.05671.
Where we differ: the papers continue from step `rewind` of the schedule, here each round runs all of it, warm-up
included, since the optimiser is new. Buffers are not rewound. Learning rates that are not a LambdaLR (every schedule of
transformers with a formula is one) go on, with a warning. Memory: a copy of every trainable parameter.
"""

from __future__ import annotations

import bisect
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from secateur.errors import SparsityError, UsageError
from secateur.masks import zero_count
from secateur.schedules._base import Pruner, Training, require_sparsity
from secateur.schedules._groups import Groups, check_scope, grow
from secateur.schedules._ramp import as_steps


@dataclass(frozen=True, kw_only=True)
class Lottery:
    """Iterative magnitude pruning with rewinding."""

    name: ClassVar[str] = "lottery"

    sparsity: float | None = None
    """Share of the weights that are zero at the end."""
    rounds: int = 5
    """Equal parts of the training; after each but the last, weights are pruned and the others rewound."""
    rewind: float = 0.05
    """Where in the first round the values are saved: a share of it (up to 1) or an optimiser step (above 1)."""
    scope: str = "matrix"
    """Which weights are compared with each other: those of a matrix, or of the whole model (global)."""

    def __post_init__(self) -> None:
        require_sparsity(self.sparsity, self.name)
        check_scope(self.scope, self.name)
        if self.rounds < 2:
            raise UsageError(
                f"rounds of schedule {self.name} is {self.rounds}",
                hint="weights are pruned between rounds, so there are 2 or more",
            )
        if not 0 <= self.rewind < float("inf"):
            raise UsageError(
                f"rewind of schedule {self.name} is {self.rewind}", hint="give a share of the first round, or a step"
            )

    def start(self, training: Training) -> Pruner:
        """Begin the first round; the learning rate's schedule is shortened to the length of a round.

        Raises:
            UsageError: when there are fewer steps than rounds, ``rewind`` lies behind the first round, or the model is
                sparser than asked.
        """
        return _Lottery(self, training)


def round_sparsity(initial: float, final: float, progress: float) -> float:
    """Sparsity when the same share of what remains goes each round; ``progress`` is r/(R-1), from 0 to 1."""
    if progress == 1:
        return final  # exactly, so that the count is
    remains: float = (1 - initial) * ((1 - final) / (1 - initial)) ** progress
    return 1 - remains


def repeat(factor: Callable[[int], float], starts: Sequence[int], steps: int) -> Callable[[int], float]:
    """A factor of the learning rate, made to run from 0 to ``steps`` once in each round instead of once.

    Args:
        starts: the steps at which rounds start, the first of them 0.
        steps: the length of the whole training.
    """
    ends = [*starts[1:], steps]

    def repeated(step: int) -> float:
        index = bisect.bisect_right(starts, step) - 1
        length = ends[index] - starts[index]
        return factor((step - starts[index]) * steps // length)

    return repeated


class _Lottery(Pruner):
    def __init__(self, options: Lottery, training: Training) -> None:
        super().__init__(training)
        self.pruned.update(training.zeros)
        self.options = options
        self.sparsity = require_sparsity(options.sparsity, options.name)
        self.starts = [training.steps * index // options.rounds for index in range(options.rounds)]
        self.rewind_step = as_steps(options.rewind, self.starts[1])
        if training.steps < options.rounds or self.rewind_step > self.starts[1]:
            raise UsageError(
                f"{training.steps} steps are too few for {options.rounds} rounds and rewinding to {options.rewind:g}",
                hint="train longer, or ask for fewer rounds or an earlier rewind",
            )
        self.groups = Groups(training.matrices, options.scope)
        self.initial = [float(part.float().mean()) for part in self.groups.split(self.pruned)]
        for name, part in zip(self.groups.names, self.groups.split(self.pruned), strict=True):
            if int(part.sum()) > zero_count(self.sparsity, part.numel()):
                raise SparsityError(
                    f"{name} is sparser than {self.sparsity:g} already, and pruned weights stay pruned",
                    hint="ask for more, or leave it out with ignore",
                )
        self.saved: dict[str, Tensor] = {}
        """What weights are rewound to; empty until ``rewind_step``."""
        if self.rewind_step == 0:
            self._save()
        self._undo = self._repeat_learning_rate()

    def _repeat_learning_rate(self) -> Callable[[], None]:
        scheduler = getattr(self.training.scheduler, "scheduler", self.training.scheduler)
        if not isinstance(scheduler, LambdaLR):
            warnings.warn(
                f"the learning rate is not rewound with the weights: its schedule ({type(scheduler).__name__}) is no "
                "LambdaLR and goes on through all rounds",
                stacklevel=2,
            )
            return lambda: None
        # Plain functions on purpose: LambdaLR writes the attributes of any other callable into checkpoints.
        before: list[Any] = scheduler.lr_lambdas
        scheduler.lr_lambdas = [repeat(factor, self.starts, self.training.steps) for factor in before]
        return functools.partial(setattr, scheduler, "lr_lambdas", before)

    def _save(self) -> None:
        self.saved = {name: parameter.detach().clone() for name, parameter in self.training.trainable.items()}

    @torch.no_grad()
    def after_step(self, step: int) -> bool:
        if step == self.rewind_step:
            self._save()
        if step not in self.starts[1:]:
            return False
        progress = self.starts.index(step) / (self.options.rounds - 1)
        weights = self.groups.split({m.name: m.parameter.detach().abs() for m in self.training.matrices})
        grown = []
        for weight, pruned, initial in zip(weights, self.groups.split(self.pruned), self.initial, strict=True):
            count = zero_count(round_sparsity(initial, self.sparsity, progress), weight.numel())
            grown.append(grow(weight, pruned, count))
        self.pruned = self.groups.join(grown)
        for name, parameter in self.training.trainable.items():
            parameter.copy_(self.saved[name])
        if self.training.optimizer is not None:
            # Moments belong to the weights that were just left.
            getattr(self.training.optimizer, "optimizer", self.training.optimizer).state.clear()
        return True

    def finish(self) -> None:
        self._undo()

    def state(self) -> dict[str, Tensor]:
        saved = {f"rewind/{name}": tensor for name, tensor in self.saved.items()}
        return {**super().state(), **saved, "initial/shares": torch.tensor(self.initial, dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        self.initial = state["initial/shares"].tolist() if "initial/shares" in state else self.initial
        begun = any(key.startswith("rewind/") for key in state)
        self.saved = self.restored(state, "rewind", self.training.trainable) if begun else {}
