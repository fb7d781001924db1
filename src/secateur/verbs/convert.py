"""`secateur convert`: make a model cheaper by other means than zeros, write it, verify and measure it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoint.folder import OutputFolder
from secateur.checkpoint.ledger import LEDGER, Ledger
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.source import Source, open_source, places_of
from secateur.conversions.factorized import Factorized
from secateur.conversions.fused import Fused
from secateur.conversions.moe import Moe
from secateur.conversions.relu import Relu
from secateur.conversions.shared import Shared
from secateur.converting import factorized, moe
from secateur.converting.delta import apply_delta, write_delta
from secateur.converting.fused import FuseWork
from secateur.converting.opened import Converted, Opened, Work, open_model
from secateur.converting.relu import ReluWork
from secateur.converting.shared import IterateWork, ShareWork, shared_spec
from secateur.errors import Interrupted, OutputError, RunError, SecateurError, UsageError, VerificationError
from secateur.layers.spec import Spec
from secateur.plugins import build, load_class
from secateur.progress import Recorder, Reporter
from secateur.recipe import Recipe
from secateur.result import RESULT_FILE, ConvertResult, Measured, write_json
from secateur.verbs.asked import tell_unmeasured, tell_unread
from secateur.verbs.calibration import Calibration, Data, load_calibration
from secateur.verbs.card import write_conversion_card
from secateur.verbs.evaluate import read_files
from secateur.verbs.fingerprint import digest_of
from secateur.verbs.provenance import peak_rss_bytes, provenance, versions
from secateur.verbs.sides import Sides, check_measurable, measure_sides
from secateur.verbs.verdict import conversion_sentences
from secateur.verify import Expected
from secateur.verify import verify as verify_folder

Conversion = Factorized | Fused | Moe | Relu | Shared
SETTINGS = ("targets", "ignore", "calibration", "samples", "sequence_length", "seed", "device", "dtype",
            "compute_dtype", "activation_memory")  # fmt: skip
"""Fields of a recipe that a conversion looks at."""
DRAWING = (Moe.name,)
"""Conversions that draw something at random, and look at the seed."""


def convert(
    model: str | Path,
    out: str | Path,
    *,
    to: str | Conversion,
    calibration: str | Path | Data | None = None,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    evaluate: bool = True,
    data: str = "builtin",
    files: Sequence[str | Path] = (),
    prompt: str | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> ConvertResult:
    """Convert a model and write a folder that opens with transformers where secateur is imported.

    Args:
        model: a folder, a hub id, a ``.gguf`` file or ``demo``; the folder of a delta, when one is applied.
        out: folder to write.
        to: name of a conversion, or an object such as ``Factorized(rank=64)``.
        calibration: as in a recipe, or token ids (n, L), or a list of forward arguments.
        settings: options of the conversion by name, and the fields of `Recipe` that are in ``SETTINGS``.
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
    own_data = None if isinstance(calibration, str | Path) else calibration
    if isinstance(calibration, str | Path):
        settings["calibration"] = str(calibration)
    seeded = "seed" in settings
    recipe = Recipe.from_dict({name: settings.pop(name) for name in SETTINGS if name in settings}, where="convert")
    conversion = make_conversion(to, settings)
    if seeded and conversion.name not in DRAWING:
        recorder.warn(f"--seed has no effect: conversion {conversion.name} draws nothing at random")
    if evaluate:
        read_files(files)
    delta = isinstance(conversion, Fused) and conversion.format == "delta"
    if delta and resume:
        raise UsageError("a delta is written in one go: there is nothing to resume", hint="start again, --overwrite")
    with ExitStack() as stack:
        base = conversion.base if isinstance(conversion, Fused) else None
        others = conversion.models if isinstance(conversion, Fused) else ()
        named = [place for one in (model, *others, *([base] if base else [])) for place in places_of(one)]
        OutputFolder(out, overwrite=overwrite, resume=resume, sources=named)  # refuse before anything is fetched
        source = open_source(base or model, reporter=recorder)
        folder = OutputFolder(out, overwrite=overwrite, resume=resume, sources=[source.folder, *named])
        opened, spec = _open(conversion, source, recipe, recorder, stack)
        if evaluate and not delta:
            text = None if data == "builtin" else data
            tell_unmeasured({"data": text, "files": files, "prompt": prompt}, evaluate, opened.model, recorder)
            check_measurable(opened.model, data)
        loaded = Calibration(protocol={"calibration": "none: the conversion needs no data"})
        if conversion.statistics:
            demo = source.kind == "demo"
            loaded = load_calibration(recipe, opened.model, source.folder, recorder, data=own_data, demo=demo)
        else:
            tell_unread(recipe, own_data is not None, evaluate, f"conversion {conversion.name}", recorder)
        work = _prepare(conversion, model, opened, loaded, spec, recorder, stack)
        folder.require_space(work.nbytes)
        stack.enter_context(folder)
        result = _result(model if base is None else base, out, conversion, opened, work, loaded)
        try:
            if delta:
                assert isinstance(work, FuseWork)
                _deliver_delta(work, folder.partial, result, recorder)
            else:
                written = work.write(folder.partial, _fingerprint(opened, conversion, work, loaded), resume, recorder)
                result.seconds, result.peak_rss_bytes = time.monotonic() - started, peak_rss_bytes()
                result.verification = _verified(folder.partial, opened, written, recorder) if verify else {}
                result.verified = bool(result.verification)
                sides = measure_sides(
                    source, folder.partial, skeleton=opened.model, prunable=(opened.prunable(), written.prunable),
                    evaluate=evaluate, data=data, files=files, prompt=prompt, recipe=recipe,
                    demo=source.kind == "demo", reporter=recorder,
                )  # fmt: skip
                _tell(result, written, sides)
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped; finished blocks are kept in {folder.partial}",
                hint="go on with the same command and --resume",
            ) from None
        except (RunError, VerificationError):
            raise
        except OSError as error:
            raise RunError(
                f"{error.filename or folder.partial}: {error.strerror or error}",
                hint="free some space, and go on with the same command and --resume",
            ) from error
        except SecateurError as error:
            if isinstance(error, OutputError) and resume:
                raise  # the run was not taken up at all
            if not resume and not Ledger.any_step(folder.partial / LEDGER):
                folder.discard()
                raise
            raise RunError(error.message, hint=f"{error.hint}; finished blocks are kept, --resume goes on") from error
        result.seconds = result.seconds or time.monotonic() - started
        result.warnings = recorder.warnings
        write_conversion_card(folder.partial, result)
        write_json(folder.partial / RESULT_FILE, result.to_dict())
        folder.commit()
    return result


