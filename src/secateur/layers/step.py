"""Blocks that make a larger or smaller step: h + step (block(h) - h) in the place of block(h)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from secateur.errors import CheckpointError
from secateur.layers.spec import Sharing


def scale_steps(model: nn.Module, sharing: Sharing) -> None:
    """Have every block of a row make a step of another size.

    Raises:
        CheckpointError: when the model has no such row, or another number of blocks.
    """
    try:
        row = model.get_submodule(sharing.row)
    except AttributeError:
        row = nn.Module()
    blocks = list(row.children())
    if len(blocks) != len(sharing.groups):
        raise CheckpointError(
            f"config.json names {len(sharing.groups)} blocks in {sharing.row}, the model has {len(blocks)}",
            hint="convert the model again",
        )
    for block in blocks:
        block.register_forward_hook(_Step(sharing.step), with_kwargs=True)


class _Step:
    """A hook behind a block. States come in as the first tensor, and go out alone or first in a tuple."""

    def __init__(self, step: float) -> None:
        self.step = step

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        before = next(value for value in (*args, kwargs.get("hidden_states")) if isinstance(value, torch.Tensor))
        if isinstance(output, torch.Tensor):
            return torch.lerp(before, output, self.step)
        return type(output)((torch.lerp(before, output[0], self.step), *output[1:]))
