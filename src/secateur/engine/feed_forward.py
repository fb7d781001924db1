"""Plain feed-forward networks of a model: found by their shapes, and proved on random weights to be what they seem.

A plain one is a module that owns two linear layers around an activation, y = D act(U x), or three with a gate,
y = D (act(G x) * U x), and nothing else.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.engine.blocks import Block, MatrixSpec
from secateur.layers.moe import MoeFfn

_CLOSE = 1e-4


@dataclass(frozen=True)
class FeedForward:
    """A plain feed-forward network, by the names of its parts in it; ``gate`` is empty where it has none."""

    module: str
    up: str
    down: str
    act: str
    gate: str = ""

    @property
    def matrices(self) -> dict[str, str]:
        """Role -> full name of a matrix."""
        roles = {"gate": self.gate, "up": self.up, "down": self.down}
        return {role: f"{self.module}.{name}.weight" for role, name in roles.items() if name}

    def entry(self, **more: Any) -> dict[str, Any]:
        """What the config of a converted model says of the parts."""
        return {"gate": self.gate, "up": self.up, "down": self.down, "act": self.act, **more}


class FeedForwards:
    """Finds them in the blocks of one model; modules built alike are proved once."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._proved: dict[tuple[Any, ...], tuple[str, str, str, str] | None] = {}

    def of(self, block: Block) -> list[FeedForward]:
        """The plain feed-forward networks of a block."""
        owned: dict[str, list[MatrixSpec]] = {}
        for matrix in block.matrices:
            owned.setdefault(matrix.module.rpartition(".")[0], []).append(matrix)
        return [found for path, matrices in owned.items() if (found := self._look(path, matrices)) is not None]

    def _look(self, path: str, matrices: list[MatrixSpec]) -> FeedForward | None:
        module = self._model.get_submodule(path)
        names = [matrix.module.removeprefix(path + ".") for matrix in matrices]
        own = {f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")}
        if any(matrix.experts for matrix in matrices) or not set(module.state_dict()) <= own:
            return None
        shapes = tuple((name, *matrix.shape) for name, matrix in zip(names, matrices, strict=True))
        key = (type(module), shapes)
        if key not in self._proved:
            self._proved[key] = next((parts for parts in _layouts(module, shapes) if _proved(module, parts)), None)
        parts = self._proved[key]
        return None if parts is None else FeedForward(path, *parts)


def _layouts(module: nn.Module, shapes: tuple[tuple[Any, ...], ...]) -> Iterator[tuple[str, str, str, str]]:
    """(up, down, act, gate) as the shapes allow it."""
    acts = [
        name for name, child in module.named_children()
        if not list(child.parameters()) and not isinstance(child, nn.Dropout)
    ]  # fmt: skip
    for down, out_features, neurons in shapes:
        others = [name for name, *shape in shapes if name != down and shape == [neurons, out_features]]
        if len(others) != len(shapes) - 1:
            continue
        for act in acts:
            if len(others) == 1:
                yield others[0], down, act, ""
            elif len(others) == 2:
                yield from ((up, down, act, gate) for gate, up in itertools.permutations(others))


@torch.no_grad()
def _proved(module: nn.Module, parts: tuple[str, str, str, str]) -> bool:
    """Whether the module gives on random weights what the formula gives."""
    up, down, act, gate = parts
    entry = {"up": up, "down": down, "act": act, "gate": gate, "experts": 1, "top": 1, "router": "oracle"}
    generator = torch.Generator().manual_seed(0)
    trial = copy.deepcopy(module).to_empty(device="cpu").float().eval()
    for parameter in trial.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(1, parameter.shape[-1]) ** 0.5)
    made = MoeFfn(trial, entry).eval()
    fill(made, {name: tensor.detach() for name, tensor in trial.state_dict().items()}, entry, trial)
    x = torch.randn(2, 3, made.in_features, generator=generator)
    try:
        found = trial(x)
    except Exception:  # noqa: BLE001 - whatever a module does that wants more than one tensor: it is not a plain one
        return False
    return (
        isinstance(found, torch.Tensor) and found.shape == (2, 3, made.out_features)
        and float((found - made(x)).abs().max()) <= _CLOSE * float(found.abs().max())
    )  # fmt: skip


def fill(made: MoeFfn, tensors: dict[str, torch.Tensor], entry: dict[str, Any], old: nn.Module) -> None:
    """Put the weights of a feed-forward network, by their names in it, into the layer, in their order."""
    for role in ("gate", "up", "down"):
        name = entry[role]
        if not name:
            continue
        weight = tensors[f"{name}.weight"]
        stored_in_out = not isinstance(old.get_submodule(name), nn.Linear)
        turned = weight.t() if stored_in_out != (role == "down") else weight
        made.get_parameter(role).data.copy_(turned)
        if f"{name}.bias" in tensors:
            made.get_parameter(f"{role}_bias").data.copy_(tensors[f"{name}.bias"])
