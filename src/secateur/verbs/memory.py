"""A model in memory: put on disk by its own `save_pretrained`, then pruned like any folder."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers

from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.source import Source
from secateur.engine.binding import Binding
from secateur.errors import UnsupportedModelError


def as_source(
    model: transformers.PreTrainedModel, tokenizer: Any, out: str | Path | None, stack: ExitStack
) -> tuple[Source, Path]:
    """Save the model into a temporary folder, beside OUT so that it is on the same disk; returns it and OUT.

    Without OUT the result is temporary too: it only travels back into the model.
    """
    beside = None if out is None else Path(out).expanduser().resolve().parent
    if beside is not None and not beside.is_dir():
        beside = None
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="secateur-", dir=beside)))
    folder = scratch / "model"
    before = (model.config.dtype, model.config.architectures)
    model.save_pretrained(folder)
    model.config.dtype, model.config.architectures = before  # the caller's config stays as it was
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    name = getattr(model.config, "name_or_path", "") or type(model).__name__
    dtype = str(model.dtype).removeprefix("torch.")
    source = Source(
        name=name,
        kind="memory",
        folder=folder,
        original_bytes=size,
        original_format=f"in memory, {dtype}",
        revision=None,
    )
    return source, Path(out) if out is not None else scratch / "out"


def take_over(model: transformers.PreTrainedModel, folder: Path, names: list[str]) -> None:
    """Copy pruned tensors of a written folder into the model in memory."""
    parameters = dict(model.named_parameters())
    if any(parameters[name].is_meta for name in names):
        raise UnsupportedModelError("the model is offloaded: its weights cannot be replaced in place", hint="give OUT")
    with CheckpointReader(folder) as reader, torch.no_grad():
        binding = Binding(model, reader.keys)
        for name in names:
            parameters[name].copy_(binding.load([name], reader)[name])
