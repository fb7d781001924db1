"""Chooses the hidden channels that stay, once for the whole model, from one dense forward.

What a group of readers (matrices W with one input X) loses without some channels hangs on X^T X and W^T W only. Each
group's are brought to one scale, channel by channel, by d = sqrt(mean x^2), and summed over the groups, so that every
group's relative output error counts the same:

    C = mean over groups of (X^T X / tokens) / (d d^T)        R^T R = sum of (W^T W ∘ d d^T) / tr(W X^T X W^T / tokens)

A criterion then sees one matrix R (channels, channels) with inputs of Gram matrix C. For Wanda's score this is exactly
the sum of the groups' scores. Memory: two square matrices for the whole model, and those of one block.

Norms are watched beside: the share of each channel in their input's energy says how their weights are scaled.

Units that go along are chosen in the same forward, block by block, each as the criterion does it on the inputs of its
consumer; where all blocks must keep the same, once, by the sum over all, as the channels are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secateur.engine.capture import AtBlock, Finished, first_states, pause
from secateur.engine.stream import BlockStream
from secateur.errors import CalibrationError
from secateur.least_squares import quadratic
from secateur.plugins import Criterion, Units
from secateur.statistics import InputStatistics
from secateur.structured.channels import Channels, Gain, Group
from secateur.structured.stream import Job, feeding_of, question_of

_ROWS = 8192
"""Rows of a matrix that are squared at a time."""


@dataclass
class ChannelStatistics:
    """What was gathered over all groups; sums, on the CPU in float64."""

    channels: int
    correlation: Tensor = field(init=False)
    reading: Tensor = field(init=False)
    means: Tensor = field(init=False)
    feeding: Tensor = field(init=False)
    """Share of each channel in the squares of the matrices that write the residual stream, (channels,)."""
    groups: int = 0
    energy: dict[str, Tensor] = field(default_factory=dict)
    """Norm's weight -> mean over tokens of x_j^2 / mean x^2."""

    def __post_init__(self) -> None:
        self.correlation, self.reading = (
            torch.zeros(self.channels, self.channels, dtype=torch.float64) for _ in range(2)
        )
        self.means, self.feeding = (torch.zeros(self.channels, dtype=torch.float64) for _ in range(2))

    def add(self, squares: Tensor, gram: Tensor | None, sums: Tensor | None, tokens: int) -> None:
        """Take in a group of readers.

        Args:
            squares: W^T W, (channels, channels).
            gram: X^T X, None when no inputs were seen: all channels then count alike.
            sums: of X over the tokens.
        """
        squares = squares.double().cpu()
        mean = torch.eye(self.channels, dtype=torch.float64) if gram is None else gram.double().cpu() / tokens
        size = mean.diagonal().clamp_min(0).sqrt()
        energy = float((squares * mean).sum())
        if not energy > 0:
            return
        safe = size.clamp_min(float(size.max()) * 1e-9 or 1.0)
        self.correlation += mean / safe / safe[:, None]
        self.reading += squares * size * size[:, None] / energy
        if sums is not None:
            self.means += sums.double().cpu() / tokens / safe
        self.groups += 1

    def choose(
        self, criterion: Criterion, remove: int, damping: float, salience: Tensor | None, *,
        columns: Tensor | None = None, feeding: Tensor | None = None, parts: int = 1,
    ) -> Tensor:  # fmt: skip
        """Numbers of the channels that stay, ascending; or of units, which are several channels each.

        Args:
            columns: the channels of each unit, (units, n).
            feeding: of the units, in the place of that of the channels.
            parts: as many units go from each of this many equal parts.
        """
        columns = torch.arange(self.channels)[:, None] if columns is None else columns
        feeding = self.feeding if feeding is None else feeding
        correlation = self.correlation / max(self.groups, 1)
        mean = float(self.reading.diagonal().mean())
        reading = self.reading + 1e-9 * mean * torch.eye(self.channels, dtype=torch.float64)
        factor = torch.linalg.cholesky(reading).t().contiguous()
        return criterion.choose(
            Units(
                weight=factor.float(), columns=columns, feeding=feeding.float(), gram=correlation.float(),
                sums=(self.means / max(self.groups, 1)).float(), tokens=1.0,
                problem=quadratic(correlation, None, factor, damping), parts=parts, salience=salience,
            ),
            remove,
        )  # fmt: skip


