"""Which experts a text uses: of every layer with a router, the share of the tokens that chose each expert"""

from __future__ import annotations

from typing import Any

import torch

from secateur.layers.adapter_moe import AdapterMoe
from secateur.layers.fused import Fused
from secateur.layers.moe import MoeFfn

WINDOWS = 4
"""Windows that are looked at, at most: shares are told to about a hundredth."""


def expert_usage(model: torch.nn.Module, windows: torch.Tensor) -> dict[str, list[float]]:
    """Layer -> share of the tokens that chose each of its experts; nothing for a model without such layers.

    The shares of a layer add up to the experts that each token goes through.

    Args:
        windows: (count, length) int64 token ids, of which the first `WINDOWS` are run.
    """
    counts: dict[str, torch.Tensor] = {}
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, AdapterMoe | Fused | MoeFfn) and layer.chooses:
            hooks.append(layer.register_forward_pre_hook(_counter(name, counts)))
    if not hooks:
        return {}
    tokens = 0
    try:
        with torch.no_grad():
            for row in windows[:WINDOWS]:
                model(input_ids=row[None].to(next(model.parameters()).device), use_cache=False)
                tokens += len(row)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (count / tokens).tolist() for name, count in counts.items()}


def _counter(name: str, counts: dict[str, torch.Tensor]) -> Any:
    def count(layer: Any, args: tuple[torch.Tensor, ...]) -> None:
        chosen = layer.chosen(args[0].reshape(-1, args[0].shape[-1])).sum(dim=0).double().cpu()
        counts[name] = counts[name] + chosen if name in counts else chosen

    return count
