"""Chooses the blocks to leave out.

- greedy: one block after the other, each time the one without which the loss on calibration text is lowest (the outputs
  are nearest to the whole model's, where there is no next token). About removed·(blocks - removed / 2) short forwards
  through the model in memory.
- influence: those that change their input least, 1 - mean over tokens of cos(x_l, x_{l+1}). Source: Men et al.,
  "ShortGPT", 2024, eq. 1; all tokens count.
- angular: the run of n blocks whose output points most in the direction of its input, arccos(cos(x_l, x_{l+n})) / pi on
  the last token of each window. Source: Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", 2024,
  eq. 4.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.engine.blocks import Block, Structure
from secateur.engine.capture import AtBlock, Finished, first_states, handed_on, note_returns
from secateur.engine.inputs import output_tensor
from secateur.engine.stream import BlockStream
from secateur.errors import UnsupportedModelError
from secateur.progress import Reporter

GREEDY_TOKENS = 2048
"""Calibration tokens that every candidate is measured on."""
GREEDY_LIMIT = 1e15
"""Most floating-point operations that auto spends on greedy removal: some ten minutes of a small computer."""


def greedy_is_affordable(blocks: int, remove: int, parameters: int, tokens: int) -> bool:
    """Whether auto takes greedy removal."""
    forwards = sum(blocks - done for done in range(remove))
    return 2.0 * parameters * tokens * forwards <= GREEDY_LIMIT


@dataclass
class States:
    """Sums over calibration tokens of what block influence and angular distance need."""

    cosine: dict[int, float] = field(default_factory=dict)
    """Block -> sum of cosines between its input and its output."""
    tokens: dict[int, int] = field(default_factory=dict)
    last: dict[int, list[Tensor]] = field(default_factory=dict)
    """Block -> its input at the last token of each window; one more entry for the output of the last block."""

    def influence(self) -> list[float]:
        """1 - mean cosine, block by block."""
        return [1 - self.cosine[index] / self.tokens[index] for index in sorted(self.cosine)]

    def angular(self, run: int) -> list[float]:
        """Mean angle / pi between the input of every block and the output ``run`` blocks later."""
        states = [torch.cat(self.last[index]) for index in sorted(self.last)]
        pairs = zip(states, states[run:], strict=False)
        return [float(F.cosine_similarity(a, b, dim=-1).clamp(-1, 1).acos().mean()) / math.pi for a, b in pairs]


class StateStream(BlockStream):
    """A dense forward that looks at what goes into and comes out of each block."""

    def look(self, batches: Sequence[Mapping[str, Tensor]]) -> States:
        """Gather the states of all batches, one block of weights in memory at a time."""
        lanes = [self._lane(batch, observed=False) for batch in batches]
        states = States()
        self.reporter.stage("comparing blocks", len(self.structure.blocks))
        for lane in lanes:
            lane.keep_output = True
        with self._started(lanes):
            while waiting := {lane.event.index for lane in lanes if isinstance(lane.event, AtBlock)}:
                block = self.structure.blocks[min(waiting)]
                with self._loaded(block):
                    for lane in lanes:
                        if lane.event == AtBlock(block.index):
                            self.store.unpark(lane.watcher)
                            assert lane.call is not None
                            before = first_states(*lane.call).detach().float().clone()
                            self.store.park(lane.watcher)
                            self._advance(lane)
                            after, lane.output = lane.output.float(), None
                            _add(states, block.index, before, after, last=isinstance(lane.event, Finished))
                self.reporter.advance(block.name)
        return states


def _add(states: States, index: int, before: Tensor, after: Tensor, *, last: bool) -> None:
    if before.shape != after.shape:  # a block that cannot hand on its input: nothing changes it more
        after = -before
    cosine = F.cosine_similarity(before.reshape(-1, before.shape[-1]), after.reshape(-1, after.shape[-1]), dim=-1)
    states.cosine[index] = states.cosine.get(index, 0.0) + float(cosine.double().sum())
    states.tokens[index] = states.tokens.get(index, 0) + len(cosine)
    states.last.setdefault(index, []).append(before[:, -1].cpu())
    if last:
        states.last.setdefault(index + 1, []).append(after[:, -1].cpu())


class Quotas:
    """How many blocks may still go from each row.

    Args:
        counts: by row; None lets any go.
        fixed: numbers of blocks that stay in any case.
    """

    def __init__(self, structure: Structure, counts: Mapping[str, int] | None, fixed: Collection[int] = ()) -> None:
        self._rows = [block.row for block in structure.blocks]
        self._left = (
            {**dict.fromkeys(self._rows, 0), **counts}
            if counts is not None
            else dict.fromkeys(self._rows, len(self._rows))
        )
        self._fixed = frozenset(fixed)

    def allows(self, index: int) -> bool:
        """Whether a block may go."""
        return self._left[self._rows[index]] > 0 and index not in self._fixed

    def take(self, index: int) -> None:
        """Note that a block goes."""
        self._left[self._rows[index]] -= 1


def least_influence(states: States, remove: int, quotas: Quotas | None = None) -> list[int]:
    """The blocks with the least influence, ascending; of equal ones the lower number.

    Raises:
        UnsupportedModelError: when not so many may go.
    """
    scores = dict(zip(sorted(states.cosine), states.influence(), strict=True))
    gone: list[int] = []
    for index in sorted(scores, key=lambda index: (scores[index], index)):
        if len(gone) < remove and (quotas is None or quotas.allows(index)):
            gone.append(index)
            if quotas is not None:
                quotas.take(index)
    _check_count(gone, remove)
    return sorted(gone)


def _check_count(gone: Sequence[int], remove: int) -> None:
    if len(gone) < remove:
        raise UnsupportedModelError(
            f"only {len(gone)} of {remove} blocks can be left out: the model does not run without the others, "
            "or they are the only ones of their build",
            hint="choose a lower --sparsity, or another --structure",
        )


def smallest_angle(states: States, remove: int, quotas: Quotas | None = None) -> list[int]:
    """The run of blocks that turns its input least.

    Raises:
        UnsupportedModelError: when every run holds a block that has to stay.
    """
    scores = dict(enumerate(states.angular(remove), start=min(states.last)))
    runs = [run for run in scores if quotas is None or all(map(quotas.allows, range(run, run + remove)))]
    if not runs:
        _check_count([], remove)
    start = min(runs, key=lambda index: (scores[index], index))
    return list(range(start, start + remove))


def greedy_removal(
    model: nn.Module, structure: Structure, remove: int, loss: Callable[[], float], reporter: Reporter,
    quotas: Quotas | None = None,
) -> tuple[list[int], list[float]]:  # fmt: skip
    """Leave out one block after the other, each time the one without which ``loss()`` of the model is lowest.

    Returns:
        The blocks, ascending, and the loss after each removal.
    """
    total = len(structure.blocks)
    reporter.stage("leaving out blocks", sum(total - done for done in range(remove)))
    with contextlib.closing(greedy_order(model, structure, loss, reporter, quotas=quotas)) as order:
        found = list(itertools.islice(order, remove))
    _check_count([index for index, _ in found], remove)
    return sorted(index for index, _ in found), [value for _, value in found]


def greedy_order(
    model: nn.Module, structure: Structure, loss: Callable[[], float], reporter: Reporter, *, among: int | None = None,
    quotas: Quotas | None = None,
) -> Generator[tuple[int, float]]:  # fmt: skip
    """Block after block, each time the one without which ``loss()`` of the model is lowest.

    One stays, and those without which the model does not run.

    Between two of them the model skips all that were given. Close the generator to have the whole model back.

    Args:
        among: after the first round only so many are tried: those that cost least when they were last tried.

    Yields:
        The number of a block, and the loss without it and those before it.
    """
    quotas = quotas or Quotas(structure, None)
    left = list(range(len(structure.blocks)))
    gone: set[int] = set()
    latest = dict.fromkeys(left, -math.inf)
    with skipping(model, structure, gone):
        loss()  # shows what a block returns before one is skipped
        while len(left) > 1:
            tried = sorted(filter(quotas.allows, left), key=lambda index: (latest[index], index))
            tried = tried[: among if gone else None]
            for index in sorted(tried):
                gone.add(index)
                value = _loss_if_any(loss)
                latest[index] = value if math.isfinite(value) else math.inf
                gone.discard(index)
                reporter.advance(f"block {index}")
            best = min(tried, key=lambda index: (latest[index], index), default=None)
            if best is None or latest[best] == math.inf:
                return
            gone.add(best)
            left.remove(best)
            quotas.take(best)
            yield best, latest[best]


def _loss_if_any(loss: Callable[[], float]) -> float:
    """The loss, or infinity where the model does not run: what comes behind may need what a block makes."""
    try:
        return loss()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError):
        return math.inf


@contextlib.contextmanager
def skipping(model: nn.Module, structure: Structure, gone: set[int]) -> Iterator[None]:
    """While it lasts, the blocks whose numbers are in ``gone``, which may change, hand on what they get."""

    def wrapped(block: Block, forward: Callable[..., Any]) -> Callable[..., Any]:
        def passing(*args: Any, **kwargs: Any) -> Any:
            if block.index in gone:
                return handed_on(block, args, kwargs)
            output = forward(*args, **kwargs)
            note_returns(block, args, kwargs, output)
            return output

        return passing

    modules = [model.get_submodule(block.name) for block in structure.blocks]
    for block, module in zip(structure.blocks, modules, strict=True):
        module.__dict__["forward"] = wrapped(block, module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["forward"]


def distance_from(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> Callable[[], float]:
    """A loss for models without next tokens: relative squared distance of the outputs from those they give now."""
    with torch.inference_mode():
        wanted = [output_tensor(model(**batch)).float() for batch in batches]

    def loss() -> float:
        with torch.inference_mode():
            made = [output_tensor(model(**batch)).float() for batch in batches]
        pairs = zip(made, wanted, strict=True)
        return sum(float((a - b).square().sum() / b.square().sum().clamp_min(1e-30)) for a, b in pairs) / len(wanted)

    return loss