@dataclass(kw_only=True)
class ChoiceStream(BlockStream):
    """A dense forward that looks at what readers and norms get."""

    channels: Channels
    criterion: Criterion
    """Chooses units that go along."""
    saliences: Mapping[tuple[str, str], Tensor] = field(default_factory=dict)
    """By kind and consumer: scores of units from gradients, for a criterion that wants them."""
    damping: float = 0.01

    def look(self, batches: Sequence[Mapping[str, Tensor]]) -> ChannelStatistics:
        """Gather statistics of all batches, one block of weights in memory at a time; of the weights alone without."""
        self._made = ChannelStatistics(self.channels.before)
        self.units: dict[str, Tensor] = {}
        self._joint: dict[tuple[int, int, int], _Joint] = {}
        self._inputs: dict[str, InputStatistics] = {}
        self._sums: dict[str, Tensor] = {}
        self._normed: dict[str, tuple[Tensor, int]] = {}
        lanes = [self._lane(batch, observed=False) for batch in batches]
        handles = self._watch()
        self.reporter.stage("comparing channels", len(self.structure.blocks))
        try:
            with self._started(lanes):
                for block in self.structure.blocks:
                    with self._loaded(block) as tensors:
                        for lane in lanes:
                            if lane.event == AtBlock(block.index):
                                self._advance(lane)
                        for group in self.channels.groups.get(block.index, ()):
                            self._add(group, tensors)
                    self.reporter.advance(block.name)
                if self.channels.head is not None:
                    self._add_head(self.channels.head)
        finally:
            for handle in handles:
                handle.remove()
        self._made.energy = {name: total / count for name, (total, count) in self._normed.items() if count}
        for joint in self._joint.values():
            self.units |= joint.choose(self.criterion, self.damping)
        return self._made

    def _watch(self) -> list[Any]:
        groups = [group for groups in self.channels.groups.values() for group in groups]
        head = self.channels.head
        hooks = [(group.module, self._reader(group.module, last=False)) for group in groups]
        # Norms first: a hook at the head ends the forward there.
        hooks = [(gain.module, self._norm(name, gain)) for name, gain in self.channels.gains.items()] + hooks
        if head is not None:
            hooks.append((head.module, self._reader(head.module, last=True)))
        return [self.model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
                for path, hook in hooks]  # fmt: skip

    def _rows(self, args: Any, kwargs: Any) -> Tensor:
        states = first_states(args, kwargs).detach()
        return states.reshape(-1, states.shape[-1]).to(self.device, torch.float32)

    def _reader(self, path: str, *, last: bool) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            with torch._C.DisableTorchFunction():
                rows = self._rows(args, kwargs)
                seen = self._inputs.setdefault(path, InputStatistics(rows.shape[-1], "gram", device=self.device))
                try:
                    seen.update(rows)
                except CalibrationError as error:
                    raise CalibrationError(f"{error.message} at the input of {path}", hint=error.hint) from None
                self._sums[path] = self._sums.get(path, torch.zeros(())) + rows.sum(dim=0).cpu()
            if last:
                pause(Finished())

        return hook

    def _norm(self, name: str, gain: Gain) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            with torch._C.DisableTorchFunction():
                rows = self._rows(args, kwargs)
                squares = (rows - rows.mean(dim=1, keepdim=True) if gain.centred else rows).square()
                mean = squares.mean(dim=1, keepdim=True)
                real = mean[:, 0] > 0
                shares = (squares[real] / mean[real]).sum(dim=0).double().cpu()
                total, count = self._normed.get(name, (torch.zeros_like(shares), 0))
                self._normed[name] = total + shares, count + int(real.sum())

        return hook

    def _add(self, group: Group, tensors: Mapping[str, Tensor]) -> None:
        if group.job is not None:
            self._add_units(group, group.job, tensors)
            return
        squares = sum(_squares(tensors[one.name].to(self.device), one.dim) for one in group.readers)
        assert isinstance(squares, Tensor)
        seen, sums = self._inputs.pop(group.module, None), self._sums.pop(group.module, None)
        self._made.add(squares, None if seen is None else seen.gram, sums, 1 if seen is None else seen.tokens)
        reading = {(one.name, one.dim) for one in group.readers}
        for name, tensor in tensors.items():
            for dim in self.channels.cuts.get(name, ()):
                if tensor.ndim > 1 and (name, dim) not in reading and not name.endswith(".bias"):
                    self._made.feeding += _share(tensor, dim)

    def _add_units(self, group: Group, job: Job, tensors: Mapping[str, Tensor]) -> None:
        """Choose the units of a consumer, or note what speaks for each of them."""
        coupling, reader = job.coupling, group.readers[0]
        weight = tensors[reader.name].movedim(reader.dim, -1).to(self.device, torch.float32)
        bias = None if reader.bias is None else tensors[reader.bias].to(self.device, torch.float32)
        seen, sums = self._inputs.pop(group.module, None), self._sums.pop(group.module, None)
        feeding = feeding_of(coupling, tensors)
        salience = self.saliences.get((coupling.kind, coupling.consumer))
        if self.channels.joint and coupling.heads is not None:
            key = coupling.units, job.stay, weight.shape[1]
            joint = self._joint.setdefault(key, _Joint(job, ChannelStatistics(weight.shape[1])))
            if coupling.parts > joint.job.coupling.parts:
                joint.job = job
            squares = _squares(weight, 1)
            joint.add(coupling.consumer, squares, seen, sums, feeding, salience)
            return
        gram = torch.eye(weight.shape[1] + 1, device=self.device)  # every input seen once, alone
        if seen is not None and seen.gram is not None and sums is not None:
            gram[:-1, :-1], gram[-1, -1] = seen.gram, float(seen.tokens)
            gram[-1, :-1] = gram[:-1, -1] = sums.to(self.device)
        question = question_of(
            coupling, weight, bias, feeding.to(self.device, torch.float32), gram, self.damping, salience
        )
        self.units[coupling.consumer] = self.criterion.choose(question, coupling.units - job.stay).cpu()

    def _add_head(self, head: Group) -> None:
        names = [one.name for one in head.readers] or [f"{head.module}.weight"]
        squares = torch.zeros(self._made.channels, self._made.channels, device=self.device)
        for name in names:
            squares += _squares(self.binding.load([name], self.source)[name].to(self.device), 1)
        seen = self._inputs.pop(head.module, None)
        sums = self._sums.pop(head.module, None)
        self._made.add(squares, None if seen is None else seen.gram, sums, 1 if seen is None else seen.tokens)


