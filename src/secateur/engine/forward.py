"""Forwards that prune nothing: through a folder that need not fit in memory, and a rehearsal without weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
import transformers

from secateur.checkpoint.reader import CheckpointReader
from secateur.engine.activations import ActivationStore
from secateur.engine.binding import Binding, TensorReader
from secateur.engine.blocks import Structure, find_structure
from secateur.engine.plan import Plan
from secateur.engine.skeleton import build_skeleton
from secateur.engine.stream import BlockStream
from secateur.plugins import make_method
from secateur.result import PrunedMatrix


class _Source(TensorReader, Protocol):
    def dtype(self, key: str) -> torch.dtype:
        """Number format of a key."""


class _Stored:
    """The tensors of a checkpoint."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader

    def tensor(self, key: str) -> torch.Tensor:
        return self._reader.tensor(key)

    def dtype(self, key: str) -> torch.dtype:
        return self._reader.info(key).dtype


class _Zeros(_Stored):
    """Zeros in the shapes of a checkpoint: the system gives them memory only where something is written."""

    def tensor(self, key: str) -> torch.Tensor:
        return torch.zeros(self._reader.info(key).shape, dtype=self.dtype(key))

    def dtype(self, key: str) -> torch.dtype:
        dtype = super().dtype(key)
        return torch.float32 if dtype.is_floating_point else dtype


class _ReadOnly:
    """A sink in which every block is already done."""

    def __init__(self, source: _Source) -> None:
        self._source = source

    def done(self, index: int) -> list[PrunedMatrix]:
        return []

    def reader(self) -> TensorReader:
        return self._source

    def dtype(self, key: str) -> torch.dtype:
        return self._source.dtype(key)

    def write(self, key: str, tensor: torch.Tensor) -> None:
        raise NotImplementedError

    def copy(self, key: str) -> None:
        raise NotImplementedError

    def finish(self, index: int, matrices: list[PrunedMatrix]) -> None:
        raise NotImplementedError


def stream_forward(folder: Path, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Output (logits or last hidden state, float32) of a folder's model, one block of weights in memory at a time.

    Raises:
        CheckpointError: when the weights do not belong to the config.
    """
    model = build_skeleton(folder)
    with CheckpointReader(folder) as reader:
        return _forward(model, find_structure(model), Binding(model, reader.keys), _Stored(reader), inputs)


def rehearse(
    model: transformers.PreTrainedModel, structure: Structure, binding: Binding, reader: CheckpointReader
) -> None:
    """Run a short forward block by block on zeros, so that a model that cannot be streamed is known before work starts.

    Raises:
        UnsupportedModelError: with the reason.
    """
    _forward(model, structure, binding, _Zeros(reader), probe_inputs(model, tokens=8))


def _forward(
    model: transformers.PreTrainedModel,
    structure: Structure,
    binding: Binding,
    source: _Source,
    inputs: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    store = ActivationStore(None, Path(tempfile.gettempdir()))
    sink = _ReadOnly(source)
    stream = BlockStream(model, structure, binding, source, sink, make_method("magnitude"), Plan(), store)
    answer = stream.run([], inputs).probe
    assert answer is not None
    return answer


def probe_inputs(model: transformers.PreTrainedModel, tokens: int = 32) -> dict[str, torch.Tensor]:
    """A short, fixed input that suits the model: token ids spread over the vocabulary, or a fixed image."""
    config = model.config
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (1, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": torch.linspace(-1, 1, shape[1] * height * width).reshape(shape)}
    vocabulary = config.get_text_config().vocab_size
    ids = (torch.arange(1, tokens + 1) * 7919 % vocabulary)[None]
    if config.is_encoder_decoder:
        return {"input_ids": ids[:, : tokens // 2], "decoder_input_ids": ids[:, tokens // 2 :]}
    return {"input_ids": ids}
