"""A model that is to be converted: opened, checked, its matrices chosen. Nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.checkpoint.check import check_finite, check_model_folder, hash_folder
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.source import Source
from secateur.engine.binding import Binding
from secateur.engine.blocks import MatrixSpec, Structure
from secateur.engine.device import activation_limit, compute_dtype, parse_dtype, resolve_device
from secateur.engine.forward import rehearse
from secateur.engine.opening import open_checkpoint
from secateur.engine.plan import make_plan
from secateur.errors import TargetError, UnsupportedModelError
from secateur.layers.spec import Spec, is_converted
from secateur.progress import Reporter
from secateur.recipe import Recipe
from secateur.result import ConvertedMatrix


@dataclass
class Opened:
    """A checked model. ``specs`` are the matrices that are to be converted."""

    source: Source
    recipe: Recipe
    config: dict[str, Any]
    model: transformers.PreTrainedModel
    structure: Structure
    reader: CheckpointReader
    binding: Binding
    specs: dict[str, MatrixSpec]
    device: torch.device
    compute: torch.dtype
    dtype: torch.dtype | None
    """Number format of the result; None for that of each tensor."""
    digest: str
    """Hash of the weights."""

    def key_of(self, name: str) -> str:
        """The checkpoint key of a matrix.

        Raises:
            UnsupportedModelError: when it is not stored by itself, under a key that ends in ``.weight``.
        """
        unit = self.binding.unit_of(name)
        if unit.converter is not None or len(unit.keys) != 1 or not unit.keys[0].endswith(".weight"):
            raise UnsupportedModelError(
                f"{name} is not stored by itself in the checkpoint ({', '.join(unit.keys[:3])})",
                hint="leave it out with --ignore",
            )
        return unit.keys[0]

    def prunable(self) -> dict[str, int]:
        """Checkpoint key -> numbers in it, of all matrices in the blocks."""
        names = [matrix.name for matrix in self.structure.matrices]
        return {key: self.reader.info(key).numel for key in self.binding.keys_of(names)}

    @property
    def whole(self) -> int:
        """Parameters of all matrices in the blocks."""
        return sum(matrix.size for matrix in self.structure.matrices)


@dataclass
class Converted:
    """What was written, what a verification must find, and what is worth telling. ``answer`` is what the model that was
    made says to the inputs ``probe``, float32.
    """

    spec: Spec | None
    """The layers; None where the result is an ordinary model."""
    matrices: list[ConvertedMatrix]
    shards: dict[str, str]
    """Name of a file -> sha256."""
    probe: Mapping[str, torch.Tensor]
    answer: torch.Tensor | None
    prunable: dict[str, int]
    """Checkpoint key of the result -> numbers in it, of all that the matrices of the blocks became."""
    renamed: dict[str, str]
    """Key in the result -> key in the source, of every tensor that was only copied."""
    told: list[str]
    needs_training: bool = False


class Work(Protocol):
    """A conversion that was found possible."""

    nbytes: int
    """Bytes that the result takes at most."""
    parameters: tuple[int, int]
    """Numbers in the result, at least and at most; the same where that is known before."""
    models: list[dict[str, Any]]
    """Provenance of further models."""

    def write(self, partial: Path, fingerprint: dict[str, Any], resume: bool, reporter: Reporter) -> Converted:
        """Convert block by block into a folder."""


def open_model(
    source: Source, recipe: Recipe, reporter: Reporter, stack: ExitStack, *, converted: bool = False
) -> Opened:
    """Open and check a model, and choose its matrices by ``targets`` and ``ignore``.

    Args:
        converted: whether it may be converted already.

    Raises:
        SecateurError: for whatever stands against a conversion.
    """
    device = resolve_device(recipe.device)
    dtype = parse_dtype(recipe.dtype, "dtype")
    activation_limit(recipe.activation_memory)
    if not converted and is_converted(check_model_folder(source.folder)):
        raise UnsupportedModelError(
            f"{source.name} is converted already", hint="convert the model that it was made from instead"
        )
    found = open_checkpoint(source.folder, stack)
    model, structure, reader, binding = found.model, found.structure, found.reader, found.binding
    chosen = make_plan(recipe, structure).targets
    linear = {
        matrix.name: matrix
        for matrix in structure.matrices
        if matrix.name in chosen and isinstance(model.get_submodule(matrix.module), nn.Linear | Conv1D)
    }
    if not linear:
        raise TargetError("none of the chosen matrices is a linear layer", hint="loosen --targets and --ignore")
    if len(linear) < len(chosen):
        first = next(name for name in chosen if name not in linear)
        reporter.note(f"{len(chosen) - len(linear)} matrices stay as they are, they are no linear layers: {first}, ...")
    rehearse(model, structure, binding, reader)
    check_finite(reader, reporter)
    compute = torch.float32 if binding.resident else compute_dtype(recipe.compute_dtype, device)
    return Opened(
        source, recipe, found.config, model, structure, reader, binding, linear, device, compute, dtype,
        hash_folder(source.folder),
    )  # fmt: skip
