"""The reconstruction of blocks once more, said plainly: stock models in memory, and one step of Adam."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from secateur.engine.reconstruct import Reconstructing
from secateur.errors import RunError


def block_in_and_out(model: Any, number: int, ids: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Arguments and output of a block in a forward of the stock model."""
    caught: list[Any] = []
    layer = model.model.layers[number]
    before = layer.register_forward_pre_hook(lambda _, args, kwargs: caught.append((args, kwargs)), with_kwargs=True)
    after = layer.register_forward_hook(lambda _, args, output: caught.append(output))
    with torch.no_grad():
        model(ids, use_cache=False)
    before.remove()
    after.remove()
    return caught[0], caught[1]


def error(layer: Any, given: Any, wanted: torch.Tensor) -> torch.Tensor:
    args, kwargs = given
    difference = (layer(*args, **kwargs) - wanted).square().sum(-1)
    return (difference / wanted.square().sum(-1)).mean()


def naive_step(
    dense_folder: Path, start_folder: Path, ids: torch.Tensor, rate: float
) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """One step of Adam for every block, from the first half of the rows; the other half decides whether it stays."""
    dense, made = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (dense_folder, start_folder)
    )
    learn, hold = ids.split(len(ids) // 2)
    told = []
    for number, layer in enumerate(made.model.layers):
        given, wanted = block_in_and_out(made, number, learn)[0], block_in_and_out(dense, number, learn)[1]
        other, goal = block_in_and_out(made, number, hold)[0], block_in_and_out(dense, number, hold)[1]
        before = {name: weight.detach().clone() for name, weight in layer.named_parameters()}
        with torch.no_grad():
            first = float(error(layer, other, goal))
        made.zero_grad()
        error(layer, given, wanted).backward()
        gradients = {
            name: torch.where((weight == 0) & (weight.ndim == 2), 0.0, weight.grad)
            for name, weight in layer.named_parameters()
        }
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        with torch.no_grad():
            for name, weight in layer.named_parameters():
                step = gradients[name] * min(1.0, 1.0 / float(norm))
                weight -= rate * step / (step.abs() + 1e-8)
            last = float(error(layer, other, goal))
            if last >= first:
                for name, weight in layer.named_parameters():
                    weight.copy_(before[name])
        told.append([first, min(first, last)])
    return made.state_dict(), told


@contextmanager
def stopped_at_the_second_block() -> Iterator[None]:
    """While it lasts, a run that reconstructs blocks ends when it comes to the training of its second one."""
    original = Reconstructing._reconstruct

    def fail(self: Any, block: Any, *rest: Any) -> None:
        if block.index == 1:
            raise RunError("stopped")
        original(self, block, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Reconstructing, "_reconstruct", fail)
        with pytest.raises(RunError, match="stopped"):
            yield
