"""Scores of units from gradients: one backward for each of a few calibration sequences, through the model in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.engine.inputs import output_tensor
from secateur.plugins import GradientCriterion
from secateur.progress import Reporter
from secateur.structured.couplings import Cut

Key = tuple[str, str]
"""Kind of a unit and its consumer."""


def bytes_needed(parameters: int, vocabulary: int, criterion: GradientCriterion) -> int:
    """Bytes that the weights, their gradients and the logits take, in float32; activations come on top."""
    return 4 * parameters * (2 + criterion.second) + 12 * vocabulary * criterion.length


def saliences(
    model: nn.Module, cuts: Mapping[Key, Sequence[Cut]], sequences: Iterable[Tensor], criterion: GradientCriterion,
    reporter: Reporter,
) -> dict[Key, Tensor]:  # fmt: skip
    """What the criterion makes of each weight, summed over all slices that go with a unit.

    The loss is the mean over predicted tokens of -log p(next token). Gradients are averaged over the sequences, their
    squares too where the criterion wants them.

    Args:
        model: a causal language model in eval mode; its gradients are free and stay so.
        cuts: by key, the slices of each unit; parameters that the model shares are counted once.
        sequences: token ids, (1, length) each.

    Returns:
        By key, (units,) float32 on the CPU.
    """
    wanted = {cut.name for slices in cuts.values() for cut in slices}
    parameters = {name: value for name, value in model.named_parameters() if name in wanted}
    sums = {name: torch.zeros_like(value) for name, value in parameters.items()}
    squares = {name: torch.zeros_like(value) for name, value in parameters.items()} if criterion.second else {}
    handles = [value.register_post_accumulate_grad_hook(_taker(sums[name], squares.get(name)))
               for name, value in _trained(model, parameters)]  # fmt: skip
    rows = list(sequences)
    reporter.stage("gradients", len(rows))
    try:
        with torch.enable_grad():
            for ids in rows:
                output: Any = model(input_ids=ids, use_cache=False)
                logits = output_tensor(output)[0, :-1].float()
                F.cross_entropy(logits, ids[0, 1:]).backward()
                reporter.advance()
    finally:
        for handle in handles:
            handle.remove()
        for value in model.parameters():
            value.requires_grad_(False)
    made: dict[Key, Tensor] = {}
    with torch.no_grad():
        for key, slices in cuts.items():
            total = torch.zeros(len(slices[0].indices), dtype=torch.float64)
            for cut in slices:
                if cut.name in parameters:
                    second = squares[cut.name] / len(rows) if criterion.second else None
                    part = criterion.salience(parameters[cut.name], sums[cut.name] / len(rows), second)
                    along = part.movedim(cut.dim, 0).reshape(part.shape[cut.dim], -1).double().sum(dim=1).cpu()
                    total += along[cut.indices].sum(dim=1)
            made[key] = total.float()
    return made


def _trained(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    """Only what is asked for gets a gradient."""
    for value in model.parameters():
        value.requires_grad_(False)
    for value in parameters.values():
        value.requires_grad_(True)
    return list(parameters.items())


def _taker(total: Tensor, squares: Tensor | None) -> Any:
    """Take a gradient in as soon as it is there, and free it."""

    def take(parameter: Tensor) -> None:
        assert parameter.grad is not None
        total.add_(parameter.grad)
        if squares is not None:
            squares.addcmul_(parameter.grad, parameter.grad)
        parameter.grad = None

    return take
