"""What sensitivity divides, refined by evolution on the loss of the whole model (EvoPress).

Starts from the division of `sensitivity`, whose curves take the errors of different matrices to add up, and goes on
with what the whole model says. Every matrix was pruned to the levels of its curve; these weights are kept on disk. The
population is one division. In each of ``generations`` it has ``offspring``, each by min(a, b) switches, a and b drawn
from 1 to 3. A switch takes some matrices one level up and others one level down, as many weights here as there: one of
each where both have the same size, p and q of them, at most four, where q times the one size is p times the other. So
the budget is kept exactly, and matrices whose sizes have no such ratio keep the share that sensitivity gave them
together.

Fitness is the divergence from the dense model, mean over calibration tokens of KL(p || q) over its 64 most likely next
tokens and all others as one class, in nats. Offspring are selected in rounds: all are measured on one window that is
drawn anew, a quarter of them go on to a quarter of the ``windows``, and the best of these is measured on all. It
replaces its parent when it is lower there; so the fitness never rises, and with no generations the division is that of
sensitivity.

Beside what sensitivity takes: the whole model in memory; on disk ``levels`` times its prunable weights in bfloat16;
about offspring·(1 + windows/16) + windows forwards of ``length`` tokens for each generation. What that comes to is told
when the search begins. Source: Sieberling, Kuznedelev, Kurtic and Alistarh, "EvoPress", 2024 (arXiv 2410.14649),
algorithm 1. There levels are equal numbers of weights in all matrices, the start is uniform, and every round's tokens
are drawn anew; here the last round has the same tokens in all generations, so that a parent is measured once.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.allocation._base import Bench, Look, Need, Share
from secateur.allocation.sensitivity import Sensitivity, levels_around
from secateur.errors import UsageError

_MOST_SWITCHES = 3
_MOST_MATRICES = 4
"""On either side of a switch."""
_QUARTER = 4

Levels = dict[str, int]
"""Name of a matrix -> number of its level, ascending in sparsity."""


@dataclass(frozen=True, kw_only=True)
class Evolve:
    """Sensitivity, and then evolution."""

    name: ClassVar[str] = "evolve"
    needs: ClassVar[Need] = "gram"
    gradients: ClassVar[bool] = True

    generations: int = 30
    """Times that the division has offspring; with 0 it stays that of sensitivity."""
    offspring: int = 8
    """Divisions tried in each generation."""
    windows: int = 16
    """Calibration windows that the best offspring of a generation is measured on."""
    step: float = 0.05
    """How far the sparsity of a matrix goes in one switch; about, since the levels are at equal distances."""
    spread: float = 0.15
    """How far the sparsity of a matrix may be from that of all."""
    sequences: int = 8
    """Calibration windows that sensitivity takes gradients on."""
    length: int = 512
    """Tokens of each window, at most."""
    solver: str = "sparsegpt"
    """Method that prunes to each level."""

    def __post_init__(self) -> None:
        for option, value, least in (
            ("generations", self.generations, 0), ("offspring", self.offspring, 1), ("windows", self.windows, 1),
        ):  # fmt: skip
            if value < least:
                raise UsageError(f"{option} of evolve is {value}", hint=f"it must be at least {least}")
        if not 0 < self.step <= self.spread:
            raise UsageError(
                f"step of evolve is {self.step:g}", hint=f"it must be above 0, and at most the spread {self.spread:g}"
            )
        self._start  # noqa: B018 - what sensitivity refuses is refused

    @property
    def _start(self) -> Sensitivity:
        levels = round(2 * self.spread / self.step) + 1
        return Sensitivity(
            spread=self.spread, levels=levels, sequences=self.sequences, length=self.length, solver=self.solver
        )

    def measure(self, look: Look) -> Tensor:
        """The curve of one matrix, as `Sensitivity` has it."""
        return self._start.measure(look)

    def allocate(self, shares: Sequence[Share], sparsity: float) -> dict[str, float]:
        """Sparsity of each where the search starts, so that the mean weighted by size is ``sparsity``.

        Raises:
            SparsityError: when the sparsity is outside [0, 0.95].
        """
        return self._start.allocate(shares, sparsity)

    def tried(self, sparsity: float) -> list[float]:
        """The sparsities that every matrix was pruned to, ascending."""
        return levels_around(sparsity, self.spread, self._start.levels)

    @property
    def forwards(self) -> int:
        """Windows that the search runs through the model, at most."""
        return forwards(self.windows, self.generations, self.offspring)

    def refine(
        self, shares: Sequence[Share], start: Mapping[str, float], sparsity: float, bench: Bench
    ) -> dict[str, float]:
        """What evolution makes of a division, with the same number of zeros.

        Args:
            start: what `allocate` said. The one matrix that it puts between two levels stays there.
            bench: measures divisions.
        """
        at = self.tried(sparsity)
        nearest = {name: min(range(len(at)), key=lambda k: abs(at[k] - share)) for name, share in start.items()}
        sizes = {one.name: one.size for one in shares if abs(at[nearest[one.name]] - start[one.name]) < 1e-9}
        found = evolved(nearest, Switches(sizes, len(at)), self.generations, self.offspring, bench)
        return {name: start[name] if found[name] == nearest[name] else at[found[name]] for name in start}


class Switches:
    """The switches that keep the number of zeros.

    Args:
        sizes: of the matrices that may be switched, by name.
        levels: how many levels each has.
    """

    def __init__(self, sizes: Mapping[str, int], levels: int) -> None:
        self._levels = levels
        groups: dict[int, list[str]] = {}
        for name in sorted(sizes):
            groups.setdefault(sizes[name], []).append(name)
        counts = range(1, _MOST_MATRICES + 1)
        self._sides: list[tuple[list[str], int, list[str], int]] = []
        """Matrices to take some of upwards, how many, and the same downwards."""
        for one, up in groups.items():
            for other, down in groups.items():
                pairs = [(p, q) for p in counts for q in counts if p * one == q * other]
                if pairs and (one != other or len(up) > 1):
                    self._sides.append((up, pairs[0][0], down, pairs[0][1]))
        self._weights = [len(up) * len(down) for up, _, down, _ in self._sides]

    def drawn(self, parent: Mapping[str, int], generator: random.Random) -> Levels | None:
        """The parent after a few random switches; None where none of those that were drawn is possible."""
        made = dict(parent)
        if not self._sides:
            return None
        for _ in range(min(generator.randint(1, _MOST_SWITCHES), generator.randint(1, _MOST_SWITCHES))):
            up, p, down, q = generator.choices(self._sides, self._weights)[0]
            rising = [name for name in up if made[name] + 1 < self._levels]
            chosen = generator.sample(rising, p) if len(rising) >= p else []
            falling = [name for name in down if made[name] > 0 and name not in chosen]
            if not chosen or len(falling) < q:
                continue
            for name in chosen:
                made[name] += 1
            for name in generator.sample(falling, q):
                made[name] -= 1
        return made if made != parent else None


def evolved(start: Levels, switches: Switches, generations: int, offspring: int, bench: Bench) -> Levels:
    """The fittest division that was found; ``bench.tell`` hears the fitness of the parent before and after each.

    Args:
        start: the first parent.
        bench: its windows are those of the last round.
    """
    every = list(range(bench.windows))
    generator = bench.generator
    parent, fitness = dict(start), 0.0
    if generations:
        fitness = bench.loss(parent, every)
        bench.tell(fitness)
    for _ in range(generations):
        drawn = [switches.drawn(parent, generator) for _ in range(offspring)]
        young = list({tuple(sorted(one.items())): one for one in drawn if one is not None}.values())
        for some, stay in rounds(len(every), offspring):
            if len(young) > stay:
                young = _fittest(young, stay, bench, generator.sample(every, some))
        for one in young:
            loss = bench.loss(one, every)
            if loss < fitness:
                parent, fitness = one, loss
        bench.tell(fitness)
    return parent


def rounds(windows: int, offspring: int) -> list[tuple[int, int]]:
    """Windows that are looked at in each round before the last, and how many offspring are left after it."""
    return [(1, max(1, offspring // _QUARTER)), (max(1, windows // _QUARTER), 1)]


def forwards(windows: int, generations: int, offspring: int) -> int:
    """Windows that a search runs through the model, at most."""
    if not generations:
        return 0
    left, each = offspring, windows
    for some, stay in rounds(windows, offspring):
        each += some * left if left > stay else 0
        left = min(left, stay)
    return windows + generations * each


def _fittest(young: Sequence[Levels], count: int, bench: Bench, windows: Sequence[int]) -> list[Levels]:
    losses = [bench.loss(one, windows) for one in young]
    order = sorted(range(len(young)), key=lambda number: (losses[number], number))
    return [young[number] for number in order[:count]]
