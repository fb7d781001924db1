"""Recovery block by block: each pruned block learns to give the dense block's outputs, one block in memory at a time.

Two rows of forwards walk through the model side by side, one with the dense weights and one with those already
recovered. When both stand at a block, the block is trained so that from the inputs which really arrive it makes what
the dense model made there: errors of earlier blocks are corrected, not passed on. No graph spans more than one block.

Source: EBFT (arXiv 2402.12419), with three differences: targets come from dense inputs rather than from the pruned
ones; the error is relative for each token, because a few tokens with huge activations would decide everything else; and
norms and biases are trained as well.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from secateur.engine.block_training import BlockTraining, Diverged, TrainingStream
from secateur.engine.blocks import Block
from secateur.engine.capture import Lane
from secateur.engine.paired import Spilled
from secateur.errors import RunError
from secateur.recovery.zeros import HeldZeros
from secateur.result import PrunedMatrix

_SMALLER = "start again with --overwrite and a smaller --learning-rate"


@dataclass
class BlockRecovery(TrainingStream[Spilled]):
    """A stream whose blocks are trained instead of pruned. ``plan`` stays empty."""

    training: BlockTraining = field(default_factory=BlockTraining)
    losses: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Block index -> mean relative squared error over the first and the last quarter of its training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._told = False

    def _prune_block(self, block: Block, lanes: list[Lane], final: dict[str, torch.Tensor]) -> list[PrunedMatrix]:
        held = HeldZeros.of({matrix.name: final[matrix.name] for matrix in block.matrices})
        if lanes:
            self._train(block, lanes, final, held)
            self._install(block, final, self.compute_dtype)
            for lane in lanes:
                self._pass(lane)
        reports = []
        for matrix in block.matrices:
            zeros = int((final[matrix.name] == 0).sum())
            reports.append(PrunedMatrix(matrix.name, matrix.shape, zeros, zeros / matrix.size))
        if reports and block.index in self.losses:
            before, reports[-1].loss = self.losses[block.index]
            reports[-1].notes.append(repr(before))  # into the ledger, for the report of a resumed run
        return reports

    def _changed(self, block: Block, matrices: Sequence[PrunedMatrix]) -> set[str]:
        return set(block.tensors)

    def _train(self, block: Block, lanes: list[Lane], final: dict[str, torch.Tensor], held: HeldZeros) -> None:
        module = self.model.get_submodule(block.name)
        buffers = {f"{block.name}.{name}" for name, _ in module.named_buffers()}
        self._masters(final)
        trained = [name for name, tensor in final.items() if tensor.is_floating_point() and name not in buffers]
        clock = [time.monotonic()]

        def after_step(step: int, total: int) -> None:
            now = time.monotonic()
            if step == 1 or total == 1:  # the first one warms up
                self._tell(now - clock[0], total, sum(self.model.get_parameter(name).numel() for name in trained))
            clock[0] = now

        try:
            seen = self._fit(block, lanes, trained, held.pruned, self.training, after_step=after_step)
        except Diverged as error:
            raise RunError(error.message, hint=_SMALLER) from error
        quarter = max(1, len(seen) // 4)
        self.losses[block.index] = (sum(seen[:quarter]) / quarter, sum(seen[-quarter:]) / quarter)
        for name, made in self._made(trained).items():
            if not torch.isfinite(made).all():
                raise RunError(f"{name} does not fit {made.dtype} any more", hint=_SMALLER)
            final[name] = made

    def _tell(self, seconds: float, steps: int, numbers: int) -> None:
        """Say once, from a measured step, what the run costs."""
        if self._told:
            return
        self._told = True
        blocks = len(self.structure.blocks)
        each = 1000 * blocks * seconds / max(self.training.tokens, 1)
        self.reporter.note(
            f"{steps} steps of {self.training.tokens:,} tokens for each of {blocks} blocks: {each:.3g} s per 1,000 "
            f"tokens, about {duration(blocks * steps * seconds)} in all; {numbers:,} parameters are trained at a time, "
            f"which take {16 * numbers / 1e6:,.0f} MB with gradients and optimiser"
        )


def duration(seconds: float) -> str:
    """Seconds or minutes, as people say them."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
