"""Recovery that adds capacity: experts that share each feed-forward network and differ by a small adapter (PESC).

The network is computed once; a router picks some of the adapters behind it for each token. Only routers and adapters
are trained: pruned weights stay as they are, zeros included. Added are E (2 a d + d) parameters for each network, with
E experts, a numbers in an adapter and d in a token.

Source: Wu et al., "Parameter-efficient sparsity crafting from dense to mixture-of-experts for instruction tuning on
general tasks", 2024 (arXiv 2401.02731). Where we differ: the base is frozen, and has no low-rank adapters of its own;
the scale of the adapters is 1, as in the authors' training.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from secateur.engine.blocks import find_structure
from secateur.engine.feed_forward import FeedForwards
from secateur.errors import UnsupportedModelError
from secateur.layers.adapter_moe import NAME, AdapterMoe, build
from secateur.layers.spec import Spec, is_converted
from secateur.seeds import derived_seed

CONVERSION = "adapter-moe"


def networks_of(model: Any) -> dict[str, int]:
    """Path of each plain feed-forward network of a model -> numbers in a token.

    Raises:
        UnsupportedModelError: when it has none, or its layers are converted already.
    """
    name = type(model).__name__
    if is_converted(model.config.to_dict()):
        raise UnsupportedModelError(
            f"the layers of this {name} are converted already: no adapters are put beside them",
            hint="use --mode full, which trains converted models",
        )
    structure, found = find_structure(model), FeedForwards(model)
    widths = {matrix.name: matrix.in_features for matrix in structure.matrices}
    networks = [one for block in structure.blocks for one in found.of(block)]
    if not networks:
        raise UnsupportedModelError(
            f"no block of {name} has a plain feed-forward network: there is nothing to put adapters behind",
            hint="use --mode lora or full",
        )
    return {one.module: widths[one.matrices["up"]] for one in networks}


def add_adapter_experts(model: Any, *, experts: int, top: int, dim: int, seed: int) -> None:
    """Put adapters behind the feed-forward networks of a model, which it does not notice yet; all else is frozen."""
    networks = networks_of(model)
    model.requires_grad_(False)
    for path, width in networks.items():
        network: nn.Module = model.get_submodule(path)
        build(network, {"experts": experts, "top": top, "dim": dim, "width": width})
        generator = torch.Generator().manual_seed(derived_seed(seed, path))
        made = network.get_submodule(NAME)
        assert isinstance(made, AdapterMoe)
        for name, parameter in made.named_parameters():
            start = torch.zeros(parameter.shape)
            if name != "up":
                bound = 1 / math.sqrt(parameter.shape[-1])  # Kaiming-uniform with a = sqrt(5)
                start.uniform_(-bound, bound, generator=generator)
            parameter.data = start.to(parameter.device)
            parameter.requires_grad_(True)


def adapter_spec(model: nn.Module) -> Spec | None:
    """What a config must say of the adapters of a model; None where it has none."""
    found = {path.removesuffix(f".{NAME}"): module.entry for path, module in model.named_modules()
             if isinstance(module, AdapterMoe)}  # fmt: skip
    return Spec(CONVERSION, found) if found else None
