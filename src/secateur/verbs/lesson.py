"""What a recovery run will do, decided and checked before anything is written: task, data, teacher, budget."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from secateur.checkpoint.source import Source
from secateur.corpus.labelled import Labelled, first_columns, read_labelled
from secateur.corpus.load import load_text
from secateur.corpus.windows import windows
from secateur.errors import CalibrationError, MissingExtraError, UnsupportedModelError, UsageError
from secateur.layers.spec import is_converted, read_spec
from secateur.measure.classify import check_classifier
from secateur.measure.embeddings import check_encoder
from secateur.measure.texts import tokenise
from secateur.progress import Reporter
from secateur.recovery.adapter_moe import networks_of
from secateur.recovery.data import Split, split, steps_for
from secateur.training import CACHED, DIM, EXPERTS, EXPERTS_OF_A_TOKEN, RANK, TOP_K, Training
from secateur.verbs.calibration import load_tokenizer, window_length
from secateur.verbs.teacher import Teacher, find_teacher, is_classifier

Task = Literal["language", "labels", "features"]

RATES = {"full": 4e-4, "lora": 3e-3, "norms-and-biases": 1e-3, "blocks": 4e-4, "adapter-moe": 1e-3}
LABEL_RATES = {"full": 3e-5, "lora": 3e-4, "norms-and-biases": 1e-3}
EPOCHS = 4
"""The most times that --mode blocks goes through a text when no budget is given."""
BLOCK_WINDOWS = 256
"""Windows for --mode blocks when no budget is given, counted as often as they are gone through."""
LABEL_EPOCHS = 3
TEXT_TOKENS = 128
"""The most tokens of a labelled text or of a text to embed."""


@dataclass
class Lesson:
    """Everything that training needs, checked. ``windows`` for running text, ``tokens`` for single texts."""

    settings: Training
    task: Task
    loss: str
    tokenizer: Any
    length: int
    batch_size: int
    learning_rate: float
    split: Split
    digest: str
    teacher: Teacher | None = None
    windows: torch.Tensor | None = None
    tokens: list[list[int]] | None = None
    labels: list[int] | None = None
    label_names: list[str] = field(default_factory=list)
    steps: int | None = None
    """Optimiser steps; None when the budget is in minutes."""
    epochs: int = 1
    protocol: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    """How many train together, each on a batch of its own in every step."""

    @property
    def top_k(self) -> int:
        """Logits of the teacher that are kept for each token."""
        return TOP_K if self.settings.mode == "adapter-moe" else self.settings.top_k or TOP_K

    @property
    def sequences_per_step(self) -> int:
        """Sequences of an optimiser step, in all processes together."""
        return self.batch_size * self.processes

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimiser step in all processes together; for single texts, of an average one."""
        if self.tokens is None:
            return self.sequences_per_step * self.length
        mean = sum(map(len, self.tokens)) / len(self.tokens)
        return max(1, round(self.sequences_per_step * mean))

    def cut_to(self, steps: int) -> None:
        """Leave out the windows that so many steps never reach: the teacher need not read them."""
        reached = min(len(self.split.train), steps * self.sequences_per_step)
        self.split = Split(self.split.train[:reached], self.split.held_out)
        self.protocol["held_out"] = self.held_out_told

    @property
    def held_out_told(self) -> str:
        """How much of the data is held out, in words."""
        return f"{len(self.split.held_out)} of {len(self.split.held_out) + len(self.split.train)} examples"


