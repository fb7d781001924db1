"""`secateur recover`: train quality back into a pruned model, with its zeros held, and prove that they were."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from secateur.checkpoint.check import check_finite, check_model_folder, hash_folder
from secateur.checkpoint.folder import OutputFolder, copy_side_files
from secateur.checkpoint.ledger import LEDGER, Ledger
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.source import Source, open_source, places_of
from secateur.corpus.load import load_text
from secateur.engine.binding import Binding
from secateur.engine.blocks import find_structure
from secateur.engine.device import compute_dtype, resolve_device
from secateur.engine.skeleton import build_skeleton
from secateur.errors import (
    Interrupted,
    OutputError,
    RunError,
    SecateurError,
    UsageError,
    VerificationError,
)
from secateur.processes import FailedElsewhere, Processes
from secateur.progress import Recorder, Reporter
from secateur.recovery.arguments import check_launch, local_device
from secateur.recovery.trainer import last_checkpoint
from secateur.result import RESULT_FILE, Measured, RecoverResult, write_json
from secateur.training import Training
from secateur.verbs.asked import tell_unmeasured
from secateur.verbs.card import write_recovery_card
from secateur.verbs.evaluate import read_files
from secateur.verbs.lesson import Lesson, plan_lesson
from secateur.verbs.memory import as_source
from secateur.verbs.provenance import made_from, peak_rss_bytes, provenance, versions
from secateur.verbs.sides import measured_model
from secateur.verbs.taught import Taught, count_zeros
from secateur.verbs.teach import teach
from secateur.verbs.teach_blocks import teach_blocks
from secateur.verbs.verdict import recovery_sentences
from secateur.verify import Expected, verify


@dataclass
class _Opened:
    """The pruned model and what its result file says."""

    source: Source
    skeleton: transformers.PreTrainedModel
    sha256: str
    result: dict[str, Any]


def recover(
    model: str | Path | transformers.PreTrainedModel,
    out: str | Path,
    *,
    settings: Training | None = None,
    tokenizer: Any = None,
    dense: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    evaluate: bool = True,
    measure_data: str = "builtin",
    files: Sequence[str | Path] = (),
    reporter: Reporter | None = None,
    **values: Any,
) -> RecoverResult:
    """Train a pruned model and write it as an ordinary Hugging Face folder, its zeros where they were.

    Started by torchrun or accelerate launch, the processes train together; each gets the result.

    Args:
        model: the pruned model: a folder, hub id, ``.gguf`` file, ``demo`` or ``demo-encoder``; or one in memory, which
            stays as it is, and whose teacher must be named (``teacher="dense"``).
        out: folder to write.
        settings: how to train; ``values`` are fields of `Training` by name and win over it.
        tokenizer: that of a model in memory.
        dense: go on although the model has no zeros to hold.
        resume: go on with the run that left ``OUT.partial``.
        overwrite: replace an existing OUT, and discard a left-over ``OUT.partial``.
        verify: open the result in a fresh process and compare it with what was made.
        evaluate: measure quality before and after (and the teacher's).
        measure_data: text to measure perplexity on.
        files: JSONL files to measure accuracy on.

    Raises:
        SecateurError: bad input (nothing was written), a run that failed part-way (it can be resumed), or a result that
            did not pass its verification.
    """
    processes = Processes.meet()
    with processes.together():
        given = settings.to_dict() if settings is not None else {}
        asked = _Asked(
            model, Path(out), Training.from_dict({**given, **values}), tokenizer, dense, resume, overwrite, verify,
            evaluate, measure_data, files,
        )  # fmt: skip
        return _recover(asked, processes, Recorder(reporter if processes.first else None))


@dataclass(frozen=True)
class _Asked:
    """The arguments of `recover`."""

    model: str | Path | transformers.PreTrainedModel
    out: Path
    settings: Training
    tokenizer: Any
    dense: bool
    resume: bool
    overwrite: bool
    verify: bool
    evaluate: bool
    measure_data: str
    files: Sequence[str | Path]

    def folder(self, *sources: Path) -> OutputFolder:
        return OutputFolder(self.out, overwrite=self.overwrite, resume=self.resume, sources=sources)


def _recover(asked: _Asked, processes: Processes, recorder: Recorder) -> RecoverResult:
    """Every process comes through here; the first alone writes, verifies and measures."""
    started = time.monotonic()
    chosen = asked.settings
    with ExitStack() as stack:
        check_launch(chosen.trainer, chosen.mode, processes.count)
        if processes.first:
            asked.folder()  # refuse before anything is fetched
        opened = _open(asked, recorder, stack)
        device = local_device(resolve_device(chosen.device), processes.count)
        dtype = compute_dtype(chosen.compute_dtype, device)
        _check_measuring(asked, opened.skeleton, recorder)
        lesson = plan_lesson(
            chosen, opened.source, opened.skeleton, opened.sha256, opened.result, recorder, processes.count
        )
        blocks = chosen.mode == "blocks"
        zeros = count_zeros(opened.source, opened.skeleton)
        smaller = bool(opened.result.get("shape_changes") or opened.result.get("blocks_kept"))
        if not zeros and smaller and not asked.dense:
            recorder.note("whole units were removed: there are no zeros to hold, and all weights may change")
        elif not zeros and not asked.dense:
            raise UsageError(
                f"{opened.source.name} has no zeros: there is no pattern to hold",
                hint="prune it first, or train it as it is with --dense",
            )
        elif zeros and asked.dense:
            recorder.warn(f"--dense has no effect: {opened.source.name} has {zeros:,} zeros, and they are held")
        fingerprint = _fingerprint(chosen, opened, lesson, device, dtype)
        _check_same(processes.gather(fingerprint))
        read = [opened.source.folder, *made_from(opened.result)]
        if isinstance(asked.model, str | Path):
            read += places_of(asked.model)
        if lesson.teacher is not None:
            read.append(lesson.teacher.source.folder)
        folder = asked.folder(*read) if processes.first else None
        if folder is not None:
            folder.require_space(_bytes_needed(opened.source.folder, chosen))
            stack.enter_context(folder)
        try:
            partial = _shared(folder, processes)
            ledger = Ledger.begin(partial / LEDGER, fingerprint, resume=asked.resume) if processes.first else None
            taught: Taught | None
            if ledger is not None and blocks:
                taught = teach_blocks(lesson, opened.source, zeros, partial, device, dtype, ledger, recorder)
            else:
                taught = teach(
                    lesson, opened.source, opened.skeleton, partial, device, dtype, ledger, processes, recorder
                )
            if folder is None or taught is None:
                return _received(processes.on_first(dict))
            seconds = time.monotonic() - started
            copy_side_files(opened.source.folder, partial)
            result = _result(asked, opened, lesson, taught, partial, device, dtype, seconds, recorder)
        except KeyboardInterrupt:
            place = asked.out.with_name(asked.out.name + ".partial")
            kept = last_checkpoint(place / "trainer") is not None or (blocks and Ledger.any_step(place / LEDGER))
            raise Interrupted(
                f"stopped; what was done is kept in {place.name}" if kept else "stopped before the first checkpoint",
                hint="go on with the same command and --resume"
                + ("" if kept else ", which starts from the first step; --save-minutes says how often one is made"),
            ) from None
        except (RunError, VerificationError):
            raise
        except (SecateurError, FailedElsewhere) as error:
            if folder is None or (isinstance(error, OutputError) and asked.resume):
                raise  # the first decides; and this run was not taken up at all
            started_already = last_checkpoint(folder.partial / "trainer") or (
                blocks and Ledger.any_step(folder.partial / LEDGER)
            )
            if not (asked.resume or started_already):
                folder.discard()
            elif isinstance(error, SecateurError):
                raise RunError(error.message, hint=f"{error.hint}; --resume goes on") from error
            raise
        write_recovery_card(partial, result)
        write_json(partial / RESULT_FILE, result.to_dict())
        try:
            out = folder.commit()
        except OutputError as error:  # the work is done: nothing was refused
            raise RunError(error.message, hint=error.hint) from error
        _tidy(out)
        processes.on_first(result.to_dict)
    return result


def _result(
    asked: _Asked, opened: _Opened, lesson: Lesson, taught: Taught, partial: Path, device: torch.device,
    dtype: torch.dtype, seconds: float, recorder: Recorder,
) -> RecoverResult:  # fmt: skip
    """Verify and measure what was made."""
    peak = peak_rss_bytes()
    verification = _verified(partial, opened.source.folder, taught, recorder) if asked.verify else {}
    folders = {"before": opened.source.folder, "after": partial}
    if lesson.teacher is not None:
        folders["teacher"] = lesson.teacher.source.folder
    prunable = {**_prunable(opened), **taught.prunable}  # a new head may have renamed the keys
    measured: dict[str, Measured] = {}
    protocol: dict[str, Any] = {}
    for side, place in folders.items():
        measured[side], protocol = _measured(place, prunable, lesson, asked, recorder)
    student = provenance(asked.model, opened.source, opened.sha256)
    conversion = opened.result.get("conversion") or (opened.result.get("student") or {}).get("conversion")
    student |= {"conversion": conversion} if conversion else {}
    return RecoverResult(
        out=str(asked.out),
        source=opened.result.get("source") or student,
        student=student,
        settings=asked.settings.to_dict(),
        sparsity=measured["after"].sparsity,
        seconds=seconds,
        peak_rss_bytes=peak,
        teacher=measured.get("teacher"),
        before=measured["before"],
        after=measured["after"],
        training=taught.report,
        zeros_held=taught.zeros_held,
        verified=bool(verification),
        verdict=recovery_sentences(
            measured.get("teacher"), measured["before"], measured["after"], taught.report,
            checked=bool(verification) or asked.settings.mode != "blocks",  # the other modes look as they write
        ),
        protocol={**lesson.protocol, "compute_dtype": str(dtype).removeprefix("torch."), "device": str(device),
                  "quality": protocol},
        verification=verification,
        warnings=recorder.warnings,
        versions=versions(),
        shards=dict(taught.shards),
    )  # fmt: skip


def _received(data: dict[str, Any]) -> RecoverResult:
    """The result that the first process has sent."""
    sides = {side: Measured(**data[side]) for side in ("before", "after", "teacher") if data[side] is not None}
    return RecoverResult(**{**data, **sides})


def _shared(folder: OutputFolder | None, processes: Processes) -> Path:
    """The folder that the first process works in, as this one sees it.

    Raises:
        OutputError: when it does not.
    """
    partial = Path(processes.on_first(lambda: str(folder.partial if folder is not None else "")))
    if not partial.is_dir():
        raise OutputError(
            f"process {processes.rank} does not see {partial}, which the first process has made",
            hint="choose an output folder on a disk that all machines share",
        )
    return partial


def _check_same(fingerprints: Sequence[dict[str, Any]]) -> None:
    """See that all processes read the same: on several machines the same name may be another model or text.

    Raises:
        UsageError: naming what differs.
    """
    first = fingerprints[0]
    for rank, other in enumerate(fingerprints):
        differing = sorted(key for key in first if other[key] != first[key] and key not in ("device", "threads"))
        if differing:
            raise UsageError(
                f"process {rank} does not read what the first one reads: {', '.join(differing)} differ",
                hint="give the same model, data and versions on all machines",
            )


def _open(asked: _Asked, reporter: Reporter, stack: ExitStack) -> _Opened:
    if isinstance(asked.model, str | Path):
        source = open_source(asked.model, reporter=reporter)
    elif asked.tokenizer is None:
        raise UsageError("a model in memory needs its tokenizer", hint="recover(model, out, tokenizer=...)")
    else:
        source, _ = as_source(asked.model, asked.tokenizer, asked.out, stack)
    check_model_folder(source.folder)
    skeleton = build_skeleton(source.folder)
    with CheckpointReader(source.folder) as reader:
        check_finite(reader, reporter)
    path = source.folder / RESULT_FILE
    result: dict[str, Any] = {}
    if path.is_file():
        try:
            result = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, OSError):
            reporter.warn(f"{path} cannot be read: the teacher must be named with --teacher")
    return _Opened(source, skeleton, hash_folder(source.folder), result)


def _measured(
    place: Path, prunable: dict[str, int], lesson: Lesson, asked: _Asked, reporter: Reporter
) -> tuple[Measured, dict[str, Any]]:  # fmt: skip
    """One side; what cannot be measured after a long training is told, and the training is kept."""
    length = lesson.length if lesson.task == "language" else None
    data = asked.measure_data
    try:
        return measured_model(
            place, prunable, data=data, files=asked.files, evaluate=asked.evaluate, length=length, reporter=reporter
        )
    except Interrupted:
        raise
    except SecateurError as error:
        reporter.warn(f"the quality of {place.name} was not measured: {error.message}")
        return measured_model(place, prunable, data=data, files=(), evaluate=False, length=None, reporter=reporter)


def _check_measuring(asked: _Asked, skeleton: transformers.PreTrainedModel, reporter: Reporter) -> None:
    """Refuse measuring data that cannot be read before hours of training, not after them."""
    text = None if asked.measure_data == "builtin" else asked.measure_data
    tell_unmeasured({"measure_data": text, "files": asked.files}, asked.evaluate, skeleton, reporter)
    if asked.evaluate:
        load_text(asked.measure_data, "measure")
        read_files(asked.files)


def _prunable(opened: _Opened) -> dict[str, int]:
    """Checkpoint key -> number of weights of every prunable tensor of the pruned model."""
    with CheckpointReader(opened.source.folder) as reader:
        names = [matrix.name for matrix in find_structure(opened.skeleton).matrices]
        return {key: reader.info(key).numel for key in Binding(opened.skeleton, reader.keys).keys_of(names)}


def _bytes_needed(folder: Path, settings: Training) -> int:
    """The result, and for training with the whole graph two checkpoints of weights and optimiser in float32."""
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if settings.mode != "full":
        return 2 * weights
    numbers: int = sum(parameter.numel() for parameter in build_skeleton(folder).parameters())
    return weights + 2 * 3 * 4 * numbers


def _fingerprint(
    settings: Training, opened: _Opened, lesson: Lesson, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """What must be the same for a run to be resumed: everything that changes a bit of the result."""
    recipe = settings.to_dict()
    recipe.pop("save_minutes")
    return {
        **recipe,  # one key each, so that a refusal names the setting that differs
        "source_sha256": opened.sha256,
        "config_sha256": hashlib.sha256((opened.source.folder / "config.json").read_bytes()).hexdigest(),
        "teacher_sha256": lesson.teacher.sha256 if lesson.teacher else None,
        "teacher_config_sha256": lesson.teacher.config_sha256 if lesson.teacher else None,
        "data_sha256": lesson.digest,
        "processes": lesson.processes,
        "device": str(device),
        "compute_dtype": str(dtype),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _verified(folder: Path, source: Path, taught: Taught, reporter: Reporter) -> dict[str, Any]:
    reporter.stage("verifying", 1)
    expected = Expected(taught.shards, taught.zeros, taught.probe, taught.answer)
    checked = verify(folder, expected, reporter)
    checked["zeros_held"] = taught.check(folder, source)
    reporter.advance()
    return checked


def _tidy(out: Path) -> None:
    """Trainer checkpoints are of no use once the result is whole and has its name."""
    shutil.rmtree(out / "trainer", ignore_errors=True)
