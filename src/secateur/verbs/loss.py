"""The loss of a model in memory on calibration data, which says what a choice of blocks or sizes costs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil
import torch
import transformers

from secateur.checkpoint.reader import CheckpointReader
from secateur.errors import UnsupportedModelError
from secateur.measure.perplexity import perplexity
from secateur.progress import Reporter
from secateur.structured.block_choice import distance_from


def fits_in_memory(reader: CheckpointReader, more: int = 0) -> bool:
    """Whether the whole model can be loaded in float32, with ``more`` bytes beside it."""
    needed = 2.5 * sum(reader.info(key).nbytes for key in reader.keys) + more
    return bool(needed < psutil.virtual_memory().available)


def measured_loss(
    whole: transformers.PreTrainedModel, batches: Sequence[Mapping[str, torch.Tensor]], device: torch.device,
    compute: torch.dtype, reporter: Reporter,
) -> tuple[Callable[[], float], str]:  # fmt: skip
    """A loss of a model as it is at each call, and what it is.

    Next tokens where the model has them, in nats; else the relative squared distance of its outputs from those that it
    gives now. In float32, and said so, where the model uses numbers that a narrower format does not have.
    """
    try:
        return _loss_in(compute, whole, batches, device)
    except RuntimeError as error:
        if compute == torch.float32 or isinstance(error, torch.OutOfMemoryError):
            raise
        reporter.note(f"losses are measured in float32: {str(error).splitlines()[0]}")
        return _loss_in(torch.float32, whole, batches, device)


def _loss_in(
    compute: torch.dtype, whole: transformers.PreTrainedModel, batches: Sequence[Mapping[str, torch.Tensor]],
    device: torch.device,
) -> tuple[Callable[[], float], str]:  # fmt: skip

    def precision() -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device.type, compute, enabled=compute != torch.float32)

    rows = [batch["input_ids"] for batch in batches if set(batch) == {"input_ids"}]
    with precision():
        if len(rows) == len(batches):
            windows = torch.cat([row for row in rows if row.shape[1] == rows[0].shape[1]])
            with contextlib.suppress(UnsupportedModelError):
                perplexity(whole, windows[:1, :2])
                return _within(precision, lambda: perplexity(whole, windows).nll_per_token), "nats per next token"
        moved = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
        return _within(precision, distance_from(whole, moved)), "relative squared distance of the outputs"


def _within(
    precision: Callable[[], contextlib.AbstractContextManager[Any]], loss: Callable[[], float]
) -> Callable[[], float]:
    def measured() -> float:
        with precision():
            return loss()

    return measured