def plan_lesson(
    settings: Training,
    source: Source,
    skeleton: transformers.PreTrainedModel,
    sha256: str,
    result: Mapping[str, Any],
    reporter: Reporter,
    processes: int = 1,
) -> Lesson:
    """Decide what is trained on what.

    Args:
        skeleton: the pruned model without weights.
        sha256: of the pruned model.
        result: what ``secateur.json`` beside the pruned model says, empty when there is none.
        processes: how many train together.

    Raises:
        UsageError: settings that do not suit the model or each other, a budget that allows no step, no teacher known.
        CalibrationError: data that is missing, malformed, or too little.
        SourceError: a teacher that cannot be opened, or has another vocabulary.
        MissingExtraError: for adapters without PEFT.
    """
    _check_mode(settings, skeleton)
    if settings.mode == "lora" and importlib.util.find_spec("peft") is None:
        raise MissingExtraError("--mode lora needs PEFT", hint="pip install 'secateur[recover]'")
    labelled = _labelled(settings, skeleton)
    task = _task(settings, skeleton, labelled)
    if settings.mode == "adapter-moe":
        if task != "language":
            raise UsageError(
                "--mode adapter-moe trains language models on text", hint="use --mode full, lora or norms-and-biases"
            )
        networks_of(skeleton)  # refuse a model that has none
    tokenizer = load_tokenizer(source.folder)
    known = settings.teacher is not None or bool((result.get("source") or {}).get("model"))
    loss = _loss(settings, task, known, reporter)
    needs_teacher = settings.mode == "blocks" or loss in (*CACHED, "kd+hidden", "features")
    if settings.teacher is not None and not needs_teacher:
        raise UsageError(f"--loss {loss} has no teacher", hint="leave --teacher out, or use --loss kd")
    teacher = find_teacher(settings, loss, sha256, result, skeleton, tokenizer, reporter) if needs_teacher else None
    rates = LABEL_RATES if task == "labels" else RATES
    lesson = Lesson(
        settings=settings, task=task, loss=loss, tokenizer=tokenizer, length=0, batch_size=0,
        learning_rate=settings.learning_rate or rates[settings.mode], split=Split([], []), digest="",
        teacher=teacher, processes=processes,
    )  # fmt: skip
    if task == "language":
        _running_text(lesson, skeleton, reporter)
    else:
        _single_texts(lesson, skeleton, labelled, reporter)
    for name in unused(settings, task, loss):
        reporter.warn(f"--{name.replace('_', '-')} has no effect with --mode {settings.mode} and this loss")
    lesson.protocol |= {
        "loss": "relative error of block outputs" if settings.mode == "blocks" else loss,
        "mode": settings.mode,
        "learning_rate": lesson.learning_rate,
        "batch_size": lesson.batch_size,
        "processes": processes,
        "held_out": lesson.held_out_told,
        "teacher": teacher.source.name if teacher else "none",
    }
    if settings.mode == "adapter-moe":
        lesson.protocol |= {
            "experts": settings.experts or EXPERTS, "experts_of_a_token": settings.top_k or EXPERTS_OF_A_TOKEN,
            "dim": settings.dim or DIM,
        }  # fmt: skip
    if settings.mode == "lora":
        lesson.protocol["rank"] = settings.rank or RANK
    if looks_at_top_k(settings, task, loss):
        lesson.protocol["top_k"] = lesson.top_k
    return lesson


def _check_mode(settings: Training, skeleton: transformers.PreTrainedModel) -> None:
    """Refuse what would train a tensor that several blocks share as if it were in one of them."""
    config = skeleton.config.to_dict()
    if settings.mode in ("lora", "blocks") and is_converted(config) and read_spec(config).tied:
        raise UsageError(
            f"--mode {settings.mode} cannot train weights that several blocks share",
            hint="use --mode full, or norms-and-biases",
        )


def looks_at_top_k(settings: Training, task: Task, loss: str) -> bool:
    """Whether the teacher's next-token distribution is learned, of which so many logits are kept."""
    return task == "language" and loss in (*CACHED, "kd+hidden") and settings.mode != "blocks"


def unused(settings: Training, task: Task, loss: str) -> list[str]:
    """Settings that were given and that nothing in this run looks at."""
    blocks = settings.mode == "blocks"
    looked_at = {
        "rank": settings.mode == "lora",
        "top_k": looks_at_top_k(settings, task, loss) or settings.mode == "adapter-moe",
        "experts": settings.mode == "adapter-moe",
        "dim": settings.mode == "adapter-moe",
        "gradient_checkpointing": not blocks,
        "save_minutes": not blocks,
    }
    return [name for name, used in looked_at.items() if not used and getattr(settings, name) not in (None, "auto")]


def _labelled(settings: Training, skeleton: transformers.PreTrainedModel) -> Labelled | None:
    """The data as labelled texts, when its first row has a label or the loss asks for one."""
    if settings.mode == "blocks":
        return None
    path = Path(settings.data).expanduser()
    wanted = settings.loss == "labels" or (settings.loss != "features" and is_classifier(skeleton))
    if not wanted:
        rows = path.suffix == ".jsonl" and path.is_file() and settings.loss == "auto"
        if not rows or "label" not in first_columns(path):
            return None
    if settings.data == "builtin":
        raise CalibrationError("the built-in text has no labels", hint="give a JSONL of `text`, `label` with --data")
    labels = skeleton.config.id2label if is_classifier(skeleton) else None
    return read_labelled(path, labels=labels)


def _task(settings: Training, skeleton: transformers.PreTrainedModel, labelled: Labelled | None) -> Task:
    name = type(skeleton).__name__
    if skeleton.main_input_name != "input_ids":
        raise UnsupportedModelError(
            f"{name} reads {skeleton.main_input_name}: only text models can be recovered yet",
            hint="secateur prune needs no training: choose a method that keeps more of the quality, or less sparsity",
        )
    if labelled is not None and not skeleton.config.is_encoder_decoder:
        if is_classifier(skeleton):
            check_classifier(skeleton, labelled.name)
        return "labels"
    if labelled is not None or settings.mode == "blocks" or name.endswith(("ForCausalLM", "LMHeadModel")):
        if skeleton.config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"{name} is an encoder-decoder: these cannot be recovered yet",
                hint="models that generate text or encode it can be",
            )
        return "language"
    check_encoder(skeleton, "recover without labels")
    return "features"


