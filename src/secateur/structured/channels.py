"""Hidden channels: which tensors are cut along the residual stream, who reads it, and how a cut tensor is made.

Everything that touches the residual stream loses the same channels: embeddings, norms, the inputs of what reads it and
the outputs of what writes it. Nothing is known about families; `secateur.structured.channel_plan` finds these facts.

A norm over fewer channels divides by another mean. With x zero in the channels that go, the mean over all is kept / all
times that over those that stay, so for x / sqrt(mean x^2) the weight times sqrt(all / kept) makes both agree, up to
the epsilon. On real inputs the channels that go are not zero. The factor is then the root of the mean over the channels
that stay of E[x_j^2 / mean x^2]: all / kept under the root where the others are zero, 1 where all are alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

from secateur.engine.binding import Binding, TensorReader
from secateur.structured.configure import Shrunk


@dataclass(frozen=True)
class Reader:
    """A tensor that multiplies the residual stream along ``dim``; ``bias`` is what it adds, if anything."""

    name: str
    dim: int
    bias: str | None = None


@dataclass(frozen=True)
class Group:
    """Readers with one and the same input. ``module`` is the first that gets it."""

    module: str
    readers: tuple[Reader, ...]


@dataclass(frozen=True)
class Gain:
    """The weight of a norm over the channels, used as ``offset`` + weight.

    ``unit`` is what the norm gives with its channels at zero by what it gives without them, times sqrt(kept / all).
    """

    module: str
    offset: float
    unit: float


@dataclass
class Channels:
    """All that must be known to remove hidden channels from a model."""

    before: int
    after: int
    step: int
    """``after`` is a multiple of this."""
    shrunk: Shrunk
    cuts: dict[str, tuple[int, ...]]
    """Tensor -> the dimensions along which it is cut."""
    gains: dict[str, Gain]
    embeddings: dict[str, float]
    """Embedding -> factor that makes up for one that the model computes from its width."""
    groups: dict[int, list[Group]]
    """By block, in the order in which a forward comes to them."""
    head: Group | None = None
    """Readers outside the blocks; without any where they share their tensor with the embedding."""
    final: str | None = None
    """Weight of the norm whose output the head gets."""
    answer: float = 1.0
    """Factor of ``final`` that makes up for one in the head."""
    loose: tuple[str, ...] = ()
    """Readers whose input was not found: they are cut and not refitted."""
    difference: float = 0.0
    """Between channels at zero and channels removed, as a share of the largest output."""

    def line(self) -> str:
        """The plan in words."""
        return f"hidden channels: {self.before:,} -> {self.after:,} everywhere, a multiple of {self.step}"

    def spread(self) -> Tensor:
        """As many channels as stay, spread over all."""
        return (torch.arange(self.after) * self.before + self.before // 2) // self.after

    def cut(self, name: str, tensor: Tensor, keep: Tensor, scales: Mapping[str, float]) -> Tensor:
        """A tensor of the model with only the channels ``keep``.

        Args:
            scales: factors of the norms' weights; 1 where none is given.
        """
        made = tensor
        for dim in self.cuts.get(name, ()):
            made = made.index_select(dim, keep.to(made.device))
        factor = scales.get(name, 1.0) * (self.answer if name == self.final else 1.0)
        if name in self.gains and factor != 1.0:
            offset = self.gains[name].offset
            made = ((made.float() + offset) * factor - offset).to(tensor.dtype)
        if self.embeddings.get(name, 1.0) != 1.0:
            made = (made.float() * self.embeddings[name]).to(tensor.dtype)
        return made

    def scales(self, energy: Mapping[str, Tensor], keep: Tensor) -> dict[str, float]:
        """Factors of the norms' weights.

        Args:
            energy: norm's weight -> mean over tokens of x_j^2 / mean x^2, (channels,).
        """
        return {
            name: self.gains[name].unit * math.sqrt(max(float(shares[keep].double().mean()), 1e-12))
            for name, shares in energy.items()
        }


class CutBinding(Binding):
    """The tensors of a smaller model, made from the checkpoint of the whole one."""

    def __init__(
        self, model: transformers.PreTrainedModel, keys: Sequence[str], whole: Binding, channels: Channels,
        keep: Tensor, scales: Mapping[str, float],
    ) -> None:  # fmt: skip
        super().__init__(model, keys)
        self._whole, self._channels, self._keep, self._scales = whole, channels, keep, scales
        self.solved: dict[str, Tensor] = {}
        """Tensors outside the blocks that are more than cut, by name."""

    def load(self, names: Sequence[str], reader: TensorReader) -> dict[str, Tensor]:
        """Tensors of the smaller model; ``reader`` has those of the whole one."""
        made = {}
        for name in names:
            own = self.own_name(name)
            if own in self.solved:
                made[name] = self.solved[own]
            else:
                tensor = self._whole.load([name], reader)[name]
                made[name] = self._channels.cut(own, tensor, self._keep, self._scales)
        return made

    def load_written(self, names: Sequence[str], reader: TensorReader) -> dict[str, Tensor]:
        """Tensors of the smaller model from what was already written."""
        return super().load(names, reader)

    def own_name(self, name: str) -> str:
        """The name under which a tensor is stored, where several share one."""
        names = self.unit_of(name).names
        return name if name in names else names[0]

    def key_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every checkpoint key."""
        state = self._model.state_dict()
        shapes = {}
        for unit in self.units:
            empty = {name: torch.empty(state[name].shape, device="meta") for name in unit.names}
            shapes.update({key: tuple(tensor.shape) for key, tensor in self.unload(unit, empty).items()})
        return shapes
