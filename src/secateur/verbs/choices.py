"""What a structured pruning decides once for the whole model: hidden channels, and scores of units from gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import Tensor

from secateur.checkpoint.reader import CheckpointReader
from secateur.engine.activations import ActivationStore
from secateur.engine.binding import Binding
from secateur.engine.blocks import Structure, find_structure
from secateur.engine.device import trim_memory
from secateur.engine.forward import NoSink, Stored
from secateur.engine.plan import Plan
from secateur.errors import CalibrationError, UnsupportedModelError, UsageError
from secateur.measure.model import load_model
from secateur.measure.scoring import NextTokenScorer
from secateur.plugins import Criterion, GradientCriterion, make_method
from secateur.progress import Reporter
from secateur.structured.block_choice import skipping
from secateur.structured.channel_choice import ChoiceStream
from secateur.structured.channels import Channels
from secateur.structured.couplings import Cut
from secateur.structured.gradients import Key, bytes_needed, saliences
from secateur.verbs.shape import Shape

CHANNELS: Key = ("hidden", "")


@dataclass
class Choices:
    """Decisions for the whole model."""

    keep: Tensor | None = None
    """Hidden channels that stay, ascending."""
    scales: dict[str, float] = field(default_factory=dict)
    """Factor of each norm's weight."""
    units: dict[str, Tensor] = field(default_factory=dict)
    """Consumer -> units that stay, ascending, where some go along with the hidden channels."""
    saliences: dict[Key, Tensor] = field(default_factory=dict)
    """By kind and consumer: scores of units from gradients."""


def check_gradients(criterion: Any, model: transformers.PreTrainedModel) -> None:
    """Refuse a criterion that wants gradients where they do not fit in memory.

    Raises:
        UsageError: with both sizes.
    """
    if not isinstance(criterion, GradientCriterion):
        return
    size = sum(parameter.numel() for parameter in model.parameters())
    needed = bytes_needed(size, model.config.get_text_config().vocab_size, criterion)
    free = psutil.virtual_memory().available
    if needed > free:
        raise UsageError(
            f"this method takes the model and its gradients in memory, {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free",
            hint="take a --method that needs no gradients: obs streams one block at a time",
        )


def gradient_scores(
    criterion: GradientCriterion, shape: Shape, folder: Path, whole: Structure,
    batches: Sequence[Mapping[str, Tensor]], device: torch.device, reporter: Reporter,
) -> dict[Key, Tensor]:  # fmt: skip
    """Scores of all units that may go, from a few backward passes.

    Args:
        folder: of the source, with all its blocks.
        whole: structure of the source.

    Raises:
        UnsupportedModelError: for a model that predicts no next tokens.
    """
    names = _names_in_source(shape, whole)
    cuts: dict[Key, list[Cut]] = {}
    if shape.width is not None:
        for coupling in shape.width.couplings:
            cuts[coupling.kind, coupling.consumer] = [replace(cut, name=names(cut.name)) for cut in coupling.cuts]
    if shape.hidden is not None:
        for job in shape.hidden.every_job():
            named = [replace(cut, name=names(cut.name)) for cut in job.coupling.cuts]
            cuts[job.coupling.kind, job.coupling.consumer] = named
        number = torch.arange(shape.hidden.before)[:, None]
        cuts[CHANNELS] = [Cut(name, dim, number) for name, dims in shape.hidden.cuts.items() for dim in dims]
    model = load_model(folder, device=str(device), dtype="float32")
    try:
        NextTokenScorer(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"this method needs a loss of next tokens: {error.message}", hint="take another --method, such as obs"
        ) from None
    gone = set(range(shape.depth.blocks)) - set(shape.depth.kept) if shape.depth is not None else set()
    skipped: set[int] = set()
    with skipping(model, whole, skipped):
        if gone:
            with torch.no_grad():
                model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device))  # shows what a block returns
            skipped.update(gone)
        return saliences(model, cuts, _sequences(batches, criterion, device), criterion, reporter)


def _names_in_source(shape: Shape, whole: Structure) -> Any:
    """Name of a tensor in the model without the blocks that go -> its name in the source."""
    if shape.depth is None:
        return lambda name: name
    blocks = zip(find_structure(shape.depth.skeleton).blocks, shape.depth.kept, strict=True)
    source = {f"{block.name}.": f"{whole.blocks[old].name}." for block, old in blocks}

    def renamed(name: str) -> str:
        start = next((start for start in source if name.startswith(start)), None)
        return name if start is None else source[start] + name.removeprefix(start)

    return renamed


def _sequences(
    batches: Sequence[Mapping[str, Tensor]], criterion: GradientCriterion, device: torch.device
) -> list[Tensor]:
    rows = [row[None, : criterion.length] for batch in batches if set(batch) == {"input_ids"}
            for row in batch["input_ids"]]  # fmt: skip
    rows = [row.to(device) for row in rows[: criterion.sequences] if row.shape[1] > 1]
    if not rows:
        raise CalibrationError("this method needs token ids to predict", hint="give text with --calibration")
    return rows


def choose_channels(
    channels: Channels, model: transformers.PreTrainedModel, structure: Structure, binding: Binding,
    reader: CheckpointReader, criterion: Criterion, saliences: Mapping[Key, Tensor],
    batches: Sequence[Mapping[str, Tensor]], store: ActivationStore, device: torch.device, compute: torch.dtype,
    reporter: Reporter,
) -> Choices:  # fmt: skip
    """Channels and units that stay and the factors of the norms, from one dense forward over ``batches``, streamed."""
    stored = Stored(reader)
    stream = ChoiceStream(
        model, structure, binding, stored, NoSink(stored), make_method("magnitude"), Plan(), store, device, compute,
        reporter=reporter, channels=channels, criterion=criterion, saliences=saliences,
    )  # fmt: skip
    seen = stream.look(batches)
    keep = seen.choose(criterion, channels.before - channels.after, 0.01, saliences.get(CHANNELS))
    trim_memory()
    return Choices(keep, channels.scales(seen.energy, keep), stream.units)