def _loss(settings: Training, task: Task, teacher_known: bool, reporter: Reporter) -> str:
    allowed: dict[Task, Sequence[str]] = {
        "language": ("kd+lm", "kd", "lm", "kd+hidden"),
        "labels": ("labels", "kd"),
        "features": ("features",),
    }
    if settings.loss == "auto":
        if task == "language" and not teacher_known and settings.mode != "blocks":
            reporter.warn("no teacher is known: training on the text alone (--loss lm); name one with --teacher")
            return "lm"
        return allowed[task][0]
    if settings.loss not in allowed[task]:
        what = {"language": "a language model on text", "labels": "a classifier", "features": "an encoder"}[task]
        raise UsageError(
            f"--loss {settings.loss} does not suit {what}", hint=f"use {' or '.join(allowed[task])}, or leave it out"
        )
    return settings.loss


def _running_text(lesson: Lesson, skeleton: transformers.PreTrainedModel, reporter: Reporter) -> None:
    settings = lesson.settings
    lesson.length = window_length(settings.sequence_length, skeleton, 1024)
    lesson.batch_size = settings.batch_size or (2 if settings.mode == "blocks" else 1)
    text = load_text(settings.data, "calibration")
    cut = windows(text.text, lesson.tokenizer, lesson.length)
    if int(cut.max()) >= skeleton.config.get_text_config().vocab_size:
        raise CalibrationError(f"the tokenizer makes token {int(cut.max())}, which the model does not know")
    lesson.windows = cut
    lesson.split = split(len(cut), settings.held_out, shuffle=False, seed=settings.seed)
    lesson.digest = hashlib.sha256(cut.numpy().tobytes()).hexdigest()
    lesson.protocol["data"] = f"{text.origin}; {len(cut)} windows of {lesson.length} tokens"
    available = len(lesson.split.train)
    if settings.mode == "blocks":
        # Tokens that were not seen before teach more than the same ones again: once through as much text as there is.
        passes = math.ceil((settings.tokens or BLOCK_WINDOWS * lesson.length) / max(available * lesson.length, 1))
        lesson.epochs = settings.epochs or max(1, passes if settings.tokens else min(passes, EPOCHS))
        wanted = steps_for(settings.tokens or BLOCK_WINDOWS * lesson.length, lesson.epochs, lesson.length)
        count = min(available, wanted)
        if settings.tokens is None and count < available:
            reporter.note(f"{count} of {available:,} windows are trained on; --tokens sets another number")
        if settings.epochs is None and lesson.epochs > 1:
            reporter.note(f"the text has {available:,} windows to train on: it is gone through {lesson.epochs} times")
        if settings.tokens is not None and count < wanted:
            reporter.warn(
                f"the text has {available:,} windows to train on: {lesson.epochs} times through them is "
                f"{available * lesson.epochs * lesson.length:,} tokens, not the {settings.tokens:,} of --tokens"
            )
        lesson.split = Split(lesson.split.train[:count], lesson.split.held_out)
        lesson.steps = 0
        return
    if settings.epochs is not None:
        raise UsageError("--epochs is for --mode blocks and labelled texts", hint="use --tokens for running text")
    if settings.minutes is None:
        each = lesson.sequences_per_step
        lesson.steps = steps_for(settings.tokens or max(available, each) * lesson.length, each, lesson.length)
        lesson.cut_to(lesson.steps)


def _single_texts(
    lesson: Lesson, skeleton: transformers.PreTrainedModel, labelled: Labelled | None, reporter: Reporter
) -> None:
    settings = lesson.settings
    for name in ("tokens", "minutes"):
        if settings.epochs is not None and getattr(settings, name) is not None:
            raise UsageError(f"both epochs and {name} are given", hint="give one budget")
    if labelled is not None:
        texts, origin = labelled.texts, labelled.name
        lesson.labels, lesson.label_names = labelled.labels, labelled.names
    else:
        text = load_text(settings.data, "calibration")
        texts, origin = [part for part in text.text.split("\n\n") if len(part.split()) > 3], text.origin
        if not texts:
            raise CalibrationError(f"{text.origin} has no paragraph of four words or more")
    lesson.length = window_length(settings.sequence_length, skeleton, TEXT_TOKENS)
    lesson.batch_size = settings.batch_size or (16 if labelled is not None else 32)
    made = tokenise(skeleton, lesson.tokenizer, texts, limit=lesson.length, name=origin)
    lesson.tokens = made.sequences
    if made.cut:
        reporter.note(f"{made.told}; --sequence-length sets another number")
    lesson.split = split(len(texts), settings.held_out, shuffle=True, seed=settings.seed)
    told = json.dumps([made.sequences, lesson.labels]).encode()
    lesson.digest = hashlib.sha256(told).hexdigest()
    lesson.protocol["data"] = f"{origin}; {len(texts)} texts; {made.told}"
    if settings.minutes is None:
        per_epoch = math.ceil(len(lesson.split.train) / lesson.sequences_per_step)
        lesson.steps = LABEL_EPOCHS * per_epoch if labelled is not None else per_epoch
        if settings.epochs is not None:
            lesson.steps = settings.epochs * per_epoch
        if settings.tokens is not None:
            lesson.steps = steps_for(settings.tokens, 1, lesson.tokens_per_step)
