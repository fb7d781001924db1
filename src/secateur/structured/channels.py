"""Hidden channels: which tensors are cut along the residual stream, who reads it, and how a cut tensor is made.

Everything that touches the residual stream loses the same channels: embeddings, norms, the inputs of what reads it and
the outputs of what writes it. Nothing is known about families; `secateur.structured.channel_plan` finds these facts.

A norm over fewer channels divides by another mean. With x zero in the channels that go, the mean over all is kept / all
times that over those that stay, so for x / sqrt(mean x^2) the weight times sqrt(all / kept) makes both agree, up to
the epsilon. On real inputs the channels that go are not zero. The factor is then the root of the mean over the channels
that stay of E[x_j^2 / mean x^2]: all / kept under the root where the others are zero, 1 where all are alike.

LayerNorm subtracts a mean first. One over fewer channels subtracts that of the channels that stay; it is as if the
others, where the norm reads them, had this mean, and then the same factors hold, with the variance for mean x^2.

Units of blocks may go along: heads and neurons whose number a config binds to the hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor

from secateur.engine.binding import Binding, TensorReader
from secateur.structured.configure import Shrunk, noun
from secateur.structured.couplings import Coupling, Cut
from secateur.structured.proof import spread_units
from secateur.structured.stream import Job


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
    job: Job | None = None
    """Of a matrix that reads units which go along, not the residual stream."""


@dataclass(frozen=True)
class Gain:
    """The weight of a norm over the channels, used as ``offset`` + weight.

    ``unit`` is what the norm gives with its channels at zero (where it is ``centred``, at the mean of the others) by
    what it gives without them, times sqrt(kept / all).
    """

    module: str
    offset: float
    unit: float
    bias: str | None = None
    """What the norm adds at the end."""
    centred: bool = False
    """Whether it subtracts the mean over the channels."""


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
    jobs: dict[int, list[Job]] = field(default_factory=dict)
    """By block: units that go along, and how many stay."""
    joint: bool = False
    """Whether the units of all blocks are the same: they share something that has a number for each."""

    def lines(self) -> list[str]:
        """The plan in words."""
        lines = [f"hidden channels: {self.before:,} -> {self.after:,} everywhere, a multiple of {self.step}"]
        groups: dict[tuple[str, int, int], int] = {}
        for job in self.every_job():
            key = _name(job.coupling), job.coupling.units, job.stay
            groups[key] = groups.get(key, 0) + 1
        for (what, units, stay), count in groups.items():
            same = ", the same in all" if self.joint and what != noun("ffn") else ""
            lines.append(f"{what}: {units:,} -> {stay:,} in each of {count} places{same}, with the hidden channels")
        if any(gain.centred for gain in self.gains.values()):
            lines.append(f"norms that subtract the mean take it over the {self.after:,} channels that stay")
        return lines

    def units(self) -> dict[str, list[int]]:
        """By structure, and where blocks differ by structure and number: units before and after."""
        made = {"hidden": [self.before, self.after]}
        for job in self.every_job():
            alone = _name(job.coupling) == _ALONE
            kind, counts = "heads" if alone else job.coupling.kind, [job.coupling.units, job.stay]
            name = kind if made.setdefault(kind, counts) == counts else f"{kind} of {counts[0]}"
            made[name] = counts
        return made

    def every_job(self) -> Iterator[Job]:
        """The units that go along, in all blocks."""
        for jobs in self.jobs.values():
            yield from jobs

    def unit_cuts(self) -> dict[str, list[tuple[Coupling, Cut]]]:
        """Tensor -> where it is cut along units, and which."""
        made: dict[str, list[tuple[Coupling, Cut]]] = {}
        for job in self.every_job():
            for cut in job.coupling.cuts:
                made.setdefault(cut.name, []).append((job.coupling, cut))
        return made

    def spread_units(self) -> dict[str, Tensor]:
        """Consumer -> as many units as stay, spread over all; others in every block, unless these must be the same."""
        made = {}
        for index, jobs in self.jobs.items():
            for job in jobs:
                size = job.coupling.units // job.coupling.parts
                units = spread_units(job.coupling, job.stay)
                same = self.joint and job.coupling.heads is not None
                turned = units // size * size + (units % size + (0 if same else index)) % size
                made[job.coupling.consumer] = turned.sort().values
        return made

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
        if self.final is not None and name == self.gains[self.final].bias and self.answer != 1.0:
            made = (made.float() * self.answer).to(tensor.dtype)
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
            energy: norm's weight -> mean over tokens of x_j^2 / mean x^2, (channels,); of x less its mean where the
                norm subtracts one.
        """
        return {
            name: self.gains[name].unit * math.sqrt(max(float(shares[keep].double().mean()), 1e-12))
            for name, shares in energy.items()
        }


_ALONE = "heads"
"""What groups of one query head are called."""


def _name(coupling: Coupling) -> str:
    alone = coupling.kind == "kv-groups" and coupling.heads is not None and coupling.heads.each == 1
    return _ALONE if alone else noun(coupling.kind)


class CutBinding(Binding):
    """The tensors of a smaller model, made from the checkpoint of the whole one."""

    def __init__(
        self, model: transformers.PreTrainedModel, keys: Sequence[str], whole: Binding, channels: Channels,
        keep: Tensor, scales: Mapping[str, float], units: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        super().__init__(model, keys)
        self.resident = whole.resident
        self._whole, self._channels, self._keep, self._scales = whole, channels, keep, scales
        self._units, self._unit_cuts = units, channels.unit_cuts()
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
                cut = self._channels.cut(own, tensor, self._keep, self._scales)
                made[name] = self.without_units(own, cut)
        return made

    def without_units(self, name: str, tensor: Tensor, *, but: int | None = None) -> Tensor:
        """A tensor without the slices of the units that go; along ``but`` they stay."""
        for coupling, cut in self._unit_cuts.get(name, ()):
            if cut.dim != but:
                tensor = cut.apply(tensor, self._units[coupling.consumer])
        return tensor

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
