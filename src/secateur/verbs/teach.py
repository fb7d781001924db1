"""Training with the whole graph, on the Hugging Face Trainer."""

from __future__ import annotations

import functools
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from secateur.checkpoint.ledger import Ledger
from secateur.checkpoint.source import Source
from secateur.engine.device import trim_memory
from secateur.engine.quiet import quiet_loading
from secateur.errors import OutputError, RunError, UsageError
from secateur.measure.embeddings import read_pooling
from secateur.measure.model import load_model
from secateur.measure.perplexity import perplexity
from secateur.measure.texts import padding_token
from secateur.processes import Processes
from secateur.progress import Reporter
from secateur.recovery.arguments import asks_for_parts, read_whole_models, training_arguments
from secateur.recovery.data import Answers, Pad, Texts, Windows, stack
from secateur.recovery.lora import merge_adapters
from secateur.recovery.objectives import FeatureObjective, LabelObjective, LanguageObjective
from secateur.recovery.parts import fill, gather, trained_parameters
from secateur.recovery.teacher import TeacherLogits, build_cache, cache_key, cached_folder, open_cache
from secateur.recovery.trainer import Checkpoints, RecoveryTrainer, Tell, TrimMemory, last_checkpoint, time_of_step
from secateur.training import CACHED, SAVE_MINUTES
from secateur.verbs.cost import StandIn, settle
from secateur.verbs.lesson import Lesson
from secateur.verbs.student import named_for, open_student, trainable
from secateur.verbs.taught import ASSESSED, Taught, generalisation, held_zeros, write_taught


