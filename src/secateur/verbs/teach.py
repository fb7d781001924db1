"""Training with the whole graph, on the Hugging Face Trainer."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from secateur.checkpoint.ledger import Ledger
from secateur.checkpoint.source import Source
from secateur.engine.blocks import find_structure
from secateur.engine.device import trim_memory
from secateur.errors import RunError, UsageError
from secateur.measure.embeddings import read_pooling
from secateur.measure.model import load_model, quiet_loading
from secateur.measure.perplexity import perplexity
from secateur.measure.texts import padding_token
from secateur.progress import Reporter
from secateur.recovery.blocks import duration
from secateur.recovery.data import Pad, Texts, Windows, stack
from secateur.recovery.lora import merge_adapters
from secateur.recovery.objectives import FeatureObjective, LabelObjective, LanguageObjective
from secateur.recovery.teacher import TeacherLogits, build_cache, cache_key, cached_folder, open_cache
from secateur.recovery.trainer import (
    Checkpoints,
    HoldZeros,
    RecoveryTrainer,
    Tell,
    last_checkpoint,
    time_of_step,
    training_arguments,
)
from secateur.verbs.lesson import Lesson
from secateur.verbs.student import named_for, open_student, trainable
from secateur.verbs.taught import ASSESSED, Taught, generalisation, held_zeros, write_taught


def teach(
    lesson: Lesson, source: Source, skeleton: transformers.PreTrainedModel, partial: Path, device: torch.device,
    dtype: torch.dtype, ledger: Ledger, reporter: Reporter,
) -> Taught:  # fmt: skip
    """Train with the Hugging Face Trainer and write the result into ``partial``.

    Args:
        skeleton: the pruned model without weights.

    Raises:
        RunError: a loss that is not finite, or a full disk; the last checkpoint can be resumed.
        UsageError: a budget in minutes that allows no step.
    """
    settings = lesson.settings
    arguments = training_arguments(
        partial / "trainer", settings.trainer, seed=settings.seed, device=device, steps=1, rate=lesson.learning_rate,
        batch=lesson.batch_size, single_texts=lesson.task != "language",
        checkpointing=_checkpointing(settings.mode, settings.gradient_checkpointing),
    )  # fmt: skip
    cache = _teacher_cache(lesson, device, dtype, reporter)
    student, new = open_student(lesson, source, device)
    held = named_for(student, held_zeros(source, skeleton))
    structure = find_structure(student)
    weights = {matrix.name: student.get_parameter(matrix.name) for matrix in structure.matrices}
    live = None
    if lesson.teacher is not None and cache is None:
        live = load_model(lesson.teacher.source.folder, device=str(device), dtype=_name(dtype))
    objective = _objective(lesson, source, live, dtype)
    before = [_assess(lesson, student, part, objective) for part in (lesson.split.held_out, lesson.split.train)]
    model = trainable(lesson, student, held, weights, new)
    tell = Tell(reporter)
    data = _dataset(lesson, lesson.split.train, cache)
    with padding_token(student, lesson.tokenizer) as padding:
        collate = stack if lesson.task == "language" else Pad(padding or 0)
        trainer = RecoveryTrainer(
            model=model, args=arguments, train_dataset=data, data_collator=collate, objective=objective,
            callbacks=[Checkpoints(settings.save_minutes), tell],
        )  # fmt: skip
        if settings.mode == "full":
            trainer.add_callback(HoldZeros(held, student))
        del held  # where the pruned matrices are frozen, their masks are a tenth of all memory for nothing
        trainer.remove_callback(transformers.PrinterCallback)
        steps, seconds = _budget(lesson, trainer, collate, data, ledger, reporter)
        arguments.max_steps = steps
        given = {key.replace("-", "_") for key in settings.trainer}
        if not given & {"warmup_steps", "warmup_ratio"}:
            # The first step of a warm-up has rate 0: one that is the only step must not be.
            arguments.warmup_steps = min(max(1, round(0.05 * steps)), steps - 1)
        if "logging_steps" not in given:
            arguments.logging_steps = max(1, steps // 20)
        resumed = last_checkpoint(Path(arguments.output_dir))
        try:
            with quiet_loading():
                trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        except OSError as error:
            raise RunError(f"training stopped: {error}", hint="free some space and go on with --resume") from error
    finished = merge_adapters(trainer.model) if settings.mode == "lora" else student
    done = steps - (int(resumed.name.rpartition("-")[2]) if resumed else 0)
    # The Trainer's own list, because a resumed run has the losses before the kill in it.
    losses = [(entry["step"], float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry]
    del trainer, model
    gc.collect()
    student = finished.eval()
    after = [_assess(lesson, student, part, objective) for part in (lesson.split.held_out, lesson.split.train)]
    del live, objective
    report = _report(lesson, steps, done, tell.seconds, seconds, losses, before, after)
    made = write_taught(lesson, student, source, partial, named_for(student, held_zeros(source, skeleton)))
    made.report = report
    return made


def _teacher_cache(
    lesson: Lesson, device: torch.device, dtype: torch.dtype, reporter: Reporter
) -> TeacherLogits | None:
    """The teacher's logits for all training windows, from the cache or made now; None where it must be asked live."""
    if lesson.loss != "kd" or lesson.task != "language":
        return None
    assert lesson.teacher is not None
    assert lesson.windows is not None
    windows = lesson.windows[: len(lesson.split.train)]
    identity = lesson.teacher.sha256 + lesson.teacher.config_sha256
    key = cache_key(identity, windows, lesson.settings.top_k, dtype, device.type)
    if cached_folder(key).is_dir():
        reporter.note("the teacher's logits for this text are in the cache")
        return open_cache(key)
    teacher = load_model(lesson.teacher.source.folder, device=str(device), dtype=_name(dtype))
    cache = build_cache(key, teacher, windows, lesson.settings.top_k, dtype=dtype, reporter=reporter)
    del teacher
    trim_memory()
    return cache


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _objective(lesson: Lesson, source: Source, live: Any, dtype: torch.dtype) -> Any:
    if lesson.task == "language":
        return LanguageObjective(lesson.loss, dtype, live, lesson.settings.top_k)
    if lesson.task == "labels":
        return LabelObjective(lesson.loss, dtype, live)
    return FeatureObjective(live, read_pooling(source.folder).kind, dtype)


