"""The training itself: with the whole graph on the Hugging Face Trainer, or block by block on the engine."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from secateur.checkpoint.ledger import Ledger
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.source import Source
from secateur.checkpoint.writer import CheckpointWriter, hash_file, layout_like
from secateur.engine.activations import ActivationStore
from secateur.engine.binding import Binding
from secateur.engine.blocks import find_structure
from secateur.engine.device import activation_limit, trim_memory
from secateur.engine.forward import probe_inputs
from secateur.engine.inputs import batches_of_windows, output_tensor
from secateur.engine.plan import Plan
from secateur.engine.sink import CheckpointSink
from secateur.engine.skeleton import build_skeleton
from secateur.errors import RunError, UnsupportedModelError, UsageError
from secateur.measure.embeddings import read_pooling
from secateur.measure.model import load_model, quiet_loading
from secateur.measure.perplexity import perplexity
from secateur.measure.texts import padding_token
from secateur.plugins import make_method
from secateur.progress import Reporter
from secateur.recovery.blocks import BlockRecovery, BlockTraining
from secateur.recovery.data import Pad, Texts, Windows, stack
from secateur.recovery.lora import add_adapters, merge_adapters
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
from secateur.recovery.zeros import HeldZeros
from secateur.verbs.lesson import Lesson

_ASSESSED = 16
"""Windows on which training and held-out loss are measured."""


@dataclass
class Taught:
    """What was made, and what a verification must find on the disk."""

    shards: dict[str, str]
    zeros: dict[str, int]
    """Checkpoint key of every tensor with held zeros -> number of zeros."""
    prunable: dict[str, int]
    """Checkpoint key of every prunable tensor -> number of weights."""
    held: HeldZeros
    probe: Mapping[str, torch.Tensor]
    answer: torch.Tensor | None
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def zeros_held(self) -> int:
        return len(self.held)

    def check(self, folder: Path) -> int:
        """Read the written weights again: every held zero must be zero, in its place.

        Raises:
            VerificationError: when one is not.
        """
        model = build_skeleton(folder)
        with CheckpointReader(folder) as reader:
            binding = Binding(model, reader.keys)
            total = 0
            for name, mask in self.held.pruned.items():
                total += HeldZeros({name: mask}).check(binding.load([name], reader))
        return total


def held_zeros(source: Source, skeleton: transformers.PreTrainedModel) -> HeldZeros:
    """The zeros of a folder's prunable matrices, one block at a time."""
    pruned: dict[str, torch.Tensor] = {}
    with CheckpointReader(source.folder) as reader:
        binding = Binding(skeleton, reader.keys)
        for block in find_structure(skeleton).blocks:
            names = [matrix.name for matrix in block.matrices if binding.bound(matrix.name)]
            pruned |= HeldZeros.of(binding.load(names, reader)).pruned
    return HeldZeros(pruned)


def teach(
    lesson: Lesson, source: Source, held: HeldZeros, partial: Path, device: torch.device, dtype: torch.dtype,
    ledger: Ledger, reporter: Reporter,
) -> Taught:  # fmt: skip
    """Train with the Hugging Face Trainer and write the result into ``partial``.

    Raises:
        RunError: a loss that is not finite, or a full disk; the last checkpoint can be resumed.
        UsageError: a budget in minutes that allows no step.
    """
    settings = lesson.settings
    cache = _teacher_cache(lesson, device, dtype, reporter)
    student = _student(lesson, source, device)
    held = _named_for(student, held)
    structure = find_structure(student)
    weights = {matrix.name: student.get_parameter(matrix.name) for matrix in structure.matrices}
    before = _assess(lesson, student, lesson.split.held_out, reporter)
    model = _trainable(lesson, student, held, weights)
    live = None
    if lesson.teacher is not None and cache is None:
        live = load_model(lesson.teacher.source.folder, device=str(device), dtype=_name(dtype))
    objective = _objective(lesson, source, live, dtype)
    tell = Tell(reporter)
    arguments = training_arguments(
        partial / "trainer", settings.trainer, seed=settings.seed, device=device, steps=1, rate=lesson.learning_rate,
        batch=lesson.batch_size, single_texts=lesson.task != "language",
        checkpointing=_checkpointing(settings.mode, settings.gradient_checkpointing),
    )  # fmt: skip
    data = _dataset(lesson, lesson.split.train, cache)
    with padding_token(student, lesson.tokenizer) as padding:
        collate = stack if lesson.task == "language" else Pad(padding or 0)
        trainer = RecoveryTrainer(
            model=model, args=arguments, train_dataset=data, data_collator=collate, objective=objective,
            callbacks=[Checkpoints(settings.save_minutes), tell],
        )  # fmt: skip
        if settings.mode != "lora":
            trainer.add_callback(HoldZeros(held, student))
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
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        except OSError as error:
            raise RunError(f"training stopped: {error}", hint="free some space and go on with --resume") from error
    finished = merge_adapters(trainer.model) if settings.mode == "lora" else student
    done = steps - (int(resumed.name.rpartition("-")[2]) if resumed else 0)
    # The Trainer's own list, because a resumed run has the losses before the kill in it.
    losses = [(entry["step"], float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry]
    del trainer, live, objective, model
    gc.collect()
    student = finished.eval()
    after = _assess(lesson, student, lesson.split.held_out, reporter)
    seen = _assess(lesson, student, lesson.split.train, reporter)
    report = _report(lesson, steps, done, tell.seconds, seconds, losses, before, after, seen)
    made = _write(lesson, student, source, partial, held)
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
    key = cache_key(lesson.teacher.sha256, windows, lesson.settings.top_k, dtype)
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


def _student(lesson: Lesson, source: Source, device: torch.device) -> Any:
    """The pruned model in float32, with a new head where texts are labelled and it has none."""
    skeleton = build_skeleton(source.folder)
    if lesson.task == "labels" and not type(skeleton).__name__.endswith("ForSequenceClassification"):
        names = lesson.label_names
        transformers.set_seed(lesson.settings.seed)
        with quiet_loading(), _no_load_report():
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                source.folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, num_labels=len(names),
                id2label=dict(enumerate(names)), label2id={name: number for number, name in enumerate(names)},
            )  # fmt: skip
        model = model.to(device)
    else:
        model = load_model(source.folder, device=str(device), dtype="float32")
    if getattr(model.config, "pad_token_id", None) is None and lesson.task == "labels":
        tokenizer = lesson.tokenizer
        model.config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    return model


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


