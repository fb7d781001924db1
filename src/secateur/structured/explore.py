"""Walks a model on random weights, block by block, to learn how its blocks are built before any work is done."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from secateur.checkpoint.reader import CheckpointReader
from secateur.engine.activations import ActivationStore
from secateur.engine.binding import Binding
from secateur.engine.blocks import Block, Structure, signature
from secateur.engine.capture import AtBlock
from secateur.engine.forward import NoSink, probe_inputs
from secateur.engine.plan import Plan
from secateur.engine.stream import BlockStream
from secateur.plugins import make_method

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a block's forward."""
Visit = Callable[[Block, nn.Module, Call, dict[str, torch.Tensor]], None]
"""Block, its module with weights in place, the arguments of its forward, and its tensors by full name."""


class RandomTensors:
    """Random numbers in the shapes of a checkpoint, float32, the same for the same tensor every time.

    Args:
        origin: name by which a key draws its numbers; the key itself where it is not named.
        scale: of matrices, smaller where a model without norms would overflow.
    """

    def __init__(self, reader: CheckpointReader, origin: Mapping[str, str] | None = None, scale: float = 1.0) -> None:
        self._reader = reader
        self._origin = origin or {}
        self._scale = scale

    def tensor(self, key: str) -> torch.Tensor:
        info = self._reader.info(key)
        if not info.dtype.is_floating_point:
            return self._reader.tensor(key)
        seed = int.from_bytes(hashlib.sha256(self._origin.get(key, key).encode()).digest()[:7], "big")
        made = torch.randn(info.shape, generator=torch.Generator().manual_seed(seed))
        if len(info.shape) < 2:
            # Norms near one; biases near zero, as anything larger would drown what differs between tokens.
            return made.mul_(0.1).add_(0.0 if "bias" in key.rpartition(".")[2] else 1.0)
        return made.mul_(self._scale * info.shape[-1] ** -0.5)

    def dtype(self, key: str) -> torch.dtype:
        dtype = self._reader.info(key).dtype
        return torch.float32 if dtype.is_floating_point else dtype


def visit_blocks(
    model: transformers.PreTrainedModel, structure: Structure, binding: Binding, reader: CheckpointReader, visit: Visit,
    tokens: int = 12,
) -> None:  # fmt: skip
    """Call ``visit`` at the first block of every kind, in the middle of a forward over a short fixed input.

    Raises:
        UnsupportedModelError: when the model cannot be run block by block.
    """
    source = RandomTensors(reader)
    stream = _Walk(
        model, structure, binding, source, NoSink(source), make_method("magnitude"), Plan(),
        ActivationStore(None, Path(tempfile.gettempdir())),
    )  # fmt: skip
    stream.walk(visit, tokens)


class _Walk(BlockStream):
    def walk(self, visit: Visit, tokens: int) -> None:
        lane = self._lane(probe_inputs(self.model, tokens=tokens), observed=False)
        left = {signature(block, self.model) for block in self.structure.blocks}
        with self._started([lane]):
            while left and isinstance(lane.event, AtBlock):
                block = self.structure.blocks[lane.event.index]
                with self._loaded(block) as tensors:
                    kind = signature(block, self.model)
                    if kind in left:
                        left.discard(kind)
                        assert lane.call is not None
                        visit(block, self.model.get_submodule(block.name), lane.call, tensors)
                    if left:
                        self._advance(lane)