def check_conversion(conversion: Conversion, source: Source, recipe: Recipe) -> Work:
    """Refuse what `convert` would refuse of this model before it writes; no text is read, and nothing is said.

    Returns:
        What it would do, of which only the numbers are of use: nothing is open any more.

    Raises:
        SecateurError: with the reason.
    """
    with ExitStack() as stack:
        opened, spec = _open(conversion, source, recipe, Reporter(), stack)
        return _prepare(conversion, source.folder, opened, Calibration(protocol={}), spec, Reporter(), stack)


def make_conversion(to: str | Conversion, options: Mapping[str, Any]) -> Conversion:
    """A conversion from its name and options.

    Raises:
        UnknownNameError: for an unknown conversion or option.
        UsageError: for an option with a value it refuses.
    """
    if not isinstance(to, str):
        if options:
            raise UsageError(f"option {next(iter(options))} beside a conversion object", hint="put it in the object")
        return to
    made: Conversion = build(load_class("conversions", to, "conversion"), options, f"conversion {to}")
    return made


def _open(
    conversion: Conversion, source: Source, recipe: Recipe, reporter: Reporter, stack: ExitStack
) -> tuple[Opened, Spec | None]:
    """The model, and the layers that it has already where the conversion wants some."""
    fewer = isinstance(conversion, Shared) and conversion.iterations is not None
    spec = shared_spec(source) if fewer else None
    return open_model(source, recipe, reporter, stack, converted=fewer), spec


def _prepare(
    conversion: Conversion, model: str | Path, opened: Opened, loaded: Calibration, spec: Spec | None,
    reporter: Reporter, stack: ExitStack,
) -> Work:  # fmt: skip
    if isinstance(conversion, Factorized):
        return factorized.prepare(conversion, opened, loaded.batches, loaded.probe, reporter)
    if isinstance(conversion, Moe):
        return moe.prepare(conversion, opened, loaded.batches, reporter)
    if isinstance(conversion, Relu):
        return ReluWork(opened, loaded.batches, reporter)
    if isinstance(conversion, Shared):
        return ShareWork(conversion, opened) if spec is None else IterateWork(conversion, opened, spec)
    if conversion.base is not None:
        return apply_delta(Path(model).expanduser(), opened)
    return FuseWork(conversion, opened, reporter, stack)