def _named_for(student: Any, held: HeldZeros) -> HeldZeros:
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


def _trainable(lesson: Lesson, student: Any, held: HeldZeros, weights: Mapping[str, torch.Tensor]) -> Any:
    """Decide which parameters learn."""
    settings = lesson.settings
    heads = [name for name, _ in student.named_parameters() if name.split(".")[0] in ("score", "classifier")]
    if settings.mode == "lora":
        model = add_adapters(student, held, weights, rank=settings.rank, seed=settings.seed)
        for name, parameter in model.named_parameters():
            if lesson.task == "labels" and any(name.endswith(head) for head in heads):
                parameter.requires_grad_(True)  # a new head starts from nothing
        return model
    if settings.mode == "norms-and-biases":
        chosen = [name for name, parameter in student.named_parameters() if parameter.ndim == 1]
        if not chosen:
            raise UsageError("the model has no norms and no biases", hint="use --mode full or lora")
        learning = {*chosen, *(heads if lesson.task == "labels" else ())}
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name in learning)
    else:
        student.requires_grad_(True)
    return student


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
        f"{_duration(steps * seconds)} in all; {trained:,} parameters are trained, whose gradients and optimiser take "
        f"{12 * trained / 1e6:,.0f} MB"
    )
    return steps, seconds


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _assess(lesson: Lesson, model: Any, indices: Sequence[int], reporter: Reporter) -> float | None:
    """Mean loss of some examples: nats per predicted token, or per label. None where there is nothing to measure."""
    if not indices or lesson.task == "features":
        return None
    if lesson.windows is not None:
        return perplexity(model, lesson.windows[list(indices)[:_ASSESSED]], reporter=Reporter()).nll_per_token
    chosen = list(indices)[: 8 * _ASSESSED]
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    data, losses = Texts(lesson.tokens or [], lesson.labels, chosen), []
    objective = LabelObjective("labels")
    with torch.inference_mode(), padding_token(model, lesson.tokenizer) as padding:
        for start in range(0, len(chosen), lesson.batch_size):
            rows = [data[index] for index in range(start, min(start + lesson.batch_size, len(chosen)))]
            batch = {name: value.to(device) for name, value in Pad(padding or 0)(rows).items()}
            losses.append((float(objective(model, batch)), len(rows)))
    model.train(training)
    return sum(loss * count for loss, count in losses) / len(chosen)


def _report(
    lesson: Lesson, steps: int, done: int, seconds: float, step_seconds: float, losses: list[tuple[int, float]],
    before: float | None, after: float | None, seen: float | None,
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
        "held_out_loss_before": before,
        "held_out_loss": after,
        "trained_text_loss": seen,
        "generalisation_gap": None if after is None or seen is None else after - seen,
    }


