"""A checkpoint as the commands that write another one open it: checked, with a model that has no weights yet."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from secateur.checkpoint.check import check_model_folder
from secateur.checkpoint.reader import CheckpointReader
from secateur.engine.binding import Binding
from secateur.engine.blocks import Structure, find_structure
from secateur.engine.skeleton import build_skeleton
from secateur.errors import CheckpointError


@dataclass(frozen=True)
class Checkpoint:
    """The parts of a model folder."""

    config: dict[str, Any]
    """``config.json`` as it is."""
    model: transformers.PreTrainedModel
    """Without weights."""
    structure: Structure
    reader: CheckpointReader
    binding: Binding


def open_checkpoint(folder: Path, stack: ExitStack) -> Checkpoint:
    """Check a model folder and open its files, until the stack is closed.

    Raises:
        CheckpointError: when a file is damaged, or lacks weights of the model.
        UnsupportedModelError: when transformers has no such class, or the model no blocks.
        UnsafeCheckpointError: when opening it would run code.
    """
    config = check_model_folder(folder)
    model = build_skeleton(folder)
    reader = stack.enter_context(CheckpointReader(folder))
    binding = Binding(model, reader.keys)
    if binding.missing:
        raise CheckpointError(
            f"the checkpoint lacks {len(binding.missing)} weights of the model, the first is {binding.missing[0]}",
            hint="config.json names another architecture than the weights have",
        )
    return Checkpoint(config, model, find_structure(model), reader, binding)
