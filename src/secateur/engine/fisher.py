"""What an error of each output of a matrix costs: its mean squared gradient, from a few backward passes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.engine.blocks import MatrixSpec
from secateur.engine.inputs import output_tensor
from secateur.errors import UnsupportedModelError
from secateur.progress import Reporter


def output_gradients(
    model: Any, specs: Sequence[MatrixSpec], sequences: Iterable[Tensor], reporter: Reporter
) -> dict[str, Tensor]:
    """Mean over tokens of (d loss / d y_o)^2 at the outputs y of each matrix.

    The loss is the sum over predicted tokens of -log p(next token): with the labels of the text this is the empirical
    Fisher information, diagonal over outputs. Only the way from the embedding on is differentiated, no weight gets a
    gradient.

    Args:
        model: a causal language model in eval mode, in memory.
        specs: ordinary matrices, none of stacked experts.
        sequences: token ids, (1, length) each.

    Returns:
        By name, (out,) float32 on the CPU; zeros for a matrix that no gradient reached.

    Raises:
        UnsupportedModelError: for stacked experts, whose outputs no module returns.
    """
    stacked = next((spec.name for spec in specs if spec.experts), None)
    if stacked is not None:
        raise UnsupportedModelError(
            f"{stacked} holds stacked experts, whose outputs have no gradients that can be read",
            hint="use --allocation owl or alpha, or leave experts out with --ignore",
        )
    sums = {spec.name: torch.zeros(spec.out_features, device=model.device) for spec in specs}
    counts = dict.fromkeys(sums, 0)

    def watch(name: str) -> Any:
        def take(gradient: Tensor) -> None:
            rows = gradient.reshape(-1, gradient.shape[-1]).float()
            sums[name].add_(rows.square().sum(dim=0))
            counts[name] += len(rows)

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(take)

        return hook

    def start(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_(True)

    rows = list(sequences)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    handles = [model.get_input_embeddings().register_forward_hook(start)]
    handles += [model.get_submodule(spec.module).register_forward_hook(watch(spec.name)) for spec in specs]
    reporter.stage("gradients", len(rows))
    try:
        with torch.enable_grad():
            for ids in rows:
                output: Any = model(input_ids=ids, use_cache=False)
                logits = output_tensor(output)[0, :-1].float()
                F.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
                reporter.advance()
    finally:
        for handle in handles:
            handle.remove()
    return {name: (total / max(1, counts[name])).cpu() for name, total in sums.items()}
