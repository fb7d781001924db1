"""`secateur export`: write a model in another format, and prove that it is the same model."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import transformers

from secateur.checkpoint.check import hash_folder, read_config
from secateur.checkpoint.file import OutputFile
from secateur.checkpoint.folder import OutputFolder
from secateur.checkpoint.source import Source, open_source, places_of
from secateur.checkpoint.writer import hash_file
from secateur.errors import UnsupportedModelError
from secateur.formats._base import Format, Plan
from secateur.formats.gguf import GGUFPlan
from secateur.formats.sparse import SparsePlan
from secateur.formats.torchao import TorchAOPlan
from secateur.layers.spec import is_converted
from secateur.plugins import build, load_class
from secateur.progress import Recorder, Reporter
from secateur.result import RESULT_FILE, ExportResult, write_json
from secateur.verbs.card import write_export_card
from secateur.verbs.llama_proof import prove
from secateur.verbs.memory import as_source
from secateur.verbs.provenance import peak_rss_bytes, provenance, versions
from secateur.verbs.sparse_proof import prove_sparse


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
        out: file or folder to write.
        format: name of a format, its options in ``options`` (``quantize="q8_0"``), or a format object. ``sparse``,
            ``torchao`` and ``hf`` write folders.
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
        _place(chosen, out, overwrite, named)  # refuse before anything is fetched
        if isinstance(model, transformers.PreTrainedModel):
            source, _ = as_source(model, tokenizer, out, stack)
        else:
            source = open_source(model, reporter=recorder, packed=chosen.reads_packed)
        place = _place(chosen, out, overwrite, [source.folder, *named])
        if is_converted(read_config(source.folder)):
            raise UnsupportedModelError(
                f"{source.name} is a converted model: no format of export knows its layers",
                hint="export the model that it was made from",
            )
        plan = chosen.plan(source, recorder)
        place.require_space(plan.nbytes)
        with _in_folder(place) if isinstance(place, OutputFolder) else _in_file(place) as partial:
            written = plan.write(partial, recorder)
            verification = plan.check(partial, recorder) if verify else {}
            runtime = _run(plan, partial, source, str(vars(chosen).get("quantize")), recorder) if verify else {}
            single = partial.is_file()
            size = partial.stat().st_size if single else sum(_sizes(partial))
            folder_bytes = sum(_sizes(source.folder))
            result = ExportResult(
                out=str(out),
                source=provenance(model, source, plan.source_sha256),
                format=str(vars(type(chosen))["name"]),
                options=vars(chosen).copy(),
                bytes_disk=size,
                bytes_folder=folder_bytes,
                ratio=folder_bytes / size,
                **written,
                seconds=time.monotonic() - started,
                peak_rss_bytes=peak_rss_bytes(),
                verified=bool(verification),
                verification=verification,
                runtime=runtime,
                warnings=recorder.warnings,
                versions=versions(),
                sha256=hash_file(partial) if single else hash_folder(partial),
            )
            if not single:
                write_export_card(partial, result)
                write_json(partial / RESULT_FILE, result.to_dict())
        return result


def _place(chosen: Format, out: str | Path, overwrite: bool, sources: list[Path]) -> OutputFile | OutputFolder:
    if chosen.suffix:
        return OutputFile(out, suffix=chosen.suffix, overwrite=overwrite, sources=sources)
    return OutputFolder(out, overwrite=overwrite, sources=sources)


@contextlib.contextmanager
def _in_file(file: OutputFile) -> Iterator[Path]:
    with file:
        yield file.partial
        file.commit()


@contextlib.contextmanager
def _in_folder(folder: OutputFolder) -> Iterator[Path]:
    """An export takes no longer than a copy: what was begun and not finished goes, nothing is resumed."""
    with folder:
        try:
            yield folder.partial
            folder.commit()
        except BaseException:
            folder.discard()
            raise


def _sizes(folder: Path) -> list[int]:
    return [path.stat().st_size for path in folder.glob("*.safetensors")]


def _run(plan: Plan, partial: Path, source: Source, kind: str, reporter: Reporter) -> dict[str, Any]:
    """What the program that reads the format makes of the result."""
    if isinstance(plan, GGUFPlan):
        return prove(plan, partial, kind, reporter)
    if isinstance(plan, SparsePlan | TorchAOPlan):
        return prove_sparse(plan, partial, source, reporter)
    return {}


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
