"""Before and after, measured by the same code in the same run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import transformers

from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.source import Source
from secateur.corpus.load import DEFAULT_PROMPT, load_text
from secateur.engine.inputs import is_vision
from secateur.engine.skeleton import build_skeleton
from secateur.errors import SecateurError, UnsupportedModelError
from secateur.measure.compare import Ratio, measure_pair
from secateur.measure.size import measure_size
from secateur.progress import Reporter
from secateur.recipe import Recipe
from secateur.result import Measured
from secateur.verbs.calibration import load_tokenizer, window_length
from secateur.verbs.evaluate import evaluate as evaluate_model
from secateur.verbs.evaluate import has_language_head
from secateur.verbs.verdict import sentences

WINDOWS = 12
"""Windows of the measuring text, when the text has as many."""


@dataclass
class Sides:
    """Both sides, how they were measured, and what follows from them."""

    before: Measured
    after: Measured
    verdict: list[str] = field(default_factory=list)
    protocol: dict[str, Any] = field(default_factory=dict)
    decode: Ratio | None = None
    """Speeds of decoding, where they were measured."""


def measure_sides(
    source: Source,
    pruned: Path,
    *,
    skeleton: transformers.PreTrainedModel,
    prunable: tuple[dict[str, int], dict[str, int]],
    evaluate: bool,
    data: str,
    files: Sequence[str | Path],
    prompt: str | None,
    recipe: Recipe,
    demo: bool,
    reporter: Reporter,
) -> Sides:
    """Sizes always; quality, memory and speed when ``evaluate`` is set and the model can be measured that way.

    ``prunable`` is, for either side, checkpoint key -> number of weights for every tensor that may be pruned.
    """
    folders = (source.folder, pruned)
    before, after = (_size(folder, keys) for folder, keys in zip(folders, prunable, strict=True))
    weights = [sum(keys.values()) for keys in prunable]
    quantised = source.original_format.startswith("GGUF")
    protocol: dict[str, Any] = {
        "size": f"both sides stored as {after.dtype} safetensors"
        + (
            f"; the source itself came as {source.original_format}, {source.original_bytes:,} bytes"
            if quantised
            else ""
        )
    }
    ratio: Ratio | None = None
    if evaluate and 2.5 * before.bytes_disk > psutil.virtual_memory().available:
        reporter.warn("the model does not fit in memory: quality, memory and speed were not measured")
        evaluate = False
    if evaluate:
        _quality(folders, (before, after), protocol, skeleton, data, files, recipe, demo, reporter)
        ratio = _speed(folders, (before, after), protocol, skeleton, prompt, reporter)
    said = sentences(before, after, ratio, 1 - weights[1] / weights[0] if recipe.structure else None)
    if quantised:
        said.append(
            f"Both sides are compared as {after.dtype}: the model came quantised ({source.original_format}, "
            f"{source.original_bytes:,} bytes), and pruning works on the numbers it stands for."
        )
    return Sides(before, after, said, protocol, ratio)


def check_measurable(skeleton: transformers.PreTrainedModel, data: str) -> None:
    """Refuse a measuring text that cannot be read, before any work is done.

    Raises:
        CalibrationError: when there is no such text, it is not UTF-8, or it is empty.
    """
    if has_language_head(skeleton):
        load_text(data, "measure")


def _size(folder: Path, prunable: dict[str, int]) -> Measured:
    size = measure_size(folder, keys=prunable)
    total = sum(prunable.values())
    return Measured(
        parameters=size.parameters,
        nonzero=size.nonzero,
        sparsity=size.zeros_of_keys / total if total else 0.0,
        bytes_disk=size.bytes_disk,
        dtype=size.dtype,
    )


def _quality(
    folders: tuple[Path, Path],
    sides: tuple[Measured, Measured],
    protocol: dict[str, Any],
    skeleton: transformers.PreTrainedModel,
    data: str,
    files: Sequence[str | Path],
    recipe: Recipe,
    demo: bool,
    reporter: Reporter,
) -> None:
    length = None if is_vision(skeleton) else window_length(recipe.sequence_length, skeleton, 1024 if demo else 2048)
    text = data if not files or has_language_head(skeleton) else None
    if text is None:
        reporter.note(f"perplexity was not measured: {type(skeleton).__name__} has no language-model head")
    for folder, side in zip(folders, sides, strict=True):
        try:
            found = evaluate_model(
                folder, data=text, files=files, sequence_length=length, max_samples=WINDOWS, device=recipe.device,
                reporter=reporter,
            )  # fmt: skip
        except UnsupportedModelError as error:
            reporter.note(f"quality was not measured: {error.message}")
            return
        except SecateurError as error:  # the result is there, whatever becomes of its measuring
            which = "the source" if side is sides[0] else "the result"
            reporter.warn(f"quality of {which} was not measured: {error.message}; {error.hint}")
            return
        side.perplexity, side.nll_per_token, side.accuracy = found.perplexity, found.nll_per_token, found.accuracy
        side.expert_usage = found.expert_usage
        protocol["quality"] = found.protocol
        if found.rank_correlation and side is sides[1]:
            reporter.note("rank correlations are not part of this result: run secateur evaluate on both models")


def _speed(
    folders: tuple[Path, Path],
    sides: tuple[Measured, Measured],
    protocol: dict[str, Any],
    skeleton: transformers.PreTrainedModel,
    prompt: str | None,
    reporter: Reporter,
) -> Ratio | None:
    decodes = skeleton.can_generate() and not skeleton.config.is_encoder_decoder
    tokens: list[int] = []
    text = prompt or DEFAULT_PROMPT
    if decodes:
        try:
            tokens = load_tokenizer(folders[0])(text, add_special_tokens=False)["input_ids"]
        except SecateurError:
            tokens, text = list(range(1, 17)), ""
    try:
        pair = measure_pair(*folders, prompt_tokens=tokens, prompt=text if tokens and text else None, reporter=reporter)
    except SecateurError as error:  # as with quality
        reporter.warn(f"memory and speed were not measured: {error.message}; {error.hint}")
        return None
    for side, measured in zip(sides, (pair.before, pair.after), strict=True):
        side.bytes_resident = measured.bytes_resident
        side.decode_tokens_per_second = measured.decode_tokens_per_second
        side.continuation = measured.continuation
    protocol["speed"] = {**pair.protocol, "prompt": text}
    return pair.decode_ratio


def measured_model(
    folder: Path,
    prunable: dict[str, int],
    *,
    data: str,
    files: Sequence[str | Path],
    length: int | None,
    evaluate: bool,
    reporter: Reporter,
) -> tuple[Measured, dict[str, Any]]:
    """Size of one folder and, with ``evaluate``, its quality; and the protocol of the quality.

    ``prunable`` may name keys that the folder lacks: they do not count.
    """
    with CheckpointReader(folder) as reader:
        known = {key: count for key, count in prunable.items() if key in set(reader.keys)}
    side = _size(folder, known)
    skeleton = build_skeleton(folder)
    language = has_language_head(skeleton)
    if not evaluate or not (language or files):
        return side, {}
    if 2.5 * side.bytes_disk > psutil.virtual_memory().available:
        reporter.warn("the model does not fit in memory: its quality was not measured")
        return side, {}
    try:
        found = evaluate_model(
            folder, data=data if language else None, files=files, sequence_length=length, max_samples=WINDOWS,
            reporter=reporter,
        )  # fmt: skip
    except UnsupportedModelError as error:
        reporter.note(f"quality was not measured: {error.message}")
        return side, {}
    side.perplexity, side.nll_per_token, side.accuracy = found.perplexity, found.nll_per_token, found.accuracy
    side.expert_usage = found.expert_usage
    return side, found.protocol
