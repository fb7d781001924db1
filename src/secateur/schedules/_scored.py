"""Weights that are pruned by a learned score and may come back: the parameter holds W∘M, a shadow holds W."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from secateur.schedules._base import Matrix, Pruner, Training, require_trainable


def score_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """∂L/∂S = (∂L/∂W')·W of the masked weight W' = W∘M, the mask taken as the identity (straight-through).

    Args:
        gradient: ∂L/∂W' of every weight, the pruned ones included; any shape.
        weight: W, pruned weights with the value they had; same shape.

    Returns:
        float32, same shape.
    """
    return gradient.float() * weight.float()


class ScoredPruner(Pruner):
    """A float32 score and the unmasked value of each weight; all weights are there at the start."""

    dense_gradients: ClassVar[bool] = True

    def __init__(self, training: Training, schedule: str) -> None:
        require_trainable(training, schedule)
        super().__init__(training)
        parameters = {matrix.name: matrix.parameter.detach() for matrix in training.matrices}
        self.scores = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in parameters.items()}
        self.shadow = {name: weight.clone() for name, weight in parameters.items()}
        """The weights without their mask. Only the places that are pruned now are up to date."""

    def score_gradients(self) -> Iterator[tuple[Matrix, Tensor]]:
        """∂L/∂S of each matrix that took part in the loss; none at all after an overflow, when no step is made."""
        found = []
        for matrix in self.training.matrices:
            if matrix.parameter.grad is not None:
                name, gradient = matrix.name, matrix.parameter.grad
                if not bool(gradient.isfinite().all()):
                    return
                weight = torch.where(self.pruned[name], self.shadow[name], matrix.parameter.detach())
                found.append((matrix, score_gradient(gradient, weight)))
        yield from found

    @torch.no_grad()
    def remask(self, pruned: dict[str, Tensor]) -> None:
        """Replace the masks. Weights that go leave their value in the shadow; those that return get it back."""
        for matrix in self.training.matrices:
            old, new = self.pruned[matrix.name], pruned[matrix.name]
            shadow = torch.where(old, self.shadow[matrix.name], matrix.parameter)
            matrix.parameter.copy_(shadow.masked_fill(new, 0))
            self.shadow[matrix.name] = shadow
        self.pruned = pruned

    def state(self) -> dict[str, Tensor]:
        scores = {f"scores/{name}": score for name, score in self.scores.items()}
        return {**super().state(), **scores, **{f"shadow/{name}": weight for name, weight in self.shadow.items()}}

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        self.scores = self.restored(state, "scores", self.scores)
        self.shadow = self.restored(state, "shadow", self.shadow)
