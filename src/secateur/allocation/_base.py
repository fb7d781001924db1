"""What an allocation rule is: what it wants to know of each matrix, and how its shares are brought to their sum."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from secateur.errors import SparsityError
from secateur.patterns import check_sparsity
from secateur.plugins import build, load_class
from secateur.statistics import InputStatistics

Need = Literal["nothing", "weights", "norms", "gram"]
HIGHEST = 0.95
"""No rule that gives matrices different sparsities prunes one further than this."""
_BISECTIONS = 100


@dataclass(frozen=True)
class Look:
    """One matrix of the dense model, as a rule sees it."""

    weight: Tensor
    """W, (out, in) float32, e.g. (576, 1536)."""
    stats: InputStatistics | None
    """Of its inputs in the dense model; None for a rule that needs the weights only."""
    fisher: Tensor | None
    """Mean over tokens of the squared gradient of the loss at each output, (out,); None for a rule without
    ``gradients``."""
    sparsity: float
    """What is divided: the sparsity of all matrices together."""
    solve: Callable[[float], Tensor]
    """The matrix pruned to a sparsity, by the method that the rule names as its ``solver``."""


@dataclass(frozen=True)
class Share:
    """One tensor of a model that gets a sparsity of its own; stacked experts are one."""

    name: str
    size: int
    """Weights in it."""
    block: int = 0
    """Number of the block that it is in."""
    measured: tuple[Tensor, ...] = ()
    """What `measure` returned, for each expert; of a rule with ``of_block``, what that returned for the block."""


@runtime_checkable
class Allocation(Protocol):
    """The whole contract of a rule that needs nothing.

    One that measures the model has two methods more: ``measure(look)`` returns a small tensor for each matrix, when
    its inputs have come. ``of_block(measured)``, where there is one, makes one tensor of all of a block, so that what
    it needs of each matrix may be large. With ``gradients`` true, ``sequences`` and ``length`` say how much text the
    loss is taken on, and ``solver`` is the name of the method that `Look.solve` uses. One that goes on by the loss
    of the whole model is a `Searching` rule.
    """

    needs: Need

    def allocate(self, shares: Sequence[Share], sparsity: float) -> dict[str, float]:
        """Sparsity of each, by name, so that the mean weighted by size is ``sparsity``."""


@runtime_checkable
class Measuring(Allocation, Protocol):
    """A rule that looks at every matrix first."""

    def measure(self, look: Look) -> Tensor:
        """What must be known of one matrix."""


@runtime_checkable
class WithGradients(Measuring, Protocol):
    """A rule that wants to know what an error of each output costs."""

    gradients: bool
    sequences: int
    length: int
    solver: str


class Bench(Protocol):
    """Measures whole models whose matrices are at the levels that a rule has tried."""

    generator: random.Random
    windows: int
    """How many calibration windows there are."""

    def loss(self, levels: Mapping[str, int], windows: Sequence[int]) -> float:
        """Mean over the tokens of some windows, by number; ``levels`` has one for each matrix, by its place in
        `Searching.tried`.
        """

    def tell(self, loss: float) -> None:
        """One more step is done, and this is the lowest loss so far."""


@runtime_checkable
class Searching(WithGradients, Protocol):
    """A rule that goes on by the loss of the whole model, of what `Look.solve` made in ``measure``."""

    generations: int
    """Steps of the search; with 0 there is none."""
    windows: int
    """Calibration windows of ``length`` tokens that it wants, at most."""
    forwards: int
    """Windows that it runs through the model, at most."""

    def tried(self, sparsity: float) -> list[float]:
        """The sparsities that ``measure`` asks `Look.solve` for, the same for every matrix, ascending."""

    def refine(
        self, shares: Sequence[Share], start: Mapping[str, float], sparsity: float, bench: Bench
    ) -> dict[str, float]:
        """A better division than ``start``, which `allocate` made, with the same mean."""


def make_allocation(name: str, options: Mapping[str, object] | None = None) -> Allocation:
    """Build a rule from its name and plain options.

    Raises:
        UnknownNameError: for an unknown rule or option.
        UsageError: for an option with a value it refuses.
    """
    rule: Allocation = build(load_class("allocation", name, "allocation"), options or {}, f"allocation {name}")
    return rule


def projected(
    wanted: Mapping[str, float], sizes: Mapping[str, int], sparsity: float,
    low: float = 0.0, high: float = HIGHEST,
) -> dict[str, float]:  # fmt: skip
    """Shift all shares alike, each no further than its bounds, until their mean weighted by size is the sparsity.

    The shift is found by bisection, so what is cut off at a bound is spread over the others.

    Raises:
        SparsityError: when ``sparsity`` is outside [0, 1), or outside the bounds, so that no shift can meet it.
    """
    check_sparsity(sparsity)
    if not low <= sparsity <= high:
        raise SparsityError(
            f"sparsity {sparsity:g} cannot be met: no matrix is pruned to less than {low:g} or more than {high:g}",
            hint="use --allocation uniform, or another sparsity",
        )
    total = sum(sizes[name] for name in wanted)

    def shifted(by: float) -> dict[str, float]:
        return {name: min(high, max(low, share + by)) for name, share in wanted.items()}

    below, above = low - max(wanted.values(), default=0.0), high - min(wanted.values(), default=0.0)
    for _ in range(_BISECTIONS):
        middle = (below + above) / 2
        made = shifted(middle)
        if sum(sizes[name] * share for name, share in made.items()) < sparsity * total:
            below = middle
        else:
            above = middle
    return shifted(above)


def block_means(shares: Sequence[Share]) -> dict[int, float]:
    """Mean, for each block, of a number that was measured on its matrices, each counted once."""
    values: dict[int, list[float]] = {}
    for share in shares:
        values.setdefault(share.block, []).extend(float(one) for one in share.measured)
    return {block: sum(found) / len(found) for block, found in values.items() if found}
