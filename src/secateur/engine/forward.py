"""Forwards that prune nothing: through a folder that need not fit in memory, and a rehearsal without weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
import transformers

from secateur.checkpoint.reader import CheckpointReader
from secateur.engine.activations import ActivationStore
from secateur.engine.binding import Binding, TensorReader
from secateur.engine.blocks import Structure, find_structure, signature
from secateur.engine.capture import AtBlock, Finished
from secateur.engine.device import activation_limit
from secateur.engine.inputs import inputs_of_window, output_tensor
from secateur.engine.plan import Plan
from secateur.engine.skeleton import build_skeleton
from secateur.engine.stream import BlockStream
from secateur.errors import UnsupportedModelError
from secateur.plugins import make_method
from secateur.result import PrunedMatrix


class Source(TensorReader, Protocol):
    """Tensors and their number formats."""

    def dtype(self, key: str) -> torch.dtype:
        """Number format of a key."""


class Stored:
    """The tensors of a checkpoint, as they are."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader

    def tensor(self, key: str) -> torch.Tensor:
        return self._reader.tensor(key)

    def dtype(self, key: str) -> torch.dtype:
        return self._reader.info(key).dtype


class _Zeros(Stored):
    """Zeros in the shapes of a checkpoint: the system gives them memory only where something is written."""

    def tensor(self, key: str) -> torch.Tensor:
        return torch.zeros(self._reader.info(key).shape, dtype=self.dtype(key))

    def dtype(self, key: str) -> torch.dtype:
        dtype = super().dtype(key)
        return torch.float32 if dtype.is_floating_point else dtype


class NoSink:
    """A sink in which every block is already done."""

    def __init__(self, source: Source) -> None:
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

    def move(self, key: str, tensor: torch.Tensor) -> None:
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
        return _forward(model, find_structure(model), Binding(model, reader.keys), Stored(reader), inputs)


def stream_losses(folder: Path, windows: torch.Tensor, device: torch.device, scratch: Path) -> list[float]:
    """Mean loss of each window in nats per predicted token, one block of weights in memory at a time.

    Args:
        windows: (count, length) int64 token ids of a causal language model, e.g. (16, 1024).
        scratch: folder for activations that do not fit in memory.

    Raises:
        CheckpointError: when the weights do not belong to the config.
    """

    def loss(output: Any, ids: torch.Tensor) -> float:
        logits = output_tensor(output)[0, :-1]
        parts = zip(logits.split(_POSITIONS), ids[1:].to(logits.device).split(_POSITIONS), strict=True)
        return sum(float(F.cross_entropy(z.float(), y, reduction="sum")) for z, y in parts) / (len(ids) - 1)

    model = build_skeleton(folder)
    with CheckpointReader(folder) as reader:
        source, store = Stored(reader), ActivationStore(activation_limit("auto"), scratch)
        binding, structure = Binding(model, reader.keys), find_structure(model)
        batches = [inputs_of_window(model, window[None]) for window in windows]
        return forward_outputs(
            model, structure, binding, source, NoSink(source), store, batches,
            lambda index, output: loss(output, windows[index]), device=device,
        )  # fmt: skip


def forward_outputs(
    model: transformers.PreTrainedModel, structure: Structure, binding: Binding, source: TensorReader, sink: NoSink,
    store: ActivationStore, batches: Sequence[Mapping[str, torch.Tensor]], take: Callable[[int, Any], float], *,
    skip: frozenset[int] = frozenset(), device: torch.device | None = None,
) -> list[float]:  # fmt: skip
    """What ``take`` makes of the number and the output of every forward, in float32; outputs are not kept.

    Args:
        skip: blocks that hand on what they get.
    """
    stream = _Forwards(
        model, structure, binding, source, sink, make_method("magnitude"), Plan(), store, device or torch.device("cpu")
    )
    return stream.outputs(batches, take, skip)


_POSITIONS = 256
"""Positions whose logits are float32 at once."""