def _write(lesson: Lesson, model: Any, source: Source, partial: Path, held: HeldZeros) -> Taught:
    """Store the model in the source's formats, shards and names; one with a new head as transformers does."""
    weights = dict(model.named_parameters())
    held.check({name: weights[name] for name in held.pruned})
    names = [matrix.name for matrix in find_structure(model).matrices]
    with CheckpointReader(source.folder) as reader:
        binding = Binding(model, reader.keys)
        fresh = bool(binding.missing)
        if not fresh:
            shards = _write_like(reader, binding, model, partial)
            text = (source.folder / "config.json").read_text(encoding="utf-8")
            (partial / "config.json").write_text(text, encoding="utf-8")
        else:
            formats = {reader.info(key).dtype for key in reader.keys if reader.info(key).dtype.is_floating_point}
            model.to(next(iter(formats)) if len(formats) == 1 else torch.float32)
            with quiet_loading():
                model.save_pretrained(partial)
            model.float()
            shards = {path.name: hash_file(path) for path in sorted(partial.glob("*.safetensors"))}
    with CheckpointReader(partial) as written:
        binding = Binding(model, written.keys)
        keys = binding.keys_of(names)
        prunable = {key: written.info(key).numel for key in keys}
        zeros = {key: int((written.tensor(key) == 0).sum()) for key in keys}
        probe = probe_inputs(model)
    device = next(model.parameters()).device
    with torch.inference_mode(), padding_token(model, lesson.tokenizer):
        answer = output_tensor(model(**{name: value.to(device) for name, value in probe.items()})).float().cpu()
    return Taught(shards, zeros, prunable, held, probe, answer)


def _write_like(reader: CheckpointReader, binding: Binding, model: Any, partial: Path) -> dict[str, str]:
    """The same keys, shards and formats as the source; afterwards the model holds what was written."""
    state = model.state_dict()
    with CheckpointWriter(partial, layout_like(reader), resume=False) as writer:
        for unit in binding.units:
            tensors = {name: state[name].detach().cpu() for name in unit.names}
            for key, tensor in binding.unload(unit, tensors).items():
                writer.write(key, tensor.to(reader.info(key).dtype))
            for name, rounded in binding.load(unit.names, writer).items():
                state[name].copy_(rounded)
        for key in binding.unbound:
            writer.copy(reader, key)
        return dict(writer.finish())


def teach_blocks(
    lesson: Lesson, source: Source, held: HeldZeros, partial: Path, device: torch.device, dtype: torch.dtype,
    ledger: Ledger, reporter: Reporter,
) -> Taught:  # fmt: skip
    """Train block by block, one block in memory at a time, and write each as it is done.

    Raises:
        RunError: a loss that is not finite; finished blocks can be resumed.
    """
    assert lesson.teacher is not None
    assert lesson.windows is not None
    model = build_skeleton(source.folder)
    structure = find_structure(model)
    with CheckpointReader(source.folder) as reader, CheckpointReader(lesson.teacher.source.folder) as dense:
        binding = Binding(model, reader.keys)
        keys_of = {block.index: binding.keys_of(block.tensors) for block in structure.blocks}
        started = time.monotonic()
        with CheckpointWriter(partial, layout_like(reader), resume=bool(ledger.steps)) as writer:
            sink = CheckpointSink(reader, writer, ledger, keys_of)
            training = BlockTraining(lesson.epochs, lesson.learning_rate, lesson.batch_size)
            stream = BlockRecovery(
                model, structure, binding, reader, sink, make_method("magnitude"), Plan(),
                ActivationStore(activation_limit("auto"), partial), device, dtype, lesson.settings.seed, reporter,
                teacher=dense, training=training,
            )  # fmt: skip
            probe = probe_inputs(model)
            batches = batches_of_windows(model, lesson.windows[lesson.split.train])
            result = stream.run(batches, probe)
            sink.copy_rest()
            shards = writer.finish()
    text = (source.folder / "config.json").read_text(encoding="utf-8")
    (partial / "config.json").write_text(text, encoding="utf-8")
    seconds = time.monotonic() - started
    tokens = lesson.epochs * len(lesson.split.train) * lesson.length
    prunable = {}
    with CheckpointReader(partial) as written:
        keys = binding.keys_of([matrix.name for matrix in structure.matrices])
        prunable = {key: written.info(key).numel for key in keys}
    report = {
        "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds if seconds else None,
        "block_errors": _block_errors(ledger),
    }  # fmt: skip
    return Taught(dict(shards), sink.zeros, prunable, held, probe, result.probe, report)


def _block_errors(ledger: Ledger) -> dict[str, list[float]]:
    """Error of each block before and after its training, those of a run that was resumed among them."""
    last = {step["block"]: step["matrices"][-1] for step in ledger.steps if step["matrices"]}
    return {
        str(index): [float(matrix["notes"][-1]), matrix["loss"]]
        for index, matrix in sorted(last.items())
        if matrix["loss"] is not None
    }
