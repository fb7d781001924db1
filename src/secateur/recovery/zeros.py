"""The zeros of a pruned model while it is trained: found once, cleared in gradients and weights, proved at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from secateur.errors import VerificationError
from secateur.recovery.parts import cut_like, in_parts, part, whole

PRUNED_SHARE = 1e-3
"""A matrix with a smaller share of zeros was not pruned: numbers of few bits are zero now and then by chance."""


class HeldZeros:
    """Which weights of which parameters must stay zero.

    Args:
        pruned: parameter name -> bool tensor of the parameter's shape, True where the weight is and stays zero.

    Parameters may be in parts, one in each process (FSDP2): their masks are cut alike when they are first used, and
    counting and checking are then done by all processes together.

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
            if int(whole(zeros.sum())) >= PRUNED_SHARE * weight.numel():
                pruned[name] = zeros
        return cls(pruned)

    def __len__(self) -> int:
        return sum(int(whole(mask.sum())) for mask in self.pruned.values())

    def _pairs(self, model: nn.Module) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Each parameter and what this process holds of its mask."""
        for name, mask in self.pruned.items():
            parameter = model.get_parameter(name)
            if in_parts(parameter) != in_parts(mask) or part(mask).device != part(parameter).device:
                mask = self.pruned[name] = cut_like(mask, parameter)
            # FSDP may keep its parts in main memory, and cuts on the device it computes on.
            yield parameter, part(mask).to(part(parameter).device)

    @torch.no_grad()
    def clear_weights(self, model: nn.Module) -> None:
        """Write +0.0 over every held weight."""
        for parameter, mask in self._pairs(model):
            part(parameter).masked_fill_(mask, 0)

    @torch.no_grad()
    def clear_gradients(self, model: nn.Module, *, only_parts: bool = False) -> None:
        """Write zero over the gradients of held weights; with ``only_parts``, of those that cannot be watched."""
        for parameter, mask in self._pairs(model):
            if parameter.grad is not None and (in_parts(parameter) or not only_parts):
                part(parameter.grad).masked_fill_(mask, 0)

    def watch_gradients(self, model: nn.Module) -> list[Any]:
        """Clear each gradient as soon as backward has finished it. Returns handles; ``remove`` ends it.

        With data parallelism that is before the gradients of the processes are added. Parameters in parts get their
        gradient without backward reaching them: `clear_gradients` must be called before it is used.
        """

        def clear(mask: torch.Tensor) -> Any:
            def hook(parameter: torch.Tensor) -> None:
                assert parameter.grad is not None
                parameter.grad.masked_fill_(mask, 0)

            return hook

        return [
            parameter.register_post_accumulate_grad_hook(clear(mask))
            for parameter, mask in self._pairs(model)
            if parameter.requires_grad and not in_parts(parameter)
        ]

    def check(self, weights: Mapping[str, torch.Tensor]) -> int:
        """Count the held zeros; every one must be exactly zero.

        Raises:
            VerificationError: naming the first parameter with a weight that is not.
        """
        for name, mask in self.pruned.items():
            weight = weights[name].detach()
            filled = int(whole(((weight != 0) & cut_like(mask, weight)).sum()))
            if filled:
                raise VerificationError(
                    f"{filled} pruned weights of {name} are not zero any more",
                    hint="please report this: the pattern was not held",
                )
        return len(self)