def _result(
    model: str | Path, out: str | Path, conversion: Conversion, opened: Opened, work: Work, loaded: Calibration
) -> ConvertResult:
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(conversion).items()}
    recipe = opened.recipe.to_dict()
    nothing = Measured(0, 0, 0.0, 0, "")
    return ConvertResult(
        out=str(out),
        source=provenance(model, opened.source, opened.digest),
        conversion=conversion.name,
        options=options | {name: recipe[name] for name in SETTINGS},
        models=work.models,
        seconds=0.0,
        peak_rss_bytes=peak_rss_bytes(),
        before=nothing,
        after=nothing,
        verified=False,
        protocol={
            **loaded.protocol,
            "compute_dtype": str(opened.compute).removeprefix("torch."),
            "device": str(opened.device),
        },
        versions=versions(),
    )


def _tell(result: ConvertResult, written: Converted, sides: Sides) -> None:
    result.before, result.after = sides.before, sides.after
    result.protocol |= sides.protocol
    result.matrices, result.needs_training = written.matrices, written.needs_training
    result.shards = written.shards
    result.verdict = conversion_sentences(
        written.told, sides.before, sides.after, sides.decode, needs_training=written.needs_training
    )


def _deliver_delta(work: FuseWork, partial: Path, result: ConvertResult, reporter: Reporter) -> None:
    """Write the difference, and compare its size with that of the model it stands for."""
    opened = work.opened
    result.shards, result.matrices = write_delta(work, partial, reporter)
    member = work.members[0].reader
    infos = [member.info(key) for key in member.keys]
    numbers = sum(info.numel for info in infos)
    size = sum(shard.path.stat().st_size for shard in member.shards)
    dtype = str(infos[0].dtype).removeprefix("torch.")
    result.before = Measured(numbers, numbers, 0.0, size, dtype)
    file = next(iter(result.shards))
    small = (partial / file).stat().st_size
    count = sum(one.parameters - opened.specs[one.name].size for one in work.by_name.values())
    count += sum(opened.model.state_dict()[name].numel() for name in work.rest)
    result.after = Measured(count, count, 0.0, small, dtype)
    result.verdict = [
        f"The difference from the base takes {small:,} bytes, the model itself {size:,} ({small / size:.1%}).",
        "It is no model by itself: secateur convert OUT --to fused --base BASE -o MODEL makes one.",
    ]


def _fingerprint(opened: Opened, conversion: Conversion, work: Work, loaded: Calibration) -> dict[str, Any]:
    """What must be the same for a run to be resumed: everything that changes a byte of the result."""
    recipe = opened.recipe.to_dict()
    options = dataclasses.asdict(conversion)
    return {
        "conversion": conversion.name,
        "options": {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()},
        "settings": {name: recipe[name] for name in SETTINGS if name != "activation_memory"},
        "source_sha256": opened.digest,
        "models": work.models,
        "calibration": loaded.protocol,
        "calibration_sha256": digest_of(loaded.batches),
        "device": str(opened.device),
        "compute_dtype": str(opened.compute),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _verified(folder: Path, opened: Opened, written: Converted, reporter: Reporter) -> dict[str, Any]:
    reporter.stage("verifying", 1)
    checked = verify_folder(folder, Expected(written.shards, {}, written.probe, written.answer), reporter)
    checked["tensors_unchanged"] = _check_copies(folder, opened, written.renamed)
    reporter.advance()
    return checked


def _check_copies(folder: Path, opened: Opened, renamed: Mapping[str, str]) -> int:
    """Compare every tensor that was only copied with the source's."""
    with CheckpointReader(folder) as made:
        for new, old in renamed.items():
            dtype = made.info(new).dtype
            same = torch.equal(made.tensor(new), opened.reader.tensor(old).to(dtype))
            if not same:
                raise VerificationError(f"{folder}: {new} was not converted, but differs from {old} of the source")
    return len(renamed)