def teach(
    lesson: Lesson, source: Source, skeleton: transformers.PreTrainedModel, partial: Path, device: torch.device,
    dtype: torch.dtype, ledger: Ledger | None, processes: Processes, reporter: Reporter,
) -> Taught | None:  # fmt: skip
    """Train with the Hugging Face Trainer and write the result into ``partial``.

    Args:
        skeleton: the pruned model without weights.
        ledger: that of the run, in the first process.

    Returns:
        What was made, in the first process; None in the others.

    Raises:
        RunError: a loss that is not finite, or a full disk; the last checkpoint can be resumed.
        UsageError: a budget in minutes that allows no step or, with FSDP, cannot be measured; FSDP where accelerate
            does not do it.
    """
    settings = lesson.settings
    parts = asks_for_parts(settings.trainer)
    if parts:
        if lesson.steps is None:
            raise UsageError("--minutes needs a measured step, and with FSDP there is none", hint="give --tokens")
        read_whole_models(reporter)
    arguments = training_arguments(
        partial / "trainer", settings.trainer, seed=settings.seed, device=device, steps=1, rate=lesson.learning_rate,
        batch=lesson.batch_size, single_texts=lesson.task != "language", processes=processes.count,
        checkpointing=_checkpointing(settings.mode, settings.gradient_checkpointing),
    )  # fmt: skip
    budget = None
    if lesson.steps is None and _is_cached(lesson):
        # Before the teacher is asked, so that it is asked only about what the minutes reach.
        budget = settle(
            lesson, functools.partial(_rehearsal, lesson, source, skeleton, arguments, device, dtype), ledger,
            processes, reporter,
        )  # fmt: skip
        lesson.cut_to(budget.steps)
    cache = _teacher_cache(lesson, device, dtype, processes, reporter)
    live = None
    if lesson.teacher is not None and cache is None:
        live = load_model(lesson.teacher.source.folder, device=str(device), dtype=_name(dtype))
    objective = _objective(lesson, source, live, dtype)
    # A model that is divided among devices may be larger than one; where a teacher is beside it, it is not.
    place = torch.device("cpu") if parts and lesson.task != "features" else device
    student, new = open_student(lesson, source, place)
    held = named_for(student, held_zeros(source, skeleton))
    trim_memory()
    before = processes.on_first(functools.partial(_losses, lesson, student, objective))
    trim_memory()
    model = trainable(lesson, student, held, new)
    tell = Tell(reporter)
    data = _dataset(lesson, lesson.split.train, cache)
    with padding_token(student, lesson.tokenizer) as padding:
        collate = stack if lesson.task == "language" else Pad(padding or 0)
        trainer = RecoveryTrainer(
            model=model, args=arguments, train_dataset=data, data_collator=collate, objective=objective,
            callbacks=[Checkpoints(settings.save_minutes or SAVE_MINUTES, reporter), tell],
            held=held if settings.mode == "full" else None, owner=student,
        )  # fmt: skip
        del held  # where the pruned matrices are frozen, their masks are a tenth of all memory for nothing
        if parts and not trainer.is_fsdp_enabled:
            raise UsageError(
                f"accelerate does not divide a model on {arguments.device.type}: FSDP needs accelerators",
                hint="leave fsdp out: each process then holds the whole model",
            )
        trainer.remove_callback(transformers.PrinterCallback)
        if arguments.activation_checkpointing:
            trainer.add_callback(TrimMemory())  # time is spent on memory there anyway
        trim_memory()
        budget = budget or settle(
            lesson, functools.partial(_time_and_size, trainer, collate, data), ledger, processes, reporter
        )
        steps = budget.steps
        arguments.max_steps = steps
        given = {key.replace("-", "_") for key in settings.trainer}
        if not given & {"warmup_steps", "warmup_ratio"}:
            # The first step of a warm-up has rate 0: one that is the only step must not be.
            arguments.warmup_steps = min(max(1, round(0.05 * steps)), steps - 1)
        if "logging_steps" not in given:
            arguments.logging_steps = budget.logging
        resumed = last_checkpoint(Path(arguments.output_dir))
        processes.gather(None)  # from here on they wait for each other's gradients, where nobody hears of an error
        try:
            with quiet_loading():
                trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        except OSError as error:
            raise RunError(f"training stopped: {error}", hint="free some space and go on with --resume") from error
    trained = gather(trained_parameters(trainer.model), keep=processes.first) if parts else {}
    # The Trainer's own list, because a resumed run has the losses before the kill in it.
    losses = [(entry["step"], float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry]
    done = steps - (int(resumed.name.rpartition("-")[2]) if resumed else 0)
    del trainer
    if not processes.first:
        return None
    if parts:
        del model, student
        student, new = open_student(lesson, source, place)
        model = trainable(lesson, student, named_for(student, held_zeros(source, skeleton)), new)
        for name, parameter in trained_parameters(model).items():
            fill(parameter, trained[name])
    finished = merge_adapters(model) if settings.mode == "lora" else student
    del model, trained
    gc.collect()
    trim_memory()
    student = finished.eval()
    after = _losses(lesson, student, objective)
    del live, objective
    report = _report(lesson, steps, done, tell.seconds, budget.seconds, losses, before, after)
    made = write_taught(lesson, student, source, partial, named_for(student, held_zeros(source, skeleton)))
    made.report = report
    return made


def _losses(lesson: Lesson, student: Any, objective: Any) -> list[float | None]:
    """On texts held out, and on texts trained on."""
    return [_assess(lesson, student, part, objective) for part in (lesson.split.held_out, lesson.split.train)]


def _is_cached(lesson: Lesson) -> bool:
    """Whether the teacher is asked once, before the training, and not in every step."""
    return lesson.loss in CACHED and lesson.task == "language"


def _time_and_size(trainer: RecoveryTrainer, collate: Any, data: Any) -> tuple[float | None, int]:
    """Seconds of a step and the number of trained parameters.

    With FSDP there are no seconds: no process holds the whole model, and a step of a part is none.
    """
    model: Any = trainer.model
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if trainer.is_fsdp_enabled:
        return None, trained
    count = min(trainer.args.per_device_train_batch_size, len(data))
    batch = collate([data[index] for index in range(count)])
    return time_of_step(trainer, batch, trainer.args.gradient_accumulation_steps), trained


def _rehearsal(
    lesson: Lesson, source: Source, skeleton: transformers.PreTrainedModel,
    arguments: transformers.TrainingArguments, device: torch.device, dtype: torch.dtype,
) -> tuple[float | None, int]:  # fmt: skip
    """The same of a student that goes again, with a stand-in for the teacher: never are both in memory."""
    student, new = open_student(lesson, source, device)
    model = trainable(lesson, student, named_for(student, held_zeros(source, skeleton)), new)
    answers = StandIn((lesson.length, min(lesson.top_k, student.config.get_text_config().vocab_size)))
    data = _dataset(lesson, lesson.split.train, answers)
    objective = _objective(lesson, source, None, dtype)
    trainer = RecoveryTrainer(model=model, args=arguments, train_dataset=data, data_collator=stack, objective=objective)
    found = _time_and_size(trainer, stack, data)
    del trainer, model, student
    gc.collect()
    trim_memory()
    return found


def _teacher_cache(
    lesson: Lesson, device: torch.device, dtype: torch.dtype, processes: Processes, reporter: Reporter
) -> TeacherLogits | None:
    """The teacher's logits for all training windows, from the cache or made now; None where it must be asked live.

    The first process makes them; the others read what it has made.
    """
    if not _is_cached(lesson):
        return None
    teacher = lesson.teacher
    assert teacher is not None
    assert lesson.windows is not None
    windows = lesson.windows[: len(lesson.split.train)]
    key = cache_key(teacher.sha256 + teacher.config_sha256, windows, lesson.top_k, dtype, device.type)

    def make() -> None:
        if cached_folder(key).is_dir():
            reporter.note("the teacher's logits for this text are in the cache")
            return
        model = load_model(teacher.source.folder, device=str(device), dtype=_name(dtype))
        build_cache(key, model, windows, lesson.top_k, dtype=dtype, reporter=reporter)
        del model
        trim_memory()

    processes.on_first(make)
    if not cached_folder(key).is_dir():
        raise OutputError(
            f"process {processes.rank} does not see {cached_folder(key)}, which the first process has made",
            hint="give a folder that all machines share with SECATEUR_CACHE",
        )
    return open_cache(key)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _objective(lesson: Lesson, source: Source, live: Any, dtype: torch.dtype) -> Any:
    if lesson.task == "language":
        return LanguageObjective(lesson.loss, dtype, live, lesson.top_k)
    if lesson.task == "labels":
        return LabelObjective(lesson.loss, dtype, live)
    return FeatureObjective(live, read_pooling(source.folder).kind, dtype)


def _checkpointing(mode: str, asked: str) -> bool:
    return asked == "on" or (asked == "auto" and mode in ("lora", "norms-and-biases"))


def _dataset(lesson: Lesson, indices: Sequence[int], cache: Answers | None) -> Any:
    if lesson.windows is not None:
        return Windows(lesson.windows, indices, cache)
    assert lesson.tokens is not None
    return Texts(lesson.tokens, lesson.labels, indices)


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
    lesson: Lesson, steps: int, done: int, seconds: float, step_seconds: float | None, losses: list[tuple[int, float]],
    before: Sequence[float | None], after: Sequence[float | None],
) -> dict[str, Any]:  # fmt: skip
    tokens = steps * lesson.tokens_per_step
    return {
        "steps": steps,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": done * lesson.tokens_per_step / seconds if seconds else None,
        "expected_seconds": None if step_seconds is None else steps * step_seconds,
        "training_loss": losses[-1][1] if losses else None,
        "losses": losses,
        **generalisation(before, after),
    }
