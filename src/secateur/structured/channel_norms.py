"""Norms over the hidden channels: how their weight must change for fewer channels, found by running them alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.errors import UnsupportedModelError
from secateur.structured.channels import Gain
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
    zeroed = torch.zeros_like(x)
    zeroed[:, keep] = x[:, keep]
    try:
        wide = _run(whole, weights, zeroed)[:, keep]
        narrow = _run(small, {leaf: weight[keep] for leaf, weight in weights.items()}, x[:, keep])
        doubled = _run(whole, weights, 2 * zeroed)[:, keep]
        shifted = _run(whole, weights, zeroed + 1)[:, keep]
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UnsupportedModelError(
            f"what {name} does with the hidden channels is not known: it cannot be run alone", hint=_HINT
        ) from error
    ratio = float((wide * narrow).sum() / narrow.square().sum().clamp_min(1e-30))
    if _same(shifted, wide):
        raise UnsupportedModelError(
            f"{name} ({type(whole).__name__}) subtracts the mean over all hidden channels: without some of them it "
            "computes something else",
            hint=_HINT,
        )
    if _same(wide, narrow) and not _same(doubled, wide):
        return None
    if len(leaves) != 1 or not _same(wide, ratio * narrow) or not _same(doubled, wide):
        raise UnsupportedModelError(
            f"{name} ({type(whole).__name__}) joins the hidden channels in a way that fewer cannot repeat", hint=_HINT
        )
    leaf = leaves[0]
    without = _run(whole, {leaf: torch.zeros(size)}, x)
    each = _run(whole, {leaf: torch.ones(size)}, x) - without
    offset = float((without * each).sum() / each.square().sum().clamp_min(1e-30))
    if not _same(without, offset * each, scale=float(each.abs().max())):
        raise UnsupportedModelError(f"{name} ({type(whole).__name__}) does not multiply by its weight", hint=_HINT)
    return leaf, Gain(name, round(offset, 6), ratio * (len(keep) / size) ** 0.5)


_HINT = "choose another --structure, such as ffn"


def _run(module: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    made: Tensor = torch.func.functional_call(module, weights, (x,))
    return made.float()


def _same(first: Tensor, second: Tensor, scale: float = 0.0) -> bool:
    largest = max(scale, float(first.abs().max()), 1e-30)
    return float((first - second).abs().max()) <= TOLERANCE * largest
