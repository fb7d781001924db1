"""`secateur prune`: check, open, prune block by block, write, verify, measure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers

from secateur.checkpoint.folder import OutputFolder
from secateur.checkpoint.ledger import LEDGER, Ledger
from secateur.checkpoint.source import open_source, places_of
from secateur.errors import (
    Interrupted,
    OutputError,
    RunError,
    SecateurError,
    UnsupportedModelError,
    UsageError,
    VerificationError,
)
from secateur.plugins import Chooser
from secateur.progress import Recorder, Reporter
from secateur.recipe import Recipe
from secateur.result import RESULT_FILE, PlanResult, PruneResult, write_json
from secateur.verbs.asked import (
    combination_sentences,
    merge,
    tell_combination,
    tell_seed,
    tell_unmeasured,
    tell_unread,
)
from secateur.verbs.calibration import Data
from secateur.verbs.card import write_card
from secateur.verbs.dividing import allocation_sentences, asked_of_each
from secateur.verbs.evaluate import read_files
from secateur.verbs.job import prepare, write
from secateur.verbs.memory import as_source, take_over
from secateur.verbs.provenance import peak_rss_bytes, provenance, versions
from secateur.verbs.sides import check_measurable, measure_sides
from secateur.verbs.verdict import (
    correction_sentences,
    permutation_sentences,
    reconstruction_sentences,
    refit_sentences,
    rounding_sentences,
)
from secateur.verify import Expected
from secateur.verify import verify as verify_folder


def prune(
    model: str | Path | transformers.PreTrainedModel,
    out: str | Path | None = None,
    *,
    recipe: Recipe | None = None,
    method: str | Chooser | None = None,
    calibration: str | Path | Data | None = None,
    tokenizer: Any = None,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    evaluate: bool = True,
    data: str = "builtin",
    files: Sequence[str | Path] = (),
    prompt: str | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> PruneResult:
    """Prune a model and write an ordinary Hugging Face folder.

    Args:
        model: a folder, a hub id, a ``.gguf`` file, ``demo``, or a model in memory (which needs ``tokenizer`` when the
            method needs calibration text).
        out: folder to write; None prunes a model in memory in place.
        recipe: what to do; ``settings`` are fields of `Recipe` by name and win over it. A ``seed`` among them that
            changes nothing is told; in a recipe, which may be one for many runs, it does no harm.
        method: a name, or a method object such as ``Wanda()``.
        calibration: as in the recipe, or token ids (n, L), or a list of forward arguments.
        resume: go on with the run that left ``OUT.partial``.
        overwrite: replace an existing OUT, and discard a left-over ``OUT.partial``.
        verify: open the result in a fresh process and compare it with what was made.
        evaluate: measure quality, memory and speed before and after.
        data: text to measure perplexity on.
        files: JSONL files of minimal pairs or multiple choice to measure accuracy on.
        prompt: text that both models continue.

    Raises:
        SecateurError: bad input (nothing was written), a run that failed part-way (it can be resumed), or a result that
            did not pass its verification.
    """
    started = time.monotonic()
    recorder = Recorder(reporter)
    if isinstance(calibration, str | Path):
        settings["calibration"] = str(calibration)
    chosen, recipe = merge(recipe, method, settings)
    own_data = None if isinstance(calibration, str | Path) else calibration
    if evaluate:
        read_files(files)  # a line that cannot be read is refused now, not after the work
    with ExitStack() as stack:
        in_memory = model if isinstance(model, transformers.PreTrainedModel) else None
        in_place = out is None
        named: list[Path] = []
        if in_place and in_memory is not None and recipe.structure:
            raise UsageError("a model in memory cannot become smaller in place", hint="give OUT, and load it")
        if in_place and in_memory is not None and recipe.bits is not None and in_memory.dtype != torch.float32:
            kind = str(in_memory.dtype).removeprefix("torch.")
            raise UsageError(f"weights of {recipe.bits} bits are not exact in {kind}, in place", hint="give OUT")
        if in_memory is not None:
            if out is not None:
                OutputFolder(out, overwrite=overwrite, resume=resume)
            source, out = as_source(in_memory, tokenizer, out, stack)
        elif out is None:
            raise UsageError("prune needs an output folder", hint="give OUT: secateur.prune(model, 'out')")
        else:
            assert isinstance(model, str | Path)
            named += places_of(model)
            OutputFolder(out, overwrite=overwrite, resume=resume, sources=named)  # refuse before anything is fetched
            source = open_source(model, reporter=recorder)
        folder = OutputFolder(out, overwrite=overwrite, resume=resume, sources=[source.folder, *named])
        resumed = Ledger.header(folder.partial / LEDGER) if resume else None
        tell_combination(recipe, recorder)
        job = prepare(source, recipe, chosen, own_data, recorder, stack, resumed)
        text = None if data == "builtin" else data
        tell_unmeasured({"data": text, "files": files, "prompt": prompt}, evaluate, job.model, recorder)
        for name in recipe.unused:
            recorder.warn(f"--{name.replace('_', '-')} has no effect with --structure {','.join(recipe.structure)}")
        if "seed" in settings:
            tell_seed(recipe, job.method, recorder)
        if not job.calibration_read:
            tell_unread(recipe, own_data is not None, evaluate, f"method {recipe.method}", recorder)
        if evaluate:
            check_measurable(job.model, data)
        folder.require_space(job.layout.nbytes)
        stack.enter_context(folder)
        try:
            written = write(job, folder.partial, resume, recorder)
            peak, seconds = peak_rss_bytes(), time.monotonic() - started
            verification = _verified(folder.partial, written.expected, recorder) if verify else {}
            sides = measure_sides(
                source, folder.partial, skeleton=job.model, prunable=job.prunable, evaluate=evaluate, data=data,
                files=files, prompt=prompt, recipe=recipe, demo=source.kind == "demo", reporter=recorder,
            )  # fmt: skip
        except KeyboardInterrupt:
            if in_place:
                raise
            raise Interrupted(
                f"stopped; finished blocks are kept in {folder.partial}",
                hint="go on with the same command and --resume",
            ) from None
        except (RunError, VerificationError):
            raise
        except OSError as error:
            raise _not_written(error, folder.partial) from error
        except SecateurError as error:
            # Found out only while running. What no later run could use is removed; finished blocks are kept.
            if isinstance(error, OutputError) and resume:
                raise  # the run was not taken up at all
            useless = isinstance(error, UnsupportedModelError) or not Ledger.any_step(folder.partial / LEDGER)
            if useless and not resume:
                folder.discard()
                raise
            raise RunError(error.message, hint=f"{error.hint}; finished blocks are kept, --resume goes on") from error
        pruned = PruneResult(
            out="" if in_place else str(out),
            source=provenance(model, source, job.source_hash),
            recipe=recipe.to_dict() | {"method_options": job.method_options},
            sparsity=sides.after.sparsity if job.removed is None else job.removed,
            seconds=seconds,
            peak_rss_bytes=peak,
            before=sides.before,
            after=sides.after,
            verified=bool(verification),
            verdict=[
                *sides.verdict,
                *combination_sentences(recipe),
                *allocation_sentences(written.matrices, recipe),
                *permutation_sentences(written.matrices),
                *refit_sentences(written.matrices, recipe.refit),
                *rounding_sentences(written.matrices, recipe.bits, recipe.columns_of_scale),
                *correction_sentences(written.matrices),
                *reconstruction_sentences(written.matrices),
            ],
            protocol={
                **(job.calibration.protocol if recipe.structure else job.calibration_protocol),
                "compute_dtype": str(job.compute).removeprefix("torch."),
                "device": str(job.device),
                **sides.protocol,
            },
            verification=verification,
            matrices=written.matrices,
            blocks_kept=job.shape.depth.kept if job.shape.depth else None,
            channels_kept=job.choices.keep.tolist() if job.choices.keep is not None else None,
            shape_changes=job.shape_changes,
            budget=job.shape.split.record if job.shape.split else None,
            allocation=asked_of_each(job.plan),
            warnings=recorder.warnings,
            versions=versions(),
            shards=dict(written.expected.shards),
        )
        try:
            write_card(folder.partial, pruned)
            write_json(folder.partial / RESULT_FILE, pruned.to_dict())
        except OSError as error:
            raise _not_written(error, folder.partial) from error
        folder.commit()
        if in_memory is not None and in_place:
            names = [matrix.name for matrix in written.matrices]
            if recipe.reconstruct != "none":  # norms and biases learned as well
                held = dict(in_memory.named_parameters())
                names = [name for block in job.structure.blocks for name in block.tensors if name in held]
            take_over(in_memory, Path(out), names)
    return pruned


def _not_written(error: OSError, partial: Path) -> RunError:
    """A file beside the weights could not be written, most likely for want of space."""
    return RunError(
        f"{error.filename or partial}: {error.strerror or error}",
        hint="finished blocks are kept; free some space, and go on with the same command and --resume",
    )


def plan(model: str | Path, *, recipe: Recipe, reporter: Reporter | None = None) -> PlanResult:
    """What a structured pruning would remove, found and proved as `prune` does it; nothing is written.

    Raises:
        UsageError: for a recipe without a structure or budget.
        SecateurError: whatever `prune` would refuse.
    """
    if not recipe.structure:
        raise UsageError("a plan needs a structure", hint="give --structure ffn, for example, or --budget")
    recorder = Recorder(reporter)
    with ExitStack() as stack:
        job = prepare(open_source(model, reporter=recorder), recipe, None, None, recorder, stack)
        before, after = (sum(side.values()) for side in job.prunable)
        return PlanResult(
            lines=job.shape.lines,
            removed=1 - after / before,
            weights_before=before,
            weights_after=after,
            blocks_kept=job.shape.depth.kept if job.shape.depth else None,
            units=job.shape.units,
            shape_changes=job.shape_changes,
            budget=job.shape.split.record if job.shape.split else None,
        )


def _verified(folder: Path, expected: Expected, reporter: Reporter) -> dict[str, Any]:
    reporter.stage("verifying", 1)
    checked = verify_folder(folder, expected, reporter)
    reporter.advance()
    return checked
