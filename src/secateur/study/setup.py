"""What a study needs before its first trial: model, texts and windows found, and everything refused that can be"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoint.check import check_model_folder, hash_folder
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.source import Source, open_source
from secateur.corpus.load import DEFAULT_PROMPT
from secateur.corpus.windows import windows
from secateur.engine.binding import Binding
from secateur.engine.blocks import find_structure
from secateur.engine.device import parse_dtype
from secateur.engine.skeleton import build_skeleton
from secateur.errors import CalibrationError, UnsupportedModelError
from secateur.plugins import ExpertCriterion, Method, check_chooser, make_chooser
from secateur.progress import Reporter
from secateur.recipe import Recipe
from secateur.study.space import NONE
from secateur.study.spec import StudySpec
from secateur.study.texts import Texts, read_texts
from secateur.study.values import Reach, check_constraints
from secateur.verbs.calibration import load_tokenizer, window_length
from secateur.verbs.evaluate import has_language_head

LENGTH = 1024
"""Tokens in a window unless the study says otherwise."""


@dataclass
class Setup:
    """A study whose inputs were found and seen to suit each other."""

    spec: StudySpec
    source: Source
    sha256: str
    texts: Texts
    length: int
    choice: torch.Tensor
    """(count, length) int64 token ids."""
    test: torch.Tensor
    prompt: list[int]
    """Token ids that decoding speed is measured after."""
    prunable: dict[str, int]
    """Checkpoint key -> number of weights of every prunable tensor."""
    reach: dict[str, Reach]
    """Quantity -> the least and the most that the space can give."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a storage file must agree with: the study, and the content of model and texts."""
        return {
            **self.spec.identity, "model_sha256": self.sha256, "texts_sha256": self.texts.digests,
            "sequence_length": self.length,
        }  # fmt: skip

    @property
    def device(self) -> str:
        return str(self.spec.fixed.get("device", "auto"))

    def recipe(self, settings: Mapping[str, Any]) -> tuple[Recipe, bool]:
        """The recipe of one setting, and whether its method looks at calibration text."""
        recipe = self.spec.recipe(settings, self.length)
        if self._reads_text(recipe):
            return recipe, True
        plain = recipe.to_dict()
        for key in ("calibration", "samples", "sequence_length", "compute_dtype", "activation_memory"):
            plain.pop(key)
        return Recipe.from_dict(plain), False

    @staticmethod
    def _reads_text(recipe: Recipe) -> bool:
        if recipe.method == "auto":
            return True  # blocks are chosen on text
        chooser = make_chooser(recipe.method, recipe.structure, recipe.method_options)
        if isinstance(chooser, ExpertCriterion):
            return chooser.data
        return not isinstance(chooser, Method) or chooser.statistics != "none"  # units are refitted on text


def set_up(spec: StudySpec, reporter: Reporter) -> Setup:
    """Open the model, read the texts, and check every setting that a trial may have.

    Raises:
        SecateurError: for whatever would make the study, or all trials of a setting, impossible.
    """
    texts = read_texts(spec)
    source = open_source(spec.model, reporter=reporter)
    check_model_folder(source.folder)
    skeleton = build_skeleton(source.folder)
    decodes = skeleton.can_generate() and not skeleton.config.is_encoder_decoder
    if not (decodes and has_language_head(skeleton)):
        raise UnsupportedModelError(
            f"{type(skeleton).__name__} has no next-token logits: studies compare perplexity yet",
            hint="take a decoder-only language model",
        )
    _check_settings(spec)
    length = window_length(spec.data.sequence_length, skeleton, LENGTH)
    tokenizer = load_tokenizer(source.folder)
    cut = {}
    for name, text in (("choice", texts.choice), ("test", texts.test)):
        cut[name] = windows(text.text, tokenizer, length)[: spec.data.windows]
        if len(cut[name]) < spec.data.windows:
            reporter.warn(f"{text.origin} fills {len(cut[name])} windows of {length} tokens: {name} has no more")
    _check_calibration(spec, texts, tokenizer, length)
    prompt = tokenizer(DEFAULT_PROMPT, add_special_tokens=False)["input_ids"]
    with CheckpointReader(source.folder) as reader:
        names = [matrix.name for matrix in find_structure(skeleton).matrices]
        prunable = {key: reader.info(key).numel for key in Binding(skeleton, reader.keys).keys_of(names)}
        reach = _reach(spec, reader, prunable)
    check_constraints(spec.constraints, reach, {})
    return Setup(
        spec, source, hash_folder(source.folder), texts, length, cut["choice"], cut["test"], prompt, prunable, reach
    )  # fmt: skip


def _check_calibration(spec: StudySpec, texts: Texts, tokenizer: Any, length: int) -> None:
    try:
        windows(texts.calibration.text, tokenizer, length, spec.data.samples)
    except CalibrationError as error:
        raise CalibrationError(
            f"data: calibration: {error.message}", hint="give a longer text, or fewer samples"
        ) from None


def _check_settings(spec: StudySpec) -> None:
    """Build every method with the ends of its options, so that a refused value is known now."""
    for space in spec.spaces:
        for structure in space.structures:
            names = () if structure == NONE else tuple(structure.split(","))
            for method in space.methods_for(structure):
                options = space.options.get(method, {})
                for at in (0, -1):
                    recipe = Recipe.from_dict(
                        {"structure": list(names), "method": method} if names else {"method": method}
                    )
                    given = {name: (values.choices or values.span)[at] for name, values in options.items()}
                    check_chooser(make_chooser(recipe.method, names, given), names)


def _reach(spec: StudySpec, reader: CheckpointReader, prunable: Mapping[str, int]) -> dict[str, Reach]:
    """What the space can give at all, from the shapes and number formats in the checkpoint alone."""
    infos = [reader.info(key) for key in reader.keys]
    numbers = [(info.numel, info.dtype) for info in infos if info.dtype.is_floating_point]
    other = sum(info.nbytes for info in infos if not info.dtype.is_floating_point)
    total, single = sum(count for count, _ in numbers), sum(prunable.values())
    sizes = []
    for space in spec.spaces:
        for name in space.dtypes:
            dtype = parse_dtype(name, "dtype")
            sizes.append(sum(count * (dtype or own).itemsize for count, own in numbers))
    structures = {name for space in spec.spaces for name in space.structures}
    most = max(space.sparsities[1] for space in spec.spaces)
    smallest = 1.0  # share of the parameters that stays at least; units are whole, so a little less may stay
    if structures != {NONE}:
        gone = total if any("hidden" in name for name in structures) else single
        smallest = max(0.0, 1 - 1.05 * most * gone / total)
    header = 1 << 20
    why = "number format and structures of the space; zeros alone make no file smaller"
    return {
        "bytes_disk": Reach(math.floor(min(sizes) * smallest), max(sizes) + other + header, why),
        "parameters": Reach(math.floor(total * smallest), total, "structures of the space"),
        "nonzero": Reach(max(0, math.floor(total - 1.05 * most * max(single, total * (1 - smallest)))), total,
                         "sparsities of the space"),
        "sparsity": Reach(0.0, 1.0, ""),
    }  # fmt: skip


def windows_folder(spec: StudySpec) -> Path:
    """Where trials find what they share."""
    return spec.out / ".shared"
