"""Recovery block by block: each pruned block learns to give the dense block's outputs, one block in memory at a time.

Two rows of forwards walk through the model side by side, one with the dense weights and one with those already
recovered. When both stand at a block, the block is trained so that from the inputs which really arrive it makes what
the dense model made there: errors of earlier blocks are corrected, not passed on. No graph spans more than one block.

Source: EBFT (arXiv 2402.12419), with three differences: targets come from dense inputs rather than from the pruned
ones; the error is relative for each token, because a few tokens with huge activations would decide everything else; and
norms and biases are trained as well.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from secateur.engine.blocks import Block
from secateur.engine.capture import Lane
from secateur.engine.inputs import output_tensor
from secateur.engine.paired import DenseOutput, PairedStream
from secateur.engine.skeleton import set_tensor
from secateur.errors import RunError
from secateur.recovery.zeros import HeldZeros
from secateur.result import PrunedMatrix
from secateur.seeds import derived_seed

_SMALLER = "start again with --overwrite and a smaller --learning-rate"


@dataclass(frozen=True)
class BlockTraining:
    """How each block is trained."""

    epochs: int = 1
    learning_rate: float = 4e-4
    batches: int = 2
    """Calibration batches in an optimiser step."""
    weight_decay: float = 0.0
    tokens: int = 0
    """Tokens in an optimiser step, for telling what a run costs."""


@dataclass
class BlockRecovery(PairedStream[DenseOutput]):
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
        for name, tensor in final.items():
            set_tensor(self.model, name, _master(tensor, self.device))
        trained = [name for name, tensor in final.items() if tensor.is_floating_point() and name not in buffers]
        parameters = [self.model.get_parameter(name).requires_grad_() for name in trained]
        options = self.training
        optimizer = torch.optim.AdamW(
            parameters, lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=options.weight_decay
        )
        handles = held.watch_gradients(self.model)
        per_epoch = math.ceil(len(lanes) / options.batches)
        total, step = options.epochs * per_epoch, 0
        seen: list[float] = []
        generator = torch.Generator().manual_seed(derived_seed(self.seed, block.name))
        try:
            for _ in range(options.epochs):
                order = torch.randperm(len(lanes), generator=generator).tolist()
                for start in range(0, len(order), options.batches):
                    started = time.monotonic()
                    chosen = order[start : start + options.batches]
                    for index in chosen:
                        with torch.enable_grad():
                            loss = self._error(module, lanes[index], self.targets[index])
                            (loss / len(chosen)).backward()
                        self.store.park(lanes[index].watcher)
                        self.store.park(self.targets[index].watcher)
                        seen.append(float(loss))
                    if not all(map(math.isfinite, seen[-len(chosen) :])):
                        raise RunError(
                            f"the loss of {block.name} is not finite at its step {step + 1}",
                            hint=_SMALLER,
                        )
                    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                    optimizer.param_groups[0]["lr"] = options.learning_rate * _decay(step, total)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    held.clear_weights(self.model)
                    step += 1
                    if step == 2 or total == 1:  # the first one warms up
                        self._tell(time.monotonic() - started, total, parameters)
        finally:
            for handle in handles:
                handle.remove()
        quarter = max(1, len(seen) // 4)
        self.losses[block.index] = (sum(seen[:quarter]) / quarter, sum(seen[-quarter:]) / quarter)
        for name in trained:
            made = self.model.get_parameter(name).detach().cpu().to(self.output_dtype(name))
            if not torch.isfinite(made).all():
                raise RunError(f"{name} does not fit {made.dtype} any more", hint=_SMALLER)
            final[name] = made

    def _tell(self, seconds: float, steps: int, parameters: Sequence[torch.Tensor]) -> None:
        """Say once, from a measured step, what the run costs."""
        if self._told:
            return
        self._told = True
        blocks = len(self.structure.blocks)
        each = 1000 * blocks * seconds / max(self.training.tokens, 1)
        numbers = sum(parameter.numel() for parameter in parameters)
        self.reporter.note(
            f"{steps} steps of {self.training.tokens:,} tokens for each of {blocks} blocks: {each:.3g} s per 1,000 "
            f"tokens, about {duration(blocks * steps * seconds)} in all; {numbers:,} parameters are trained at a time, "
            f"which take {16 * numbers / 1e6:,.0f} MB with gradients and optimiser"
        )

    def _error(self, module: nn.Module, lane: Lane, wanted: DenseOutput) -> torch.Tensor:
        """Mean over tokens of |output - target|² / |target|²."""
        self.store.unpark(lane.watcher)
        self.store.unpark(wanted.watcher)
        target = wanted.output
        assert lane.call is not None
        args, kwargs = lane.call
        kind = self.device.type
        with torch.autocast(kind, self.compute_dtype, enabled=self.compute_dtype != torch.float32):
            output = output_tensor(module(*args, **kwargs))
        error = (output.float() - target.float()).square().sum(-1)
        return (error / target.float().square().sum(-1).clamp_min(1e-6)).mean()


def duration(seconds: float) -> str:
    """Seconds or minutes, as people say them."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _master(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What the optimiser works on: float32, whatever the file holds."""
    return tensor.to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


def _decay(step: int, total: int) -> float:
    """Linear warm-up over a tenth of the steps, then linear decay to zero."""
    warm = max(1, total // 10)
    return min((step + 1) / warm, (total - step) / max(total - warm, 1), 1.0)
