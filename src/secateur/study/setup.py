"""What a study needs before its first trial: model, texts and windows found, and everything refused that can be"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from secateur.checkpoint.check import check_model_folder, hash_folder
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.source import Source, open_source
from secateur.converting.opened import Work
from secateur.corpus.load import DEFAULT_PROMPT
from secateur.corpus.windows import windows
from secateur.engine.binding import Binding
from secateur.engine.blocks import find_structure
from secateur.engine.device import resolve_device
from secateur.engine.skeleton import build_skeleton
from secateur.errors import CalibrationError, SecateurError, StudyError, UnsupportedModelError
from secateur.measure.classify import check_classifier
from secateur.measure.energy import find_meter
from secateur.measure.texts import tokenise
from secateur.plugins import ExpertCriterion, Method, check_chooser, make_chooser
from secateur.progress import Reporter
from secateur.recipe import Recipe
from secateur.study.conversion import MODELS, Conversion
from secateur.study.quality import save_windows
from secateur.study.reach import reach_of
from secateur.study.recoveries import NONE
from secateur.study.space import CONVERT
from secateur.study.spec import StudySpec
from secateur.study.speed import SENTENCES, Load
from secateur.study.storing import check_installed
from secateur.study.texts import Texts, read_examples, read_texts
from secateur.study.values import ENERGY, SPEED, Reach, check_constraints
from secateur.verbs.calibration import load_tokenizer, window_length
from secateur.verbs.convert import check_conversion, make_conversion
from secateur.verbs.dividing import measuring_rule
from secateur.verbs.evaluate import has_language_head
from secateur.verbs.teacher import is_classifier

LENGTH = {"language": 1024, "labels": 128}
"""Tokens in a window unless the study says otherwise."""


@dataclass
class Setup:
    """A study whose inputs were found and seen to suit each other."""

    spec: StudySpec
    source: Source
    sha256: str
    texts: Texts
    length: int
    cut: dict[str, torch.Tensor]
    """Windows of choice and test, (count, length) int64 token ids; nothing where texts are labelled."""
    load: Load
    """What speed is measured on."""
    model: str
    """What `prune` is given: the model of the study, or the folder of the classifier that was made of it."""
    prunable: dict[str, int]
    """Checkpoint key -> number of weights of every prunable tensor."""
    reach: dict[str, Reach]
    """Quantity -> the least and the most that the space can give."""
    models: dict[str, list[str]] = field(default_factory=dict)
    """Conversion by its name -> hashes of the weights of the other models that it takes; those that take some."""
    made_by: str = ""
    """The command that made the dense model, where the study has made it."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a storage file must agree with: the study, and the content of model and texts."""
        others = {"models_sha256": self.models} if self.models else {}
        return {
            **self.spec.identity, "model_sha256": self.sha256, **others, "texts_sha256": self.texts.digests,
            "sequence_length": self.length,
        }  # fmt: skip

    def content(self, settings: Mapping[str, Any]) -> Conversion | None:
        """The conversion of one setting with hashes in the place of the models that it takes."""
        conversion = self.spec.conversion(settings)
        digests = self.models.get(str(settings.get(CONVERT)))
        return conversion if conversion is None or digests is None else {**conversion, MODELS: digests}

    def exam(self, name: str) -> Path:
        """The file of what is measured on, choice or test, as `secateur.study.quality.measuring` takes it."""
        if self.texts.labelled:
            return self.spec.texts_folder / f"{name}.jsonl"
        return save_windows(windows_folder(self.spec), name, self.cut[name])

    @property
    def trial_load(self) -> Load | None:
        """What the speed of every trial is measured on; None when no objective or constraint asks for it."""
        return self.load if self.spec.wanted & {*SPEED} else None

    @property
    def finalist_load(self) -> Load | None:
        """The same of baselines and finalists, which a study measures unless told not to."""
        return self.load if self.spec.speed == "finalists" else self.trial_load

    @property
    def device(self) -> str:
        return str(self.spec.fixed.get("device", "auto"))

    def recipe(self, settings: Mapping[str, Any]) -> tuple[Recipe, bool]:
        """The recipe of one setting, and whether its method or conversion looks at calibration text."""
        recipe, conversion = self.spec.recipe(settings, self.length), self.spec.conversion(settings)
        if self._reads_text(recipe) if conversion is None else converter(conversion).statistics:
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
        if not isinstance(chooser, Method):
            return True  # units are refitted on text
        rule = measuring_rule(recipe)
        divided = rule is not None and rule.needs != "weights"
        return chooser.statistics != "none" or bool(recipe.refit) or recipe.reconstruct != NONE or divided


