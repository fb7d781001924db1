"""Parameters that need no model, and a training loop of a few lines that calls a pruner as the callback does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.schedules import Matrix, Training


def whole(tensor):
    return [tensor]


class Loop:
    """Weights w in y = x·wᵀ trained by SGD, a pruner beside it."""

    def __init__(self, schedule, shapes=((4, 6),), steps=10, rate=0.1, zeros=None, values=None):
        generator = torch.Generator().manual_seed(3)
        values = values or [torch.randn(shape, generator=generator) for shape in shapes]
        self.parameters = {f"w{i}": nn.Parameter(value.clone()) for i, value in enumerate(values)}
        self.optimizer = torch.optim.SGD(self.parameters.values(), lr=rate)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / steps)
        matrices = tuple(Matrix(name, parameter, whole) for name, parameter in self.parameters.items())
        self.training = Training(steps, matrices, zeros or {}, self.parameters, self.optimizer, self.scheduler)
        self.pruner = schedule.start(self.training)
        self.step = 0

    def data(self, step):
        generator = torch.Generator().manual_seed(100 + step)
        inputs = {n: torch.randn(5, p.shape[1], generator=generator) for n, p in self.parameters.items()}
        return inputs, {n: torch.randn(5, p.shape[0], generator=generator) for n, p in self.parameters.items()}

    def loss(self, weights, step):
        inputs, outputs = self.data(step)
        return sum(((inputs[n] @ weights[n].T - outputs[n]) ** 2).mean() for n in weights)

    @torch.no_grad()
    def clear(self):
        for name, mask in self.pruner.pruned.items():
            self.parameters[name].masked_fill_(mask, 0)

    def advance(self):
        """One step. Returns whether the masks changed."""
        self.step += 1
        self.optimizer.zero_grad()
        self.loss(self.parameters, self.step).backward()
        self.pruner.before_step(self.step)
        for name, mask in self.pruner.pruned.items():
            self.parameters[name].grad.masked_fill_(mask, 0)
        self.optimizer.step()
        self.clear()
        changed = self.pruner.after_step(self.step)
        self.clear()
        return changed


@pytest.fixture
def loop():
    return Loop
