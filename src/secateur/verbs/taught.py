"""What a recovery run made: written in the form of its source, and what a verification must find of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.source import Source
from secateur.checkpoint.writer import CheckpointWriter, Entry, hash_file, layout_for, layout_like
from secateur.engine.binding import Binding
from secateur.engine.blocks import find_structure
from secateur.engine.forward import probe_inputs
from secateur.engine.inputs import output_tensor
from secateur.engine.quiet import quiet_loading
from secateur.engine.skeleton import build_skeleton
from secateur.layers.spec import converted_config
from secateur.measure.texts import padding_token
from secateur.recovery.adapter_moe import adapter_spec
from secateur.recovery.zeros import HeldZeros
from secateur.verbs.lesson import Lesson


@dataclass
class Taught:
    """What was made, and what a verification must find on the disk."""

    shards: dict[str, str]
    zeros: dict[str, int]
    """Checkpoint key of every tensor with held zeros -> number of zeros."""
    prunable: dict[str, int]
    """Checkpoint key of every prunable tensor -> number of weights."""
    held: HeldZeros | None
    """None when the source has the zeros where the result must have them: then both are read block by block."""
    zeros_held: int
    probe: Mapping[str, torch.Tensor]
    answer: torch.Tensor | None
    report: dict[str, Any] = field(default_factory=dict)

    def check(self, folder: Path, source: Path) -> int:
        """Read the written weights again: every held zero must be zero, in its place. Returns their number.

        Raises:
            VerificationError: when one is not.
        """
        model = build_skeleton(folder)
        with CheckpointReader(folder) as reader:
            binding = Binding(model, reader.keys)
            if self.held is not None:
                pruned = self.held.pruned.items()
                return sum(HeldZeros({name: mask}).check(binding.load([name], reader)) for name, mask in pruned)
            with CheckpointReader(source) as before:
                names = [matrix.name for matrix in find_structure(model).matrices if binding.bound(matrix.name)]
                was = Binding(model, before.keys)
                return sum(HeldZeros.of(was.load([name], before)).check(binding.load([name], reader)) for name in names)


ASSESSED = 16
"""Windows on which training and held-out loss are measured."""


def generalisation(before: Sequence[float | None], after: Sequence[float | None]) -> dict[str, float | None]:
    """Losses (on text that was held out, on text that was trained on) before and after, and their differences."""

    def gap(held_out: float | None, seen: float | None) -> float | None:
        return None if held_out is None or seen is None else held_out - seen

    return {
        "held_out_loss_before": before[0],
        "held_out_loss": after[0],
        "trained_text_loss_before": before[1],
        "trained_text_loss": after[1],
        "generalisation_gap_before": gap(*before),
        "generalisation_gap": gap(*after),
    }


def held_zeros(source: Source, skeleton: transformers.PreTrainedModel) -> HeldZeros:
    """The zeros of a folder's prunable matrices, one block at a time."""
    pruned: dict[str, torch.Tensor] = {}
    with CheckpointReader(source.folder) as reader:
        binding = Binding(skeleton, reader.keys)
        for block in find_structure(skeleton).blocks:
            names = [matrix.name for matrix in block.matrices if binding.bound(matrix.name)]
            pruned |= HeldZeros.of(binding.load(names, reader)).pruned
    return HeldZeros(pruned)


def count_zeros(source: Source, skeleton: transformers.PreTrainedModel) -> int:
    """Number of zeros that a folder's pruned matrices hold, one matrix in memory at a time."""
    with CheckpointReader(source.folder) as reader:
        binding = Binding(skeleton, reader.keys)
        names = [matrix.name for matrix in find_structure(skeleton).matrices if binding.bound(matrix.name)]
        return sum(len(HeldZeros.of(binding.load([name], reader))) for name in names)


def write_taught(lesson: Lesson, model: Any, source: Source, partial: Path, held: HeldZeros) -> Taught:
    """Store the model in the source's formats, shards and names; one with a new head as transformers does."""
    weights = dict(model.named_parameters())
    held.check({name: weights[name] for name in held.pruned})
    names = [matrix.name for matrix in find_structure(model).matrices]
    with CheckpointReader(source.folder) as reader:
        binding = Binding(model, reader.keys)
        spec = adapter_spec(model) if binding.missing else None
        if spec is not None:
            shards = _write_like(reader, binding, model, partial, binding.missing)
            config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
            text = json.dumps(converted_config(config, spec), indent=2) + "\n"
            (partial / "config.json").write_text(text, encoding="utf-8")
        elif not binding.missing:
            shards = _write_like(reader, binding, model, partial)
            text = (source.folder / "config.json").read_text(encoding="utf-8")
            (partial / "config.json").write_text(text, encoding="utf-8")
        else:
            formats = {reader.info(key).dtype for key in reader.keys if reader.info(key).dtype.is_floating_point}
            model.to(next(iter(formats)) if len(formats) == 1 else torch.float32)
            with quiet_loading():
                model.save_pretrained(partial)
            model.float()
            shards = {path.name: hash_file(path) for path in sorted(partial.glob("*.safetensors"))}
    with CheckpointReader(partial) as written:
        binding = Binding(model, written.keys)
        keys = binding.keys_of(names)
        prunable = {key: written.info(key).numel for key in keys}
        zeros = {key: int((written.tensor(key) == 0).sum()) for key in keys}
        probe = probe_inputs(model)
    device = next(model.parameters()).device
    with torch.inference_mode(), padding_token(model, lesson.tokenizer):
        answer = output_tensor(model(**{name: value.to(device) for name, value in probe.items()})).float().cpu()
    return Taught(shards, zeros, prunable, held, len(held), probe, answer)


def _write_like(
    reader: CheckpointReader, binding: Binding, model: Any, partial: Path, added: Sequence[str] = ()
) -> dict[str, str]:
    """The same keys, shards and formats as the source; afterwards the model holds what was written.

    Args:
        added: tensors of the model that the source has not, in the format of most of it.
    """
    state = model.state_dict()
    layout = layout_like(reader)
    if added:
        entries = [Entry(key, reader.info(key).dtype, reader.info(key).shape) for key in reader.keys]
        formats = Counter(entry.dtype for entry in entries if entry.dtype.is_floating_point)
        usual = formats.most_common(1)[0][0]
        layout = layout_for([*entries, *(Entry(name, usual, tuple(state[name].shape)) for name in added)])
    with CheckpointWriter(partial, layout, resume=False) as writer:
        for name in added:
            rounded = state[name].detach().cpu().to(usual).contiguous()
            writer.write(name, rounded)
            state[name].copy_(rounded)
        for unit in binding.units:
            tensors = {name: state[name].detach().cpu() for name in unit.names}
            for key, tensor in binding.unload(unit, tensors).items():
                writer.write(key, tensor.to(reader.info(key).dtype))
            for name, rounded in binding.load(unit.names, writer).items():
                state[name].copy_(rounded)
        for key in binding.unbound:
            writer.copy(reader, key)
        return dict(writer.finish())
