"""The loop of expert removal: see what the experts of a block do, choose, and go on without the others.

A block is looked at with what really arrives, behind blocks that are already cut. Then its mixture is replaced by that
of the smaller model, so that the forwards go on through what is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.blocks import Block
from secateur.engine.capture import BlockLane, Finished, Lane
from secateur.engine.skeleton import drop_tensor
from secateur.engine.stream import BlockStream
from secateur.errors import RunError, WeightValueError
from secateur.masks import lowest_per_row
from secateur.plugins import ExpertCriterion, Experts
from secateur.result import PrunedMatrix
from secateur.structured.experts import ExpertPlan
from secateur.structured.pools import Pool
from secateur.structured.routing import Use, read_call, watched


@dataclass
class ExpertStream(BlockStream):
    """A stream that removes experts. ``plan`` stays empty; ``experts`` says what goes."""

    experts: ExpertPlan | None = None
    criterion: ExpertCriterion | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.experts is not None
        self.result_binding = self.experts.binding
        self._whole: dict[str, nn.Module] = {}
        pools = self.experts.pools.values()
        self._first = {
            name: pool.listed[0][place] for pool in pools for names in pool.listed for place, name in enumerate(names)
        }

    def output_dtype(self, name: str) -> torch.dtype:
        """Number format in which a tensor of the model is written; of any expert, that of the first one."""
        return super().output_dtype(self._first.get(name, name))

    def _lane(self, inputs: Mapping[str, Tensor], *, observed: bool) -> Lane:
        lane = super()._lane(inputs, observed=observed)
        if observed:  # matrices are nothing to pause at, and the head is not needed
            lane.observed, lane.keep_output = False, True
        return lane

    def _advance(self, lane: Lane, solver: Any = None) -> None:
        super()._advance(lane, solver)
        lane.output = None

    # --- one block -----------------------------------------------------------------------------------------------

    def _prune_block(self, block: Block, lanes: list[Lane], final: dict[str, Tensor]) -> list[PrunedMatrix]:
        assert self.experts is not None
        pool = self.experts.pools.get(block.index)
        if pool is None:
            self._go_on(block, lanes, final)
            return []
        use = self._look(block, pool, lanes, final)
        kept = self._choose(pool, use, final)
        pool.cut(final, kept)
        self._replace(pool)
        self._go_on(block, lanes, final)
        return self._reports(block, pool, use, kept, final)

    def _go_on(self, block: Block, lanes: Sequence[Lane], tensors: Mapping[str, Tensor]) -> None:
        if lanes:
            self._install(block, tensors, self.compute_dtype, frozen=True)  # nothing changes them
        for lane in lanes:
            self._pass(lane)

    def _look(self, block: Block, pool: Pool, lanes: Sequence[Lane], tensors: Mapping[str, Tensor]) -> Use:
        """A forward through the whole block for every batch; the lanes stay where they are."""
        use = Use(pool.experts)
        if not lanes:
            return use
        self._install(block, tensors, self.compute_dtype, frozen=True)
        module, experts = (self.model.get_submodule(name) for name in (block.name, pool.module))

        def see(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = read_call(experts, args, kwargs, pool.experts)
            if call is None:
                raise RunError(f"{pool.module} is called in another way than before", hint="please report this")
            use.add(call, block.name)

        handle = watched(experts, see)
        try:
            for lane in lanes:
                self.store.unpark(lane.watcher)
                look = BlockLane(module, lane)
                self.store.park(lane.watcher)
                look.observed = False
                while not isinstance(look.advance(), Finished):
                    pass  # at the entry of the block
        finally:
            handle.remove()
        for name in tensors:
            drop_tensor(self.model, name)
        return use

    def _choose(self, pool: Pool, use: Use, tensors: Mapping[str, Tensor]) -> Tensor:
        """Numbers of the experts that stay, ascending: as many from each part."""
        assert self.experts is not None
        assert self.criterion is not None
        score = self.criterion.score(Experts(use.tokens, use.outputs, _squares(pool, tensors)))
        if not bool(score.isfinite().all()):
            raise WeightValueError("a pruning score is not finite", hint="check the weights and the calibration data")
        parts = self.experts.parts
        keep = lowest_per_row(score.reshape(parts, -1), (pool.experts - self.experts.stay) // parts)
        return keep.reshape(-1).nonzero().squeeze(1).cpu()

    def _replace(self, pool: Pool) -> None:
        """Put the smaller model's mixture, still without weights, into the running one."""
        assert self.experts is not None
        for part in pool.parts:
            self._whole[part] = self.model.get_submodule(part)
            self.model.set_submodule(part, self.experts.shrunk.skeleton.get_submodule(part))

    def _drop(self, block: Block, names: Sequence[str]) -> None:
        if self._whole:
            names = [name for name in names if self.result_binding.bound(name)]
        super()._drop(block, names)
        while self._whole:
            self.model.set_submodule(*self._whole.popitem())

    def _changed(self, block: Block, matrices: Sequence[PrunedMatrix]) -> set[str]:
        assert self.experts is not None
        pool = self.experts.pools.get(block.index)
        return set(pool.names) if pool is not None else set()

    def _written_block(self, block: Block, names: Sequence[str], done: list[PrunedMatrix]) -> dict[str, Tensor]:
        """What an earlier run wrote: the block without the experts that went, and its mixture put in place."""
        assert self.experts is not None
        pool = self.experts.pools.get(block.index)
        if pool is not None:
            self._replace(pool)
        bound = [name for name in names if self.result_binding.bound(name)]
        return self.result_binding.load(bound, self.sink.reader())

    def _reports(
        self, block: Block, pool: Pool, use: Use, kept: Tensor, final: Mapping[str, Tensor]
    ) -> list[PrunedMatrix]:
        assert self.experts is not None
        assert self.criterion is not None
        own, stays = set(pool.names), kept.tolist()
        made = []
        for matrix in self.experts.structure.blocks[block.index].matrices:
            if matrix.name in own:
                zeros = int((final[matrix.name] == 0).sum())
                made.append(PrunedMatrix(matrix.name, matrix.shape, zeros, zeros / matrix.size, None, [], list(stays)))
        unreached = (use.tokens == 0).nonzero().squeeze(1).tolist() if self.criterion.data else []
        if unreached:
            still = [expert for expert in unreached if expert in stays]
            made[0].notes.append(
                f"no calibration token came to experts {', '.join(map(str, unreached))}: "
                + (f"{', '.join(map(str, still))} stay all the same" if still else "all of them are removed")
            )
        return made


def _squares(pool: Pool, tensors: Mapping[str, Tensor]) -> Tensor:
    """Sum of squares of the weights of each expert, without the router's."""
    total = torch.zeros(pool.experts, dtype=torch.float64)
    outside = set(pool.routers)
    for cut in pool.cuts:
        if cut.name in tensors and cut.name not in outside:
            for expert, rows in enumerate(cut.indices):
                part = tensors[cut.name].index_select(cut.dim, rows)
                total[expert] += float(part.double().square().sum())
    for expert, names in enumerate(pool.listed):
        total[expert] += sum(float(tensors[name].double().square().sum()) for name in names if name in tensors)
    return total
