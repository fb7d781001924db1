"""Training of one block on a stream, until it gives the dense block's outputs: what recovery and pruning share.

A block learns in float32, whatever the file holds, from the inputs which really arrive; its zeros stay zero. The error
is relative for each token, because a few tokens with huge activations would decide everything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from secateur.engine.blocks import Block
from secateur.engine.capture import Lane, copied_call
from secateur.engine.inputs import output_tensor
from secateur.engine.paired import Kept, PairedStream
from secateur.engine.skeleton import set_tensor
from secateur.errors import RunError
from secateur.seeds import derived_seed


class Diverged(RunError):
    """The loss of a training is not finite any more."""


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
class TrainingStream(PairedStream[Kept]):
    """A paired stream that can train a block towards the outputs of the dense one."""

    def _masters(self, final: Mapping[str, torch.Tensor]) -> None:
        """Put the tensors of a block in the running model in the format in which it learns."""
        for name, tensor in final.items():
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            set_tensor(self.model, name, tensor.to(self.device, dtype, copy=True))

    def _made(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """What was learned, as it is written."""
        return {name: self.model.get_parameter(name).detach().cpu().to(self.output_dtype(name)) for name in names}

    def _fit(
        self, block: Block, lanes: Sequence[Lane], learning: Sequence[str], pruned: Mapping[str, torch.Tensor],
        training: BlockTraining, chosen: Sequence[int] | None = None, *,
        after_step: Callable[[int, int], None] | None = None, after_epoch: Callable[[], None] | None = None,
    ) -> list[float]:  # fmt: skip
        """Train a block whose tensors are there as `_masters` puts them.

        Args:
            learning: names of the tensors that change.
            pruned: name -> bool of the tensor's shape, True where it is and stays zero.
            chosen: numbers of the batches to learn from; all of them without.
            after_step: told the number of the step, from 0, and how many there are.

        Returns:
            The error of each batch when it was met.

        Raises:
            Diverged: when an error is not finite.
        """
        module = self.model.get_submodule(block.name)
        parameters = [self.model.get_parameter(name).requires_grad_() for name in learning]
        held = [(self.model.get_parameter(name), mask.to(self.device)) for name, mask in pruned.items()]
        optimizer = torch.optim.AdamW(
            parameters, lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=training.weight_decay
        )
        batches = list(range(len(lanes)) if chosen is None else chosen)
        total, step = training.epochs * math.ceil(len(batches) / training.batches), 0
        seen: list[float] = []
        generator = torch.Generator().manual_seed(derived_seed(self.seed, block.name))
        for _ in range(training.epochs):
            order = torch.randperm(len(batches), generator=generator).tolist()
            for start in range(0, len(order), training.batches):
                taken = [batches[place] for place in order[start : start + training.batches]]
                for index in taken:
                    with torch.enable_grad():
                        loss = self._error(module, lanes[index], self.targets[index])
                        (loss / len(taken)).backward()
                    self._rest(index, lanes)
                    seen.append(float(loss))
                if not all(map(math.isfinite, seen[-len(taken) :])):
                    raise Diverged(f"the loss of {block.name} is not finite at its step {step + 1}")
                for parameter, mask in held:
                    if parameter.grad is not None:
                        parameter.grad.masked_fill_(mask, 0)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.param_groups[0]["lr"] = training.learning_rate * decay(step, total)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                for parameter, mask in held:
                    parameter.data.masked_fill_(mask, 0)
                if after_step is not None:
                    after_step(step, total)
                step += 1
            if after_epoch is not None:
                after_epoch()
        return seen

    def _rest(self, index: int, lanes: Sequence[Lane]) -> None:
        """A batch is not looked at for now."""
        self.store.park(lanes[index].watcher)
        self.store.park(self.targets[index].watcher)

    def _error(self, module: nn.Module, lane: Lane, wanted: Kept) -> torch.Tensor:
        """Mean over tokens of |output - target|² / |target|²."""
        self.store.unpark(lane.watcher)
        self.store.unpark(wanted.watcher)
        target = wanted.output
        assert lane.call is not None
        assert target is not None
        args, kwargs = copied_call(*lane.call)
        kind = self.device.type
        with torch.autocast(kind, self.compute_dtype, enabled=self.compute_dtype != torch.float32):
            output = output_tensor(module(*args, **kwargs))
        error = (output.float() - target.float()).square().sum(-1)
        return (error / target.float().square().sum(-1).clamp_min(1e-6)).mean()


def decay(step: int, total: int) -> float:
    """Linear warm-up over a tenth of the steps, then linear decay to zero."""
    warm = max(1, total // 10)
    return min((step + 1) / warm, (total - step) / max(total - warm, 1), 1.0)
