"""`secateur prune`: check, open, prune block by block, write, verify, measure."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import secateur
from secateur.checkpoint.check import check_finite, check_model_folder, hash_folder
from secateur.checkpoint.folder import OutputFolder, copy_side_files
from secateur.checkpoint.ledger import LEDGER, Ledger
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.source import Source, open_source
from secateur.checkpoint.writer import CheckpointWriter, Layout, layout_like
from secateur.engine.activations import ActivationStore
from secateur.engine.binding import Binding
from secateur.engine.blocks import Structure, find_structure
from secateur.engine.device import activation_limit, compute_dtype, parse_dtype, resolve_device, trim_memory
from secateur.engine.forward import probe_inputs, rehearse
from secateur.engine.plan import Plan, make_plan, plan_globally
from secateur.engine.sink import CheckpointSink, tensor_digest
from secateur.engine.skeleton import build_skeleton
from secateur.engine.stream import BlockStream
from secateur.errors import (
    CheckpointError,
    Interrupted,
    OutputError,
    RunError,
    SecateurError,
    UnsupportedModelError,
    UsageError,
    VerificationError,
    WeightValueError,
)
from secateur.plugins import Method, make_method
from secateur.progress import Recorder, Reporter
from secateur.recipe import Recipe
from secateur.result import RESULT_FILE, PrunedMatrix, PruneResult, write_json
from secateur.verbs.calibration import Calibration, Data, load_calibration
from secateur.verbs.card import write_card
from secateur.verbs.evaluate import read_files
from secateur.verbs.memory import as_source, take_over
from secateur.verbs.sides import measure_sides
from secateur.verify import Expected, verify


@dataclass
class _Job:
    """Everything a run needs, checked, before anything is written."""

    source: Source
    recipe: Recipe
    method: Method
    model: transformers.PreTrainedModel
    structure: Structure
    reader: CheckpointReader
    binding: Binding
    plan: Plan
    calibration: Calibration
    device: torch.device
    compute: torch.dtype
    dtype: torch.dtype | None
    source_hash: str


@dataclass
class _Written:
    """Results of all matrices, and what a verification must find on the disk."""

    matrices: list[PrunedMatrix]
    expected: Expected


def prune(
    model: str | Path | transformers.PreTrainedModel,
    out: str | Path | None = None,
    *,
    recipe: Recipe | None = None,
    method: str | Method | None = None,
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
        recipe: what to do; ``settings`` are fields of `Recipe` by name and win over it.
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
    chosen, recipe = _merge(recipe, method, settings)
    own_data = None if isinstance(calibration, str | Path) else calibration
    if evaluate:
        read_files(files)  # a line that cannot be read is refused now, not after the work
    with ExitStack() as stack:
        in_memory = model if isinstance(model, transformers.PreTrainedModel) else None
        in_place = out is None
        if in_memory is not None:
            if out is not None:
                OutputFolder(out, overwrite=overwrite, resume=resume)
            source, out = as_source(in_memory, tokenizer, out, stack)
        elif out is None:
            raise UsageError("prune needs an output folder", hint="give OUT: secateur.prune(model, 'out')")
        else:
            assert isinstance(model, str | Path)
            OutputFolder(out, overwrite=overwrite, resume=resume)  # refuse before anything is fetched
            source = open_source(model, reporter=recorder)
        folder = OutputFolder(out, overwrite=overwrite, resume=resume, source_folder=source.folder)
        job = _prepare(source, recipe, chosen, own_data, recorder, stack)
        layout = layout_like(job.reader, job.dtype)
        folder.require_space(layout.nbytes)
        stack.enter_context(folder)
        try:
            written = _write(job, folder.partial, layout, resume, recorder)
            peak, seconds = peak_rss_bytes(), time.monotonic() - started
            verification = _verified(folder.partial, written.expected, recorder) if verify else {}
            sides = measure_sides(
                source, folder.partial, skeleton=job.model, prunable=_prunable(job), evaluate=evaluate, data=data,
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
            recipe=recipe.to_dict() | {"method_options": _options(job.method)},
            sparsity=sides.after.sparsity,
            seconds=seconds,
            peak_rss_bytes=peak,
            before=sides.before,
            after=sides.after,
            verified=bool(verification),
            verdict=sides.verdict,
            protocol={
                **job.calibration.protocol,
                "compute_dtype": str(job.compute).removeprefix("torch."),
                "device": str(job.device),
                **sides.protocol,
            },
            verification=verification,
            matrices=written.matrices,
            warnings=recorder.warnings,
            versions=versions(),
            shards=dict(written.expected.shards),
        )
        write_card(folder.partial, pruned)
        write_json(folder.partial / RESULT_FILE, pruned.to_dict())
        folder.commit()
        if in_memory is not None and in_place:
            take_over(in_memory, Path(out), [matrix.name for matrix in written.matrices])
    return pruned


def _prunable(job: _Job) -> dict[str, int]:
    """Checkpoint key -> number of weights, for every tensor that may be pruned."""
    names = [matrix.name for matrix in job.structure.matrices]
    return {key: job.reader.info(key).numel for key in job.binding.keys_of(names)}


def _merge(
    recipe: Recipe | None, method: str | Method | None, settings: dict[str, Any]
) -> tuple[Method | None, Recipe]:
    """Lay keyword arguments over a recipe; a method object stands beside it, with its options noted in it."""
    values = recipe.to_dict() if recipe is not None else {}
    values.update(settings)
    if isinstance(method, str):
        if values.get("method") != method:
            values["method_options"] = settings.get("method_options", {})
        values["method"] = method
    elif method is not None:
        values["method"], values["method_options"] = getattr(method, "name", type(method).__name__), _options(method)
    chosen = method if method is not None and not isinstance(method, str) else None
    return chosen, Recipe.from_dict(values, where="prune")


def _options(method: Method) -> dict[str, Any]:
    options: Any = method
    fields = dataclasses.fields(options) if dataclasses.is_dataclass(options) else ()
    return {entry.name: getattr(options, entry.name) for entry in fields}


def _prepare(
    source: Source, recipe: Recipe, method: Method | None, data: Data | None, reporter: Recorder, stack: ExitStack
) -> _Job:
    """Open and check everything. Nothing is written here."""
    method = method or make_method(recipe.method, recipe.method_options)
    device = resolve_device(recipe.device)
    compute, dtype = compute_dtype(recipe.compute_dtype, device), parse_dtype(recipe.dtype, "dtype")
    activation_limit(recipe.activation_memory)
    check_model_folder(source.folder)
    model = build_skeleton(source.folder)
    reader = stack.enter_context(CheckpointReader(source.folder))
    binding = Binding(model, reader.keys)
    if binding.missing:
        raise CheckpointError(
            f"the checkpoint lacks {len(binding.missing)} weights of the model, the first is {binding.missing[0]}",
            hint="config.json names another architecture than the weights have",
        )
    structure = find_structure(model)
    plan = make_plan(recipe, structure)
    rehearse(model, structure, binding, reader)
    calibration = Calibration(protocol={"calibration": "none: the method needs no data"})
    if method.statistics != "none":
        calibration = load_calibration(recipe, model, source.folder, reporter, data=data, demo=source.kind == "demo")
    check_finite(reader, reporter)
    if dtype is not None:
        _check_fits(reader, dtype)
    digest = hash_folder(source.folder)
    trim_memory()  # tokenizer and text are no longer needed
    plan_globally(plan, method, recipe, structure, lambda name: binding.load([name], reader)[name])
    return _Job(
        source, recipe, method, model, structure, reader, binding, plan, calibration, device, compute, dtype, digest
    )


def _check_fits(reader: CheckpointReader, dtype: torch.dtype) -> None:
    """Refuse a number format in which a weight would become infinite."""
    for key in reader.keys:
        if reader.info(key).dtype.is_floating_point:
            for chunk in reader.chunks(key):
                if not torch.isfinite(chunk.to(dtype)).all():
                    name = str(dtype).removeprefix("torch.")
                    raise WeightValueError(f"{key} holds values too large for {name}", hint="use --dtype bfloat16")


def _write(job: _Job, partial: Path, layout: Layout, resume: bool, reporter: Recorder) -> _Written:
    """Prune block by block into the partial folder, and put everything beside the weights that a model needs."""
    keys_of = {block.index: job.binding.keys_of(block.tensors) for block in job.structure.blocks}
    ledger = Ledger.begin(partial / LEDGER, _fingerprint(job), resume=resume)
    limit = activation_limit(job.recipe.activation_memory)
    with CheckpointWriter(partial, layout, resume=resume) as writer:
        sink = CheckpointSink(job.reader, writer, ledger, keys_of)
        if sink.blocks_done:
            reporter.note(f"resuming: {sink.blocks_done} of {len(keys_of)} blocks are done")
        stream = BlockStream(
            job.model, job.structure, job.binding, job.reader, sink, job.method, job.plan,
            ActivationStore(limit, partial), job.device, job.compute, job.recipe.seed, reporter,
        )  # fmt: skip
        probe = job.calibration.probe or probe_inputs(job.model)
        result = stream.run(job.calibration.batches, probe)
        sink.copy_rest()
        shards = writer.finish()
    _tell_notes(result.matrices, reporter)
    copy_side_files(job.source.folder, partial)
    _write_config(job.source.folder, partial, job.dtype)
    return _Written(result.matrices, Expected(shards, sink.zeros, probe, result.probe, job.source.folder))


def _fingerprint(job: _Job) -> dict[str, Any]:
    """What must be the same for a run to be resumed: everything that changes a byte of the result."""
    recipe = job.recipe.to_dict() | {"method_options": _options(job.method)}
    recipe.pop("activation_memory")
    return {
        "recipe": recipe,
        "source_sha256": job.source_hash,
        "calibration": job.calibration.protocol,
        "calibration_sha256": _digest_of(job.calibration.batches),
        "config_sha256": hashlib.sha256((job.source.folder / "config.json").read_bytes()).hexdigest(),
        "device": str(job.device),
        "compute_dtype": str(job.compute),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _digest_of(batches: Sequence[Mapping[str, torch.Tensor]]) -> str:
    """Hex sha256 of all calibration inputs: the same text, cut by the same tokenizer."""
    digests = [f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:{tensor_digest(tensor.cpu())}" for batch in batches
               for name, tensor in sorted(batch.items())]  # fmt: skip
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _write_config(source: Path, partial: Path, dtype: torch.dtype | None) -> None:
    """The config as it is; only the number format changes when another one was asked for."""
    text = (source / "config.json").read_text(encoding="utf-8")
    if dtype is not None:
        config = json.loads(text)
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        text = json.dumps(config, indent=2) + "\n"
    (partial / "config.json").write_text(text, encoding="utf-8")


def _tell_notes(matrices: Sequence[PrunedMatrix], reporter: Reporter) -> None:
    """What methods reported, each kind once with a count; the result file has them matrix by matrix."""
    seen: dict[str, list[str]] = {}
    for matrix in matrices:
        for note in matrix.notes:
            seen.setdefault(note, []).append(matrix.name)
    for note, names in list(seen.items())[:10]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        reporter.warn(f"{names[0]}{more}: {note}")
    if len(seen) > 10:
        reporter.warn(f"{len(seen) - 10} more notes are in {RESULT_FILE}")


def _verified(folder: Path, expected: Expected, reporter: Reporter) -> dict[str, Any]:
    reporter.stage("verifying", 1)
    checked = verify(folder, expected, reporter)
    reporter.advance()
    return checked


def peak_rss_bytes() -> int:
    """Most memory that this process has had resident."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Versions of everything that may change a bit of a result."""
    from importlib.metadata import version

    names = ("torch", "transformers", "safetensors")
    python = ".".join(map(str, sys.version_info[:3]))
    return {"secateur": secateur.__version__, "python": python, **{name: version(name) for name in names}}


def provenance(model: Any, source: Source, digest: str) -> dict[str, Any]:
    """Where the weights came from: enough to open the dense model again and to see that it is the same."""
    given = "" if source.kind == "memory" else str(model)
    if source.kind in ("folder", "gguf"):
        given = str(Path(given).expanduser().resolve())
    entries = {key: value for key, value in dataclasses.asdict(source).items() if key != "folder"}
    return {**entries, "model": given, "sha256": digest}
