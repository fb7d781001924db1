"""The zeros of a pruned model while it is trained: found once, cleared in gradients and weights, proved at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from secateur.errors import VerificationError

PRUNED_SHARE = 1e-3
"""A matrix with a smaller share of zeros was not pruned: numbers of few bits are zero now and then by chance."""


class HeldZeros:
    """Which weights of which parameters must stay zero.

    Args:
        pruned: parameter name -> bool tensor of the parameter's shape, True where the weight is and stays zero.

    Clearing writes +0.0 (a product with a mask would leave -0.0 and NaN), and a gradient of zero keeps the moments of
    an optimiser zero as well, so that clipping and Adam see the kept weights only.
    """

    def __init__(self, pruned: Mapping[str, torch.Tensor]) -> None:
        self.pruned = dict(pruned)

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor]) -> HeldZeros:
        """The zeros that weights have now; matrices with next to none are left out."""
        pruned = {}
        for name, weight in weights.items():
            zeros = weight.detach() == 0
            if int(zeros.sum()) >= PRUNED_SHARE * weight.numel():
                pruned[name] = zeros
        return cls(pruned)

    def __len__(self) -> int:
        return sum(int(mask.sum()) for mask in self.pruned.values())

    def _pairs(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
        for name, mask in self.pruned.items():
            parameter = model.get_parameter(name)
            if mask.device != parameter.device:
                mask = self.pruned[name] = mask.to(parameter.device)
            yield name, parameter, mask

    @torch.no_grad()
    def clear_weights(self, model: nn.Module) -> None:
        """Write +0.0 over every held weight."""
        for _, parameter, mask in self._pairs(model):
            parameter.masked_fill_(mask, 0)

    @torch.no_grad()
    def clear_gradients(self, model: nn.Module) -> None:
        """Write zero over the gradients of held weights."""
        for _, parameter, mask in self._pairs(model):
            if parameter.grad is not None:
                parameter.grad.masked_fill_(mask, 0)

    def watch_gradients(self, model: nn.Module) -> list[Any]:
        """Clear each gradient as soon as backward has finished it. Returns handles; ``remove`` ends it."""

        def clear(mask: torch.Tensor) -> Any:
            def hook(parameter: torch.Tensor) -> None:
                assert parameter.grad is not None
                parameter.grad.masked_fill_(mask, 0)

            return hook

        return [
            parameter.register_post_accumulate_grad_hook(clear(mask))
            for _, parameter, mask in self._pairs(model)
            if parameter.requires_grad
        ]

    def check(self, weights: Mapping[str, torch.Tensor]) -> int:
        """Count the held zeros; every one must be exactly zero.

        Raises:
            VerificationError: naming the first parameter with a weight that is not.
        """
        for name, mask in self.pruned.items():
            filled = int((weights[name].detach()[mask.to(weights[name].device)] != 0).sum())
            if filled:
                raise VerificationError(
                    f"{filled} pruned weights of {name} are not zero any more",
                    hint="please report this: the pattern was not held",
                )
        return len(self)
