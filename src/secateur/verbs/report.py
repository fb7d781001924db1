"""`secateur report`: one page that compares results, says what to take, and shows what breaks and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.checkpoint.file import OutputFile
from secateur.corpus.load import DEFAULT_PROMPT, load_text
from secateur.errors import UnknownNameError, UsageError
from secateur.pages.collect import Collector
from secateur.pages.inputs import read_inputs
from secateur.pages.markdown import markdown
from secateur.pages.page import check_extra, render_page
from secateur.progress import Recorder, Reporter
from secateur.report_result import Examined, ReportResult
from secateur.result import PruneResult, RecoverResult

FORMATS = {"html": ".html", "md": ".md", "json": ".json"}


def report(
    inputs: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    format: str = "html",
    prompts: Sequence[str] = (),
    text: str | Path = "builtin",
    run: bool = True,
    sequence_length: int | None = None,
    samples: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> ReportResult:
    """Compare results of any commands; with ``out``, write the page.

    Args:
        inputs: folders that `prune` or `recover` wrote, JSON files of `secateur study` and `secateur bench`, and files
            that `secateur allocate` wrote.
        out: file to write; None writes nothing, see `render` for the text.
        format: html, md or json.
        prompts: texts that the dense and the pruned models of the folders continue.
        text: what their losses are measured on, see `secateur.corpus.load.load_text`.
        run: open the models of the folders, the finalists that studies kept, and their dense models, for what no result
            file says.
        sequence_length: tokens in a window (512, or less where the model or the text has less).
        samples: windows (4, or what the text has).

    Raises:
        UsageError: for an input that is no result, or arguments that make no sense; nothing was written.
        OutputError: when OUT exists, or cannot be written.
        MissingExtraError: for html without the extra ``report``.
    """
    recorder = Recorder(reporter)
    if format not in FORMATS:
        raise UnknownNameError("format", format, FORMATS)
    for name, value, least in (("sequence_length", sequence_length, 2), ("samples", samples, 1)):
        if value is not None and value < least:
            raise UsageError(f"{name} is {value}", hint=f"it must be at least {least}")
    if any(not prompt.strip() for prompt in prompts):
        raise UsageError("a prompt is empty", hint="give a text to continue")
    if isinstance(inputs, str | Path):
        raise UsageError("inputs is one path, not a list of them", hint="report([path], ...)")
    if format == "html":
        check_extra()
    file = None if out is None else OutputFile(out, suffix=FORMATS[format], overwrite=overwrite, sources=inputs)
    found = read_inputs(inputs)
    collector = Collector(found)
    result = collector.finish()
    models: list[tuple[str, Path, Mapping[str, Any]]] = [
        (each.name, each.folder, each.result.source)
        for each in found
        if each.folder is not None and isinstance(each.result, PruneResult | RecoverResult)
    ]
    models += collector.kept
    if run and models:
        result.examined = _examine(models, text, prompts, sequence_length, samples, device, recorder)
    elif prompts:
        recorder.warn("--prompt has no effect: no model is run")
    result.warnings += recorder.warnings
    if file is not None:
        content = render(result, format)
        with file:
            file.partial.write_text(content, encoding="utf-8")
            file.commit()
    return result


def render(result: ReportResult, format: str = "html") -> str:
    """A report as the text of a file of that format.

    Raises:
        UnknownNameError: for an unknown format.
        MissingExtraError: for html without the extra ``report``.
    """
    if format == "html":
        return render_page(result)
    if format == "md":
        return markdown(result)
    if format == "json":
        return result.to_json() + "\n"
    raise UnknownNameError("format", format, FORMATS)


def _examine(
    models: Sequence[tuple[str, Path, Mapping[str, Any]]], text: str | Path, prompts: Sequence[str],
    length: int | None, samples: int | None, device: str, reporter: Reporter,
) -> list[Examined]:  # fmt: skip
    """Run models, each with its folder and source; torch is imported here, and not where nothing is run."""
    chosen = load_text(text, "measure")
    from secateur.verbs.examine import Pruned, examine

    return examine(
        [Pruned(*each) for each in models], chosen, prompts=prompts or [DEFAULT_PROMPT], length=length,
        samples=samples, device=device, reporter=reporter,
    )  # fmt: skip
