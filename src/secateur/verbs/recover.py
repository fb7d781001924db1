"""`secateur recover`: train quality back into a pruned model, with its zeros held, and prove that they were."""

from __future__ import annotations

import hashlib
import json
import os
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
from secateur.checkpoint.source import Source, open_source
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
from secateur.progress import Recorder, Reporter
from secateur.recovery.trainer import last_checkpoint
from secateur.result import RESULT_FILE, Measured, RecoverResult, write_json
from secateur.training import Training
from secateur.verbs.card import write_recovery_card
from secateur.verbs.evaluate import read_files
from secateur.verbs.lesson import Lesson, plan_lesson
from secateur.verbs.provenance import peak_rss_bytes, provenance, versions
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
    model: str | Path,
    out: str | Path,
    *,
    settings: Training | None = None,
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

    Args:
        model: the pruned model: a folder, hub id, ``.gguf`` file, ``demo`` or ``demo-encoder``.
        out: folder to write.
        settings: how to train; ``values`` are fields of `Training` by name and win over it.
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
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "recover runs in one process",
            hint="start it without a launcher; use SparsityCallback in a Trainer of yours",
        )
    started = time.monotonic()
    recorder = Recorder(reporter)
    given = settings.to_dict() if settings is not None else {}
    chosen = Training.from_dict({**given, **values})
    with ExitStack() as stack:
        OutputFolder(out, overwrite=overwrite, resume=resume)  # refuse before anything is fetched
        opened = _open(model, recorder)
        folder = OutputFolder(out, overwrite=overwrite, resume=resume, source_folder=opened.source.folder)
        device = resolve_device(chosen.device)
        dtype = compute_dtype(chosen.compute_dtype, device)
        _check_measuring(evaluate, measure_data, files)
        lesson = plan_lesson(chosen, opened.source, opened.skeleton, opened.sha256, opened.result, recorder)
        blocks = chosen.mode == "blocks"
        zeros = count_zeros(opened.source, opened.skeleton)
        if not zeros and not dense:
            raise UsageError(
                f"{opened.source.name} has no zeros: there is no pattern to hold",
                hint="prune it first, or train it as it is with --dense",
            )
        folder.require_space(_bytes_needed(opened.source.folder, chosen))
        stack.enter_context(folder)
        try:
            fingerprint = _fingerprint(chosen, opened, lesson, device, dtype)
            ledger = Ledger.begin(folder.partial / LEDGER, fingerprint, resume=resume)
            where = folder.partial, device, dtype, ledger, recorder
            if blocks:
                taught = teach_blocks(lesson, opened.source, zeros, *where)
            else:
                taught = teach(lesson, opened.source, opened.skeleton, *where)
            copy_side_files(opened.source.folder, folder.partial)
            peak, seconds = peak_rss_bytes(), time.monotonic() - started
            verification = _verified(folder.partial, opened.source.folder, taught, recorder) if verify else {}
            folders = {"before": opened.source.folder, "after": folder.partial}
            if lesson.teacher is not None:
                folders["teacher"] = lesson.teacher.source.folder
            prunable = {**_prunable(opened), **taught.prunable}  # a new head may have renamed the keys
            measured: dict[str, Measured] = {}
            protocol: dict[str, Any] = {}
            for side, place in folders.items():
                measured[side], protocol = _measured(place, prunable, lesson, evaluate, measure_data, files, recorder)
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped; the last checkpoint is kept in {folder.partial}",
                hint="go on with the same command and --resume",
            ) from None
        except (RunError, VerificationError):
            raise
        except SecateurError as error:
            if isinstance(error, OutputError) and resume:
                raise  # the run was not taken up at all
            started_already = last_checkpoint(folder.partial / "trainer") or (
                chosen.mode == "blocks" and Ledger.any_step(folder.partial / LEDGER)
            )
            if resume or started_already:
                raise RunError(error.message, hint=f"{error.hint}; --resume goes on") from error
            folder.discard()
            raise
        result = RecoverResult(
            out=str(out),
            source=opened.result.get("source") or provenance(model, opened.source, opened.sha256),
            student=provenance(model, opened.source, opened.sha256),
            settings=chosen.to_dict(),
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
                measured.get("teacher"), measured["before"], measured["after"], taught.report
            ),
            protocol={**lesson.protocol, "compute_dtype": str(dtype).removeprefix("torch."), "device": str(device),
                      "quality": protocol},
            verification=verification,
            warnings=recorder.warnings,
            versions=versions(),
            shards=dict(taught.shards),
        )  # fmt: skip
        write_recovery_card(folder.partial, result)
        write_json(folder.partial / RESULT_FILE, result.to_dict())
        _tidy(folder.partial)
        folder.commit()
    return result


def _open(model: str | Path, reporter: Reporter) -> _Opened:
    source = open_source(model, reporter=reporter)
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
    place: Path, prunable: dict[str, int], lesson: Lesson, evaluate: bool, data: str, files: Sequence[str | Path],
    reporter: Reporter,
) -> tuple[Measured, dict[str, Any]]:  # fmt: skip
    """One side; what cannot be measured after a long training is told, and the training is kept."""
    length = lesson.length if lesson.task == "language" else None
    try:
        return measured_model(
            place, prunable, data=data, files=files, evaluate=evaluate, length=length, reporter=reporter
        )
    except Interrupted:
        raise
    except SecateurError as error:
        reporter.warn(f"the quality of {place.name} was not measured: {error.message}")
        return measured_model(place, prunable, data=data, files=(), evaluate=False, length=None, reporter=reporter)


def _check_measuring(evaluate: bool, data: str, files: Sequence[str | Path]) -> None:
    """Refuse measuring data that cannot be read before hours of training, not after them."""
    if evaluate:
        load_text(data, "measure")
        read_files(files)


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


def _tidy(partial: Path) -> None:
    """Trainer checkpoints are of no use once the result is whole."""
    shutil.rmtree(partial / "trainer", ignore_errors=True)
