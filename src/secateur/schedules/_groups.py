"""Comparison groups over the parameters of a model, and exact numbers of pruned weights in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from secateur.errors import UnknownNameError
from secateur.masks import lowest_nm, lowest_of_matrix
from secateur.patterns import Pattern
from secateur.schedules._base import Matrix

SCOPES = ("matrix", "global")


def check_scope(scope: str, schedule: str) -> None:
    """Refuse an unknown scope.

    Raises:
        UnknownNameError: naming the known ones.
    """
    if scope not in SCOPES:
        raise UnknownNameError(f"scope of schedule {schedule}", scope, SCOPES)


class Groups:
    """Which weights are compared with each other: those of a matrix (each expert is one), or all of them.

    A group is a 2-D tensor: (out, in), or (1, all weights) in the order of the matrices and along their rows. Inputs
    that are consecutive in a matrix stay consecutive.
    """

    def __init__(self, matrices: Sequence[Matrix], scope: str) -> None:
        self.matrices = tuple(matrices)
        self.together = scope == "global"
        shapes = [(matrix.name, part.shape) for matrix in matrices for part in matrix.slices(matrix.parameter)]
        sizes = [shape.numel() for _, shape in shapes]
        self.sizes = [sum(sizes)] if self.together else sizes
        """Weights in each group."""
        self.names = ["the model"] if self.together else [name for name, _ in shapes]
        """The parameter a group lies in, for messages."""

    def split(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """One tensor for each group, from one for each parameter."""
        parts = [part for matrix in self.matrices for part in matrix.slices(tensors[matrix.name])]
        if not self.together:
            return parts
        device = parts[0].device
        return [torch.cat([part.reshape(-1).to(device) for part in parts]).reshape(1, -1)]

    def join(self, groups: Sequence[Tensor]) -> dict[str, Tensor]:
        """Back from groups to one bool tensor for each parameter, in its stored shape."""
        joined = {matrix.name: torch.empty_like(matrix.parameter, dtype=torch.bool) for matrix in self.matrices}
        views = [view for matrix in self.matrices for view in matrix.slices(joined[matrix.name])]
        if self.together:
            groups = groups[0].reshape(-1).split([view.numel() for view in views])
        for view, group in zip(views, groups, strict=True):
            view.copy_(group.reshape(view.shape))
        return joined


def grow(score: Tensor, pruned: Tensor, count: int) -> Tensor:
    """Prune the weights of lowest score until ``count`` are pruned; what is pruned stays so.

    Args:
        score: (out, in), none negative, e.g. |W|.
        pruned: bool of the same shape.

    Returns:
        bool of the same shape, True at exactly max(count, number pruned already) places.
    """
    count = max(count, int(pruned.sum()))
    return ~lowest_of_matrix(score.float().masked_fill(pruned, -1.0), count)


def grow_nm(score: Tensor, pruned: Tensor, pattern: Pattern, done: int) -> Tensor:
    """Bring the ``done`` groups of M that lose least into the pattern N:M; what is pruned stays so.

    A group's loss is the sum of the scores that would go. Groups that are in the pattern already come first.

    Args:
        score: (out, in), none negative; in is a multiple of M.
        pruned: bool of the same shape, at most M - N of each M.

    Returns:
        bool of the same shape.
    """
    score = score.float()
    going = ~lowest_nm(score.masked_fill(pruned, -1.0), pattern.keep, pattern.group)
    loss = score.masked_fill(~going | pruned, 0.0).reshape(-1, pattern.group).sum(dim=1)
    complete = complete_groups(pruned, pattern)
    done = max(done, int(complete.sum()))
    chosen = ~lowest_of_matrix(loss.masked_fill(complete, -1.0).reshape(1, -1), done)
    return pruned | (going.reshape(-1, pattern.group) & chosen.reshape(-1, 1)).reshape(score.shape)


def complete_groups(pruned: Tensor, pattern: Pattern) -> Tensor:
    """Which groups of M, counted along the rows, have M - N pruned weights or more; bool of (weights / M,)."""
    return pruned.reshape(-1, pattern.group).sum(dim=1) >= pattern.group - pattern.keep