@dataclass
class _Joint:
    """Units of which all blocks keep the same."""

    job: Job
    statistics: ChannelStatistics
    consumers: list[str] = field(default_factory=list)
    feeding: Tensor | None = None
    salience: Tensor | None = None

    def add(
        self, consumer: str, squares: Tensor, seen: InputStatistics | None, sums: Tensor | None, feeding: Tensor,
        salience: Tensor | None,
    ) -> None:  # fmt: skip
        self.statistics.add(squares, None if seen is None else seen.gram, sums, 1 if seen is None else seen.tokens)
        share = feeding / feeding.sum().clamp_min(1e-300)
        self.feeding = share if self.feeding is None else self.feeding + share
        if salience is not None:
            self.salience = salience if self.salience is None else self.salience + salience
        self.consumers.append(consumer)

    def choose(self, criterion: Criterion, damping: float) -> dict[str, Tensor]:
        coupling = self.job.coupling
        units = self.statistics.choose(
            criterion, coupling.units - self.job.stay, damping, self.salience, columns=coupling.columns,
            feeding=self.feeding, parts=coupling.parts,
        ).cpu()  # fmt: skip
        return dict.fromkeys(self.consumers, units)


def _squares(weight: Tensor, dim: int) -> Tensor:
    """W^T W over everything but ``dim``."""
    rows = weight.movedim(dim, -1).reshape(-1, weight.shape[dim])
    made = torch.zeros(weight.shape[dim], weight.shape[dim], device=weight.device)
    for part in rows.split(_ROWS):
        made.addmm_(part.t().float(), part.float())
    return made


def _share(weight: Tensor, dim: int) -> Tensor:
    """Share of each slice in the squares of a matrix."""
    squares = weight.double().square().movedim(dim, 0).reshape(weight.shape[dim], -1).sum(dim=1).cpu()
    return squares / squares.sum().clamp_min(1e-300)
