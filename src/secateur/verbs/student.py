"""The model that is trained: in float32, with a head where it needs one, and with those parameters free that learn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from secateur.checkpoint.source import Source
from secateur.engine.blocks import find_structure
from secateur.engine.quiet import quiet_loading
from secateur.engine.skeleton import build_skeleton
from secateur.errors import UnsupportedModelError, UsageError
from secateur.measure.model import load_model
from secateur.recovery.adapter_moe import add_adapter_experts
from secateur.recovery.lora import add_adapters
from secateur.recovery.zeros import HeldZeros
from secateur.training import DIM, EXPERTS, EXPERTS_OF_A_TOKEN, RANK
from secateur.verbs.lesson import Lesson


def open_student(lesson: Lesson, source: Source, device: torch.device) -> tuple[Any, set[str]]:
    """The pruned model in float32, with a new head where texts are labelled and it has none.

    Returns:
        The model, and the names of the parameters that no checkpoint had: whatever else is frozen, they must learn.
    """
    new: set[str] = set()
    skeleton = build_skeleton(source.folder)
    if lesson.task == "labels" and not type(skeleton).__name__.endswith("ForSequenceClassification"):
        names = lesson.label_names
        transformers.set_seed(lesson.settings.seed)
        with quiet_loading(), _no_load_report():
            model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                source.folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, num_labels=len(names),
                id2label=dict(enumerate(names)), label2id={name: number for number, name in enumerate(names)},
                output_loading_info=True,
            )  # fmt: skip
        model, new = model.to(device), set(info["missing_keys"])
    else:
        model = load_model(source.folder, device=str(device), dtype="float32")
    if getattr(model.config, "pad_token_id", None) is None and lesson.task == "labels":
        tokenizer = lesson.tokenizer
        model.config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    return model, new


@contextlib.contextmanager
def _no_load_report() -> Iterator[None]:
    """The head is new and the old one is left out: what transformers would say at length is what was asked for."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def named_for(student: Any, held: HeldZeros) -> HeldZeros:
    """The zeros under the student's names: a model with a new head has a prefix before the names of its body.

    Raises:
        UnsupportedModelError: when a pruned matrix is not in the student.
    """
    known = {name for name, _ in student.named_parameters(remove_duplicate=False)}
    prefix = f"{student.base_model_prefix}."
    pruned = {}
    for name, mask in held.pruned.items():
        own = next((made for made in (name, prefix + name, name.removeprefix(prefix)) if made in known), None)
        if own is None:
            raise UnsupportedModelError(
                f"{type(student).__name__} has no place for the pruned matrix {name}",
                hint="give data without labels, or prune a model that has the head already",
            )
        pruned[own] = mask
    return HeldZeros(pruned)


def trainable(lesson: Lesson, student: Any, held: HeldZeros, new: set[str]) -> Any:
    """Decide which parameters learn. ``new`` ones do in every mode, and so does the head of a classifier.

    Raises:
        UsageError: when a mode has nothing to train.
    """
    settings = lesson.settings
    prefix = f"{student.base_model_prefix}."
    heads = set(new)
    if lesson.task == "labels":
        heads |= {name for name, _ in student.named_parameters() if not name.startswith(prefix)}
    if settings.mode == "lora":
        learning = [student.get_parameter(name) for name in heads]
        weights = {matrix.name: student.get_parameter(matrix.name) for matrix in find_structure(student).matrices}
        model = add_adapters(student, held, weights, rank=settings.rank or RANK, seed=settings.seed)
        for parameter in learning:
            parameter.requires_grad_(True)
        return model
    if settings.mode == "adapter-moe":
        add_adapter_experts(
            student, experts=settings.experts or EXPERTS, top=settings.top_k or EXPERTS_OF_A_TOKEN,
            dim=settings.dim or DIM, seed=settings.seed,
        )  # fmt: skip
        return student
    if settings.mode == "norms-and-biases":
        vectors = {name for name, parameter in student.named_parameters() if parameter.ndim == 1}
        if not vectors:
            raise UsageError("the model has no norms and no biases", hint="use --mode full or lora")
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name in vectors | heads)
    else:
        student.requires_grad_(True)
    return student
