"""`secateur export`: write a model in the format of another program, and prove that it is the same model."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import transformers

from secateur.checkpoint.file import OutputFile
from secateur.checkpoint.source import open_source, places_of
from secateur.checkpoint.writer import hash_file
from secateur.formats._base import Format
from secateur.formats.gguf import GGUFPlan
from secateur.plugins import build, load_class
from secateur.progress import Recorder, Reporter
from secateur.result import ExportResult
from secateur.verbs.llama_proof import prove
from secateur.verbs.memory import as_source
from secateur.verbs.provenance import peak_rss_bytes, provenance, versions


def export(
    model: str | Path | transformers.PreTrainedModel,
    out: str | Path,
    *,
    format: str | Format = "gguf",
    tokenizer: Any = None,
    overwrite: bool = False,
    verify: bool = True,
    reporter: Reporter | None = None,
    **options: Any,
) -> ExportResult:
    """Write a model in another format.

    Args:
        model: a folder, hub id, ``.gguf`` file, ``demo``, or a model in memory (with its ``tokenizer``).
        out: file to write.
        format: name of a format, its options in ``options`` (``quantize="q8_0"``), or a format object.
        overwrite: replace an existing OUT.
        verify: read the result back and compare it; run it where its program is installed.

    Raises:
        SecateurError: bad input (nothing was written), or a result that did not pass its verification.
    """
    started = time.monotonic()
    recorder = Recorder(reporter)
    chosen = make_format(format, options)
    with ExitStack() as stack:
        named = [] if isinstance(model, transformers.PreTrainedModel) else places_of(model)
        OutputFile(out, suffix=chosen.suffix, overwrite=overwrite, sources=named)  # refuse before anything is fetched
        if isinstance(model, transformers.PreTrainedModel):
            source, _ = as_source(model, tokenizer, out, stack)
        else:
            source = open_source(model, reporter=recorder)
        file = OutputFile(out, suffix=chosen.suffix, overwrite=overwrite, sources=[source.folder, *named])
        plan = chosen.plan(source, recorder)
        file.require_space(plan.nbytes)
        verification: dict[str, Any] = {}
        runtime: dict[str, Any] = {}
        with file:
            written = plan.write(file.partial, recorder)
            if verify:
                verification = plan.check(file.partial, recorder)
                if isinstance(plan, GGUFPlan):
                    runtime = prove(plan, file.partial, str(vars(chosen)["quantize"]), recorder)
            digest = hash_file(file.partial)
            file.commit()
        folder_bytes = sum(path.stat().st_size for path in source.folder.glob("*.safetensors"))
        size = file.out.stat().st_size
        return ExportResult(
            out=str(out),
            source=provenance(model, source, plan.source_sha256),
            format=str(vars(type(chosen))["name"]),
            options=vars(chosen).copy(),
            bytes_disk=size,
            bytes_folder=folder_bytes,
            ratio=folder_bytes / size,
            tensors=written["tensors"],
            zeros=written["zeros"],
            zeros_lost=written["zeros_lost"],
            seconds=time.monotonic() - started,
            peak_rss_bytes=peak_rss_bytes(),
            verified=bool(verification),
            verification=verification,
            runtime=runtime,
            warnings=recorder.warnings,
            versions=versions(),
            sha256=digest,
        )


def make_format(format: str | Format, options: dict[str, Any]) -> Format:
    """A format from its name and options.

    Raises:
        UnknownNameError: for an unknown format or option.
        UsageError: for an option with a value it refuses.
    """
    if not isinstance(format, str):
        return format
    made: Format = build(load_class("formats", format, "format"), options, f"format {format}")
    return made
