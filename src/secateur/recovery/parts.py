"""Tensors of which each process holds a part (DTensors, as FSDP2 makes them), and how whole ones are cut and gathered.

Nothing here asks what device it is on, and everything passes ordinary tensors through as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def in_parts(tensor: Tensor) -> bool:
    """Whether each process holds a part of it."""
    # By its own attribute: importing DTensor takes long, and not every build of torch has it.
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "full_tensor")


def part(tensor: Any) -> Tensor:
    """What this process holds of a tensor, in the same memory; an ordinary tensor itself."""
    found: Tensor = tensor.to_local() if in_parts(tensor) else tensor
    return found


def whole(tensor: Any) -> Tensor:
    """The whole tensor, in every process. For one in parts, all processes must call this together."""
    found: Tensor = tensor.full_tensor() if in_parts(tensor) else tensor
    return found


def cut_like(tensor: Tensor, model: Any) -> Tensor:
    """A whole tensor that every process has, on the device of ``model``, or cut in parts as ``model`` is.

    Args:
        tensor: of the whole shape of ``model``.
    """
    if in_parts(tensor) or not in_parts(model):
        return tensor if in_parts(tensor) else tensor.to(model.device)
    from torch.distributed.tensor import distribute_tensor

    # No source rank: nothing is sent, each process cuts out its own part.
    return distribute_tensor(tensor, model.device_mesh, model.placements, src_data_rank=None)


def plain_name(name: str) -> str:
    """A parameter's name without what activation checkpointing of FSDP and ``torch.compile`` put into it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, under the model's own names."""
    return {plain_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def gather(parameters: dict[str, nn.Parameter], *, keep: bool) -> dict[str, Tensor]:
    """Whole copies in main memory where ``keep``; elsewhere nothing is kept. One parameter is whole at a time.

    All processes must call this together.
    """
    found = {}
    for name, parameter in parameters.items():
        full = whole(parameter.detach())
        if keep:
            found[name] = full.cpu().contiguous()
    return found


@torch.no_grad()
def fill(parameter: nn.Parameter, value: Tensor) -> None:
    """Write a whole tensor, which every process has, over a parameter or over its part."""
    part(parameter).copy_(part(cut_like(value, parameter)))
