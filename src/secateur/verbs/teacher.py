"""The dense model that a pruned one learns from: found, and seen to suit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from secateur.checkpoint.check import check_model_folder, hash_folder
from secateur.checkpoint.source import Source, open_source
from secateur.engine.skeleton import build_skeleton
from secateur.errors import SourceError, UsageError
from secateur.progress import Reporter
from secateur.result import RESULT_FILE
from secateur.training import Training
from secateur.verbs.calibration import load_tokenizer


@dataclass(frozen=True)
class Teacher:
    """The dense model to learn from."""

    source: Source
    sha256: str
    """Of its weights."""
    config_sha256: str


def is_classifier(skeleton: transformers.PreTrainedModel) -> bool:
    """Whether a model gives labels to whole texts."""
    return type(skeleton).__name__.endswith("ForSequenceClassification")


def find_teacher(
    settings: Training, loss: str, sha256: str, result: Mapping[str, Any], skeleton: transformers.PreTrainedModel,
    tokenizer: Any, reporter: Reporter,
) -> Teacher:  # fmt: skip
    """The teacher that was named, or the source of the pruned model.

    Args:
        sha256: of the pruned model, which must not be its own teacher.

    Raises:
        UsageError: when none is known.
        SourceError: when it cannot be opened, is not what it was, or does not suit.
    """
    recorded = result.get("source") or {}
    name = settings.teacher or recorded.get("model")
    if not name:
        why = "the model has no secateur.json beside it that names its source"
        if recorded.get("kind") == "memory":
            why = "the dense model was one in memory, so secateur.json can name no folder"
        raise UsageError(
            f"no teacher is known: {why}",
            hint="save the dense model and name it with --teacher (teacher= in Python), or use --loss lm",
        )
    revision = recorded.get("revision") if settings.teacher is None and recorded.get("kind") == "hub" else None
    try:
        source = open_source(f"{name}@{revision}" if revision and "@" not in name else name, reporter=reporter)
    except SourceError as error:
        hint = error.hint if settings.teacher else "name the dense model with --teacher, or use --loss lm or labels"
        raise SourceError(f"teacher: {error.message}", hint=hint) from error
    check_model_folder(source.folder)
    digest = hash_folder(source.folder)
    if settings.teacher is None and recorded.get("sha256") not in (None, digest):
        raise SourceError(
            f"the teacher {name} is not the model any more that was pruned: its weights differ",
            hint="name the dense model with --teacher if this is it",
        )
    if settings.teacher is None and (earlier := _source_of(source.folder)):
        reporter.warn(
            f"the teacher {name} was pruned itself, from {earlier}: name that one with --teacher to learn from it"
        )
    dense = build_skeleton(source.folder)
    if digest == sha256 and _entries(dense) == _entries(skeleton):
        raise UsageError(
            "the teacher is the model itself: there is nothing to learn", hint="name the dense model with --teacher"
        )
    sizes = [model.config.get_text_config().vocab_size for model in (dense, skeleton)]
    if sizes[0] != sizes[1]:
        raise SourceError(
            f"the teacher {name} has a vocabulary of {sizes[0]:,}, the model one of {sizes[1]:,}",
            hint="a teacher must be of the same family, with the same tokenizer",
        )
    if load_tokenizer(source.folder).get_vocab() != tokenizer.get_vocab():
        raise SourceError(
            f"the teacher {name} has another tokenizer: the same numbers mean other tokens",
            hint="a teacher must be of the same family, with the same tokenizer",
        )
    _check_fit(settings, loss, dense, skeleton)
    config = (source.folder / "config.json").read_bytes()
    return Teacher(source, digest, hashlib.sha256(config).hexdigest())


def _entries(model: transformers.PreTrainedModel) -> dict[str, Any]:
    """What a config says of a model, but for where it lies: the same weights may be read in another way."""
    return {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}


def _source_of(folder: Path) -> str | None:
    """The model that a folder was pruned from, by its own result file; None also for one that was trained only."""
    try:
        told = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        return None if told.get("student") == told["source"] else str(told["source"]["model"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _check_fit(
    settings: Training, loss: str, dense: transformers.PreTrainedModel, skeleton: transformers.PreTrainedModel
) -> None:
    """Refuse a teacher whose outputs are not of the kind or size that is compared.

    Raises:
        SourceError: naming both sides.
    """

    def kind(model: transformers.PreTrainedModel) -> str:
        name = type(model).__name__
        if settings.mode == "blocks":
            return name
        for ending in ("ForSequenceClassification", "ForCausalLM", "LMHeadModel"):
            if name.endswith(ending):
                return ending.replace("LMHeadModel", "ForCausalLM")
        return "encoder"

    hint = "name the dense model that this one was pruned from"
    if kind(dense) != kind(skeleton):
        raise SourceError(f"the teacher is a {type(dense).__name__}, the model a {type(skeleton).__name__}", hint=hint)
    names = {"hidden_size": "hidden units", "num_hidden_layers": "layers"}
    compared = list(names) if settings.mode == "blocks" or loss == "kd+hidden" else []
    compared = ["hidden_size"] if loss == "features" else compared
    for key in compared:
        theirs, ours = (getattr(model.config.get_text_config(), key, None) for model in (dense, skeleton))
        if theirs != ours:
            raise SourceError(f"the teacher has {theirs} {names[key]}, the model {ours}", hint=hint)
    if settings.mode == "blocks":
        sides = [{name: value.shape for name, value in model.named_parameters()} for model in (dense, skeleton)]
        if sides[0] != sides[1]:
            name = next(name for name in sides[1] if sides[0].get(name) != sides[1][name])
            raise SourceError(
                f"{name} has other shapes in the teacher: --mode blocks reads the dense weights into the same model",
                hint="use --mode full or lora for a model from which whole units were removed",
            )
        kinds = [{name: type(module).__name__ for name, module in model.named_modules()} for model in (dense, skeleton)]
        if other := next((name for name in kinds[1] if kinds[0].get(name) != kinds[1][name]), None):
            raise SourceError(
                f"{other} is {kinds[0].get(other)} in the teacher and {kinds[1][other]} in the model: --mode blocks "
                "reads the dense weights into the same model",
                hint="use --mode full or lora",
            )
    if is_classifier(skeleton) and dense.config.num_labels != skeleton.config.num_labels:
        raise SourceError(
            f"the teacher has {dense.config.num_labels} labels, the model {skeleton.config.num_labels}", hint=hint
        )
