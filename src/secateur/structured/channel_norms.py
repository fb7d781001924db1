"""Norms over the hidden channels: how their weight must change for fewer channels, found by running them alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import UnsupportedModelError
from secateur.structured.channels import Gain
from secateur.structured.configure import ANOTHER_STRUCTURE
from secateur.structured.proof import TOLERANCE


def gain_of(whole: nn.Module, small: nn.Module, name: str, keep: Tensor) -> tuple[str, Gain] | None:
    """The weight of a norm and how it is used; None for a module that multiplies or adds channel by channel.

    Args:
        whole, small: the same module for all channels and for fewer, weights on the meta device.
        keep: the channels that stay.

    Raises:
        UnsupportedModelError: when no weight makes the small module agree with the whole one at zero.
    """
    generator = torch.Generator().manual_seed(0)
    size = max(parameter.shape[0] for _, parameter in whole.named_parameters(recurse=False))
    leaves = [leaf for leaf, _ in whole.named_parameters(recurse=False)]
    weights = {leaf: 1 + 0.1 * torch.randn(size, generator=generator) for leaf in leaves}
    x = torch.randn(6, size, generator=generator)
    try:
        centred = _same(_run(whole, weights, x + 1), _run(whole, weights, x))
        zeroed = _filled(x, keep, centred=centred)
        wide = _run(whole, weights, zeroed)[:, keep]
        narrow = _run(small, {leaf: weight[keep] for leaf, weight in weights.items()}, x[:, keep])
        doubled = _run(whole, weights, 2 * zeroed)[:, keep]
        adds = _added(whole, weights, x) if len(leaves) == 2 else None
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UnsupportedModelError(
            f"what {name} does with the hidden channels is not known: it cannot be run alone", hint=ANOTHER_STRUCTURE
        ) from error
    if _same(wide, narrow) and not _same(doubled, wide):
        return None
    if adds is not None:
        leaves.remove(adds)
        wide, narrow, doubled = (made - weights[adds][keep] for made in (wide, narrow, doubled))
    ratio = float((wide * narrow).sum() / narrow.square().sum().clamp_min(1e-30))
    if len(leaves) != 1 or not _same(wide, ratio * narrow) or not _same(doubled, wide):
        raise UnsupportedModelError(
            f"{name} ({type(whole).__name__}) joins the hidden channels in a way that fewer cannot repeat",
            hint=ANOTHER_STRUCTURE,
        )
    leaf = leaves[0]
    rest = {} if adds is None else {adds: torch.zeros(size)}
    without = _run(whole, {leaf: torch.zeros(size), **rest}, x)
    each = _run(whole, {leaf: torch.ones(size), **rest}, x) - without
    offset = float((without * each).sum() / each.square().sum().clamp_min(1e-30))
    if not _same(without, offset * each, scale=float(each.abs().max())):
        raise UnsupportedModelError(
            f"{name} ({type(whole).__name__}) does not multiply by its weight", hint=ANOTHER_STRUCTURE
        )
    bias = None if adds is None else f"{name}.{adds}"
    return leaf, Gain(name, round(offset, 6), ratio * (len(keep) / size) ** 0.5, bias, centred)


def _filled(x: Tensor, keep: Tensor, *, centred: bool) -> Tensor:
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
        made = _filled(states, keep.to(states.device), centred=True)
        return ((made, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): made})

    return hook


def _added(whole: nn.Module, weights: Mapping[str, Tensor], x: Tensor) -> str | None:
    """The tensor that a norm adds at the end, if it adds one."""
    made = _run(whole, weights, x)
    for leaf in weights:
        without = _run(whole, {**weights, leaf: torch.zeros_like(weights[leaf])}, x)
        if _same(made - without, weights[leaf].expand(made.shape)):
            return leaf
    return None


def _run(module: nn.Module, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    made: Tensor = torch.func.functional_call(module, dict(weights), (x,))
    return made.float()


def _same(first: Tensor, second: Tensor, scale: float = 0.0) -> bool:
    largest = max(scale, float(first.abs().max()), 1e-30)
    return float((first - second).abs().max()) <= TOLERANCE * largest