class _Forwards(BlockStream):
    """Several forwards through a whole model, head included; nothing is pruned."""

    def outputs(
        self, batches: Sequence[Mapping[str, torch.Tensor]], take: Callable[[int, Any], float], skip: frozenset[int]
    ) -> list[float]:
        lanes = [self._lane(batch, observed=False) for batch in batches]
        for lane in lanes:
            lane.skip = skip
        taken: dict[int, float] = {}
        with self._started(lanes):
            while waiting := {lane.event.index for lane in lanes if isinstance(lane.event, AtBlock)}:
                block = self.structure.blocks[min(waiting)]
                with self._loaded(block):
                    for index, lane in enumerate(lanes):
                        if lane.event == AtBlock(block.index):
                            self._advance(lane)
                            if isinstance(lane.event, Finished):
                                taken[index] = take(index, lane.event.output)
                                lane.event = None
        return [taken[index] for index in range(len(lanes))]

    def every_build(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Run a batch until it has been through a block of every build."""
        lane = self._lane(batch, observed=True)
        left = {signature(block, self.model) for block in self.structure.blocks}
        with self._started([lane]):
            while left and isinstance(lane.event, AtBlock):
                block = self.structure.blocks[lane.event.index]
                left.discard(signature(block, self.model))
                with self._loaded(block):
                    self._pass(lane)


def rehearse(
    model: transformers.PreTrainedModel, structure: Structure, binding: Binding, reader: CheckpointReader
) -> None:
    """Run a short forward block by block on zeros, so that a model that cannot be streamed is known before work starts.

    A model that looks at a weight outside the blocks without running the module that owns it can be streamed when all
    of these stay in memory: ``binding.resident`` says so afterwards.

    Raises:
        UnsupportedModelError: with the reason.
    """
    try:
        _forward(model, structure, binding, _Zeros(reader), probe_inputs(model, tokens=8))
    except UnsupportedModelError as error:
        binding.resident = True
        try:
            _forward(model, structure, binding, _Zeros(reader), probe_inputs(model, tokens=8))
        except UnsupportedModelError:
            binding.resident = False
            raise error from None


def runs_in(
    dtype: torch.dtype, model: transformers.PreTrainedModel, structure: Structure, binding: Binding,
    reader: CheckpointReader, sample: Mapping[str, torch.Tensor] | None = None,
) -> bool:  # fmt: skip
    """Whether a rehearsed model also runs in a narrower number format: some mix it with numbers of their own.

    Args:
        sample: a batch that is to run; blocks of every build are tried on it, as some go another way with a long one.
    """
    source = _Zeros(reader)
    store = ActivationStore(None, Path(tempfile.gettempdir()))
    stream = _Forwards(
        model, structure, binding, source, NoSink(source), make_method("magnitude"), Plan(), store, compute_dtype=dtype
    )
    try:
        stream.run([probe_inputs(model, tokens=8)])
        if sample is not None:
            stream.every_build(sample)
    except RuntimeError as error:
        if "dtype" not in str(error) and "scalar type" not in str(error):
            raise
        return False
    return True


def _forward(
    model: transformers.PreTrainedModel,
    structure: Structure,
    binding: Binding,
    source: Source,
    inputs: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    store = ActivationStore(None, Path(tempfile.gettempdir()))
    sink = NoSink(source)
    stream = BlockStream(model, structure, binding, source, sink, make_method("magnitude"), Plan(), store)
    answer = stream.run([], inputs).probe
    assert answer is not None
    return answer


def probe_inputs(model: transformers.PreTrainedModel, tokens: int = 32) -> dict[str, torch.Tensor]:
    """A short, fixed input that suits the model: token ids spread over the vocabulary, or a fixed image."""
    config = model.config
    if model.main_input_name == "pixel_values":
        # The config of a vision model may hold that of its tower.
        parts = [
            config,
            *(value for value in vars(config).values() if isinstance(value, transformers.PreTrainedConfig)),
        ]
        size = next((part.image_size for part in parts if getattr(part, "image_size", None)), 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = next((part.num_channels for part in parts if getattr(part, "num_channels", None)), 3)
        shape = (1, channels, height, width)
        return {"pixel_values": torch.linspace(-1, 1, shape[1] * height * width).reshape(shape)}
    vocabulary = config.get_text_config().vocab_size
    ids = (torch.arange(1, tokens + 1) * 7919 % vocabulary)[None]
    if config.is_encoder_decoder:
        return {"input_ids": ids[:, : tokens // 2], "decoder_input_ids": ids[:, tokens // 2 :]}
    return {"input_ids": ids}
