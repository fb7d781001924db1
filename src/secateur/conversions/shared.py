"""Blocks that share their weights: tied into groups, or, where they are, run in fewer and larger steps.

    groups      m consecutive blocks become one, applied m times: each of its weights is the mean of theirs
    iterations  h <- h + F(h), m times, is Euler's method with step 1 on [0, m]; n < m larger steps end at the same
                place: h <- h + (m / n) F(h), with F(h) = block(h) - h, all that attention and network add

A trained model does not survive the first without training: blocks that were never asked to be alike are not. The
second wants blocks that add to what they get (pre-norm, as in all recent language models), and is the more exact the
less a step changes; n = m is the model itself, bit for bit.

Cost: one mean over the weights; nothing for iterations. Parameters of a model of L blocks that become G groups: G times
those of a block, and all that is outside. Source of the steps: Zhang et al., "Faster inference for parameter-shared
language models", 2023 (arXiv 2310.12818); the scaling of a block as a whole is our reading.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import UsageError

AUTO = "auto"


@dataclass(frozen=True)
class Shared:
    """Options of the conversion, and what it does with blocks."""

    name: ClassVar[str] = "shared"

    groups: int | None = None
    """Tie the blocks into this many groups of consecutive ones, stored once each. Needs training afterwards."""
    iterations: int | None = None
    """Of a model whose blocks are tied: how many of them are run, in steps that are larger in return."""
    step: str | float = "auto"
    """Size of a step with --iterations; `auto` makes up for what is not run, 1 leaves it out and no more."""

    def __post_init__(self) -> None:
        if (self.groups is None) == (self.iterations is None):
            raise UsageError(
                "shared needs --groups or --iterations" + (", not both" if self.groups is not None else ""),
                hint="--groups ties the blocks of a model, --iterations runs a tied one with fewer steps",
            )
        for flag, value in (("--groups", self.groups), ("--iterations", self.iterations)):
            if value is not None and (not str(value).isdecimal() or int(value) < 1):
                raise UsageError(f"{flag} {value}", hint="give a number from 1 on")
        if self.step != AUTO:
            try:
                size = float(self.step)
            except ValueError:
                size = math.nan
            if not (size > 0 and math.isfinite(size)):
                raise UsageError(f"--step {self.step}", hint=f"give a number above 0, or {AUTO}")
            if self.iterations is None:
                raise UsageError("--step is for --iterations", hint="leave it out")

    @property
    def statistics(self) -> bool:
        """Whether calibration text is read."""
        return False

    def group_map(self, blocks: int) -> list[int]:
        """Number of the group of each block.

        Raises:
            UsageError: when the groups do not divide the blocks.
        """
        groups = int(self.groups or 1)
        if blocks % groups:
            fits = ", ".join(str(n) for n in range(1, blocks + 1) if blocks % n == 0)
            raise UsageError(f"{groups} groups do not divide {blocks} blocks", hint=f"give --groups {fits}")
        return [block // (blocks // groups) for block in range(blocks)]

    def kept(self, groups: Sequence[int]) -> list[int]:
        """Blocks that are run, as many of each group, spread evenly over it.

        Raises:
            UsageError: when the iterations do not divide among the groups, or are more than there are blocks.
        """
        count, wanted = max(groups) + 1, int(self.iterations or 1)
        if wanted > len(groups) or wanted % count:
            fits = ", ".join(str(n) for n in range(count, len(groups) + 1, count))
            raise UsageError(
                f"{wanted} iterations of {len(groups)} blocks in {count} groups", hint=f"give --iterations {fits}"
            )
        chosen = []
        for group in range(count):
            own = [block for block, number in enumerate(groups) if number == group]
            chosen += [own[k * len(own) * count // wanted] for k in range(wanted // count)]
        return chosen

    def step_of(self, blocks: int, before: float) -> float:
        """Size of a step, where ``blocks`` of them of size ``before`` were made."""
        return before * blocks / int(self.iterations or blocks) if self.step == AUTO else float(self.step)


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """The mean of tensors of one shape, float32."""
    total = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for tensor in tensors:
        total += tensor
    return (total / len(tensors)).float()
