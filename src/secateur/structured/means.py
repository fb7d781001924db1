"""What a norm gets for a proof in the places of what goes, so that nothing hangs on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def filled(x: Tensor, keep: Tensor, *, centred: bool) -> Tensor:
    """Inputs (..., channels) of a norm in which only the channels ``keep`` say something.

    The others are zero, or the mean of those that stay for a norm that subtracts the mean: then neither it nor what is
    left after it hangs on them.
    """
    mean = x[..., keep].mean(dim=-1, keepdim=True) if centred else torch.zeros_like(x[..., :1])
    made = mean.expand(x.shape).clone()
    made[..., keep] = x[..., keep]
    return made


def mean_where_gone(keep: Tensor) -> Callable[..., Any]:
    """A hook for a norm that subtracts the mean: channels that go come in as the mean of those that stay."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        states = args[0] if args else next(iter(kwargs.values()))
        made = filled(states, keep.to(states.device), centred=True)
        return ((made, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): made})

    return hook