def _checkpointing(mode: str, asked: str) -> bool:
    return asked == "on" or (asked == "auto" and mode in ("lora", "norms-and-biases"))


def _dataset(lesson: Lesson, indices: Sequence[int], cache: TeacherLogits | None) -> Any:
    if lesson.windows is not None:
        return Windows(lesson.windows, indices, cache)
    assert lesson.tokens is not None
    return Texts(lesson.tokens, lesson.labels, indices)


def _budget(
    lesson: Lesson, trainer: RecoveryTrainer, collate: Any, data: Any, ledger: Ledger, reporter: Reporter
) -> tuple[int, float]:
    """Steps of the run and the measured seconds of one; says before the start what it will cost."""
    arguments = trainer.args
    accumulation = arguments.gradient_accumulation_steps
    batch = collate([data[index] for index in range(min(arguments.per_device_train_batch_size, len(data)))])
    seconds = time_of_step(trainer, batch, accumulation)
    steps = lesson.steps
    noted = next((entry["steps"] for entry in ledger.steps if "steps" in entry), None)
    if noted is not None:
        steps = noted  # a resumed run must not measure itself another length
    elif steps is None:
        assert lesson.settings.minutes is not None
        steps = int(60 * lesson.settings.minutes / seconds)
        if steps < 1:
            raise UsageError(
                f"--minutes {lesson.settings.minutes:g} allows no step: one takes {seconds:.1f} s",
                hint="give more minutes, or a smaller --batch-size or --sequence-length",
            )
    if noted is None:
        ledger.append({"steps": steps})
    tokens = lesson.tokens_per_step
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    each = 1000 * seconds / tokens
    rate = f"{each:.1f}" if each >= 1 else f"{each:.2g}"
    reporter.note(
        f"{steps} steps of {tokens:,} tokens: {rate} s per 1,000 tokens, about "
        f"{duration(steps * seconds)} in all; {trained:,} parameters are trained, whose gradients and optimiser take "
        f"{12 * trained / 1e6:,.0f} MB"
    )
    return steps, seconds


def _assess(lesson: Lesson, model: Any, indices: Sequence[int], objective: Any) -> float | None:
    """Mean loss of some examples: nats per predicted token or label, or the distance of embeddings; None without any.

    Args:
        objective: what training minimises; it is measured itself for embeddings only, elsewhere what it stands for is.
    """
    if not indices:
        return None
    if lesson.windows is not None:
        return perplexity(model, lesson.windows[list(indices)[:ASSESSED]], reporter=Reporter()).nll_per_token
    chosen = list(indices)[: 8 * ASSESSED]
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    data, losses = Texts(lesson.tokens or [], lesson.labels, chosen), []
    measured = objective if lesson.task == "features" else LabelObjective("labels")
    with torch.inference_mode(), padding_token(model, lesson.tokenizer) as padding:
        for start in range(0, len(chosen), lesson.batch_size):
            rows = [data[index] for index in range(start, min(start + lesson.batch_size, len(chosen)))]
            batch = {name: value.to(device) for name, value in Pad(padding or 0)(rows).items()}
            losses.append((float(measured(model, batch)), len(rows)))
    model.train(training)
    return sum(loss * count for loss, count in losses) / len(chosen)


def _report(
    lesson: Lesson, steps: int, done: int, seconds: float, step_seconds: float, losses: list[tuple[int, float]],
    before: Sequence[float | None], after: Sequence[float | None],
) -> dict[str, Any]:  # fmt: skip
    tokens = steps * lesson.tokens_per_step
    return {
        "steps": steps,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": done * lesson.tokens_per_step / seconds if seconds else None,
        "expected_seconds": steps * step_seconds,
        "training_loss": losses[-1][1] if losses else None,
        "losses": losses,
        **generalisation(before, after),
    }