def set_up(spec: StudySpec, reporter: Reporter) -> Setup:
    """Open the model, read the texts, and check every setting that a trial may have.

    Raises:
        SecateurError: for whatever would make the study, or all trials of a setting, impossible.
    """
    _check_meter(spec)
    asked = [*spec.baselines, *(name for space in spec.spaces for name in space.formats)]
    check_installed(asked, f"study {spec.name}")
    texts = read_texts(spec) if spec.task == "language" else None
    source = open_source(spec.model, reporter=reporter)
    check_model_folder(source.folder)
    skeleton = build_skeleton(source.folder)
    if texts is None:
        texts = read_examples(spec, _classes(spec, skeleton))
        _check_labels(spec, texts, skeleton)
    elif not (skeleton.can_generate() and not skeleton.config.is_encoder_decoder and has_language_head(skeleton)):
        raise UnsupportedModelError(
            f"{type(skeleton).__name__} has no next-token logits, so there is no perplexity to compare",
            hint="take a decoder-only language model, or give labelled texts with task: labels",
        )
    works = _check_settings(spec, source)
    models = {name: [str(one["sha256"]) for one in work.models] for name, work in works.items() if work.models}
    sizes = {name: work.parameters for name, work in works.items()}
    length = window_length(spec.data.sequence_length, skeleton, LENGTH[spec.task])
    tokenizer = load_tokenizer(source.folder)
    _check_calibration(spec, texts, tokenizer, length)
    cut: dict[str, torch.Tensor] = {}
    if spec.task == "language":
        for name, text in (("choice", texts.choice), ("test", texts.test)):
            cut[name] = windows(text.text, tokenizer, length)[: spec.data.windows]
            if len(cut[name]) < spec.data.windows:
                reporter.warn(f"{text.origin} fills {len(cut[name])} windows of {length} tokens: {name} has no more")
        load: Load = {"prompt": tokenizer(DEFAULT_PROMPT, add_special_tokens=False)["input_ids"]}
    else:
        few = texts.labelled["choice"].texts[:SENTENCES]
        made = tokenise(skeleton, tokenizer, few, limit=None, name="choice")
        known = (skeleton.config.get_text_config().pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
        load = {"sentences": made.sequences, "padding": next((one for one in known if one is not None), 0)}
    return Setup(
        spec=spec, texts=texts, length=length, cut=cut, load=load, model=spec.model, models=models,
        **open_model(spec, source, sizes),
    )  # fmt: skip


def open_model(spec: StudySpec, source: Source, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """What a study needs to know of its dense model, as fields of `Setup`.

    Args:
        sizes: conversion by its name -> parameters of its result, at least and at most; those that are known.

    Raises:
        StudyError: when its shapes say that no trial can meet a constraint.
    """
    skeleton = build_skeleton(source.folder)
    with CheckpointReader(source.folder) as reader:
        names = [matrix.name for matrix in find_structure(skeleton).matrices]
        prunable = {key: reader.info(key).numel for key in Binding(skeleton, reader.keys).keys_of(names)}
        reach = reach_of(spec, reader, prunable, sizes)
    check_constraints(spec.constraints, reach, {})
    return {"source": source, "sha256": hash_folder(source.folder), "prunable": prunable, "reach": reach}


def _classes(spec: StudySpec, skeleton: transformers.PreTrainedModel) -> list[str] | None:
    """The names of the classes that a classifier has; None for a model that is to become one.

    Raises:
        UnsupportedModelError: for a model that is no text classifier and cannot become one.
    """
    name = type(skeleton).__name__
    if is_classifier(skeleton):
        check_classifier(skeleton, "data: choice")
        return [skeleton.config.id2label[number] for number in sorted(skeleton.config.id2label)]
    if spec.fine_tune is None:
        raise UnsupportedModelError(
            f"{name} is no text classifier", hint="say how it becomes one, for example fine-tune: {epochs: 2}"
        )
    known = type(skeleton.config) in transformers.AutoModelForSequenceClassification._model_mapping
    if not known or skeleton.config.is_encoder_decoder or skeleton.main_input_name != "input_ids":
        raise UnsupportedModelError(
            f"{name} has no class with a head for labels that can be fine-tuned", hint="take an encoder or a decoder"
        )
    return None


def _check_meter(spec: StudySpec) -> None:
    """Refuse to weigh an energy that nothing here can measure."""
    name = ENERGY[spec.task]
    if name in spec.wanted:
        meter, why = find_meter(str(resolve_device(str(spec.fixed.get("device", "auto")))))
        if meter is None:
            raise StudyError(
                f"{name} cannot be measured here: {why}", hint="leave it out, or run the study where there is a meter"
            )


def _check_labels(spec: StudySpec, texts: Texts, skeleton: transformers.PreTrainedModel) -> None:
    """Refuse labelled texts that cannot be learned or measured as the study asks."""
    names, count = texts.labelled["calibration"].names, len(texts.labelled["choice"].texts)
    if not is_classifier(skeleton) and len(names) < 2:
        raise CalibrationError(
            f"{texts.calibration.origin}: all texts have one label, there is nothing to choose",
            hint="give texts of two or more classes",
        )
    if spec.stop is not None and spec.stop.evaluate > count:
        raise StudyError(
            f"stop looks at {spec.stop.evaluate} texts first, and choice has {count} in all",
            hint="give stop: evaluate a smaller number",
        )


def _check_calibration(spec: StudySpec, texts: Texts, tokenizer: Any, length: int) -> None:
    try:
        labelled = texts.labelled.get("calibration")
        text = texts.calibration.text if labelled is None else "\n\n".join(labelled.texts)  # as prune reads JSONL
        windows(text, tokenizer, length, spec.data.samples)
    except CalibrationError as error:
        raise CalibrationError(
            f"data: calibration: {error.message}", hint="give a longer text, or fewer samples"
        ) from None


def converter(conversion: Conversion) -> Any:
    """The object that converts.

    Raises:
        SecateurError: for an option with a value it refuses.
    """
    return make_conversion(conversion["to"], {name: value for name, value in conversion.items() if name != "to"})


def _check_settings(spec: StudySpec, source: Source) -> dict[str, Work]:
    """Build every method with the ends of its options, so that a refused value is known now; try every conversion.

    Returns:
        Conversion by its name -> what it would do.
    """
    works = {}
    for space in spec.spaces:
        for name, conversion in space.conversions.items():
            recipe = spec.recipe({CONVERT: name, "dtype": space.dtypes[0]})
            try:
                works[name] = check_conversion(converter(conversion), source, recipe)
            except SecateurError as error:
                raise StudyError(f"convert {name}: {error.message}", hint=error.hint) from error
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
    return works


def windows_folder(spec: StudySpec) -> Path:
    """Where trials find what they share."""
    return spec.out / ".shared"
