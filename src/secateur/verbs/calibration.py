"""Calibration data of a run: text cut in windows, images, or what a Python caller hands over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from secateur.corpus.images import load_images
from secateur.corpus.load import load_text
from secateur.corpus.windows import windows
from secateur.engine.inputs import batches_of_samples, batches_of_windows, is_vision
from secateur.errors import CalibrationError, UsageError
from secateur.progress import Reporter
from secateur.recipe import DEFAULT_SAMPLES, DEFAULT_SEQUENCE_LENGTH, Recipe

Data = torch.Tensor | Iterable[Mapping[str, Any]]


@dataclass
class Calibration:
    """Forward arguments, batch by batch, and what to say about them."""

    batches: list[dict[str, torch.Tensor]] = field(default_factory=list)
    protocol: dict[str, Any] = field(default_factory=dict)
    probe: dict[str, torch.Tensor] | None = None
    """A small input of the same kind, for the verification; None leaves the choice to the engine."""


def maximum_length(model: transformers.PreTrainedModel) -> int | None:
    """Longest sequence the model was made for, None when its config does not say."""
    text = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            break
    else:
        return None
    for path, module in model.named_modules():
        # Some families (RoBERTa, OPT) start counting positions behind the padding index of a position table.
        if isinstance(module, torch.nn.Embedding) and "position" in path and module.padding_idx is not None:
            value = min(value, module.num_embeddings - module.padding_idx - 1)
    return value


def window_length(
    asked: int | None, model: transformers.PreTrainedModel, default: int = DEFAULT_SEQUENCE_LENGTH
) -> int:
    """Tokens in a window: what was asked for, or the default cut down to what the model can take.

    Raises:
        UsageError: when more was asked for than the model can take.
    """
    longest = maximum_length(model)
    if asked is not None and longest is not None and asked > longest:
        raise UsageError(
            f"sequence length {asked} is more than the model's {longest}",
            hint=f"use --sequence-length {longest} or less",
        )
    return asked or min(default, longest or default)


def load_calibration(
    recipe: Recipe,
    model: transformers.PreTrainedModel,
    folder: Path,
    reporter: Reporter,
    *,
    data: Data | None = None,
    demo: bool = False,
) -> Calibration:
    """Build the calibration batches that a recipe asks for.

    Args:
        model: the skeleton; it says what kind of input it takes.
        folder: where tokenizer and image processor are.
        data: token ids (n, L) or forward arguments from a Python caller, instead of ``recipe.calibration``.
        demo: the demo model takes smaller defaults, so that a first run is short.

    Raises:
        CalibrationError: when there is too little of it or it does not suit the model.
    """
    if isinstance(data, torch.Tensor):
        if data.ndim != 2 or data.is_floating_point() or not data.numel():
            raise CalibrationError(
                f"calibration token ids are {tuple(data.shape)} {data.dtype}", hint="give (n, L) integers"
            )
        return Calibration(
            batches_of_windows(model, data), {"calibration": "token ids given by the caller", **_size(data)}
        )
    if data is not None:
        batches = batches_of_samples(data)
        if not batches:
            raise CalibrationError("the calibration data given is empty", hint="give at least one batch")
        probe = {name: tensor[:1] for name, tensor in batches[0].items()}
        return Calibration(batches, {"calibration": "batches given by the caller", "samples": len(batches)}, probe)
    if is_vision(model):
        return _images(recipe, folder)
    length = window_length(recipe.sequence_length, model, 1024 if demo else DEFAULT_SEQUENCE_LENGTH)
    samples = recipe.samples or (16 if demo else DEFAULT_SAMPLES)
    text = load_text(recipe.calibration, "calibration")
    tokenizer = load_tokenizer(folder)
    if recipe.samples is None:
        cut = windows(text.text, tokenizer, length)[:samples]
        if len(cut) < samples:
            reporter.warn(
                f"{text.origin} fills {len(cut)} windows of {length} tokens, not the default {samples}: all are used"
            )
    else:
        cut = windows(text.text, tokenizer, length, samples)
    _check_vocabulary(cut, model)
    return Calibration(batches_of_windows(model, cut), {"calibration": text.origin, **_size(cut)})


def _size(cut: torch.Tensor) -> dict[str, int]:
    return {"samples": cut.shape[0], "sequence_length": cut.shape[1]}


def _images(recipe: Recipe, folder: Path) -> Calibration:
    if recipe.calibration == "builtin":
        raise CalibrationError(
            "this model looks at images, and the built-in calibration data is text",
            hint="give a folder of images with --calibration DIR, or use --method magnitude, which needs none",
        )
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"{folder} has no usable image processor (preprocessor_config.json)",
            hint="copy that file from the original model, or hand over tensors from Python",
        ) from error
    samples = load_images(Path(recipe.calibration), processor, recipe.samples or DEFAULT_SAMPLES)
    return Calibration(batches_of_samples(samples), {"calibration": recipe.calibration, "samples": len(samples)})


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        CalibrationError: when the folder has none.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # every tokenizer class fails in its own way
        raise CalibrationError(
            f"{folder} has no tokenizer that can be loaded: {str(error).splitlines()[0]}",
            hint="put the tokenizer files beside the weights, or use --method magnitude, which needs no text",
        ) from error


def _check_vocabulary(ids: torch.Tensor, model: transformers.PreTrainedModel) -> None:
    size = model.config.get_text_config().vocab_size
    if int(ids.max()) >= size:
        raise CalibrationError(
            f"the tokenizer makes token {int(ids.max())}, but the model knows {size}",
            hint="tokenizer and weights in the folder belong to different models",
        )
