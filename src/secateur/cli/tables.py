"""What people read: results as tables. Pure functions of a result; a row whose values were not measured is left out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from secateur.cli.usage_table import usage_table
from secateur.plugins import Description
from secateur.result import (
    AllocateResult,
    ConvertResult,
    EvaluateResult,
    ExportResult,
    InspectResult,
    Measured,
    PlanResult,
    PruneResult,
    RecoverResult,
)

Column = tuple[str, Measured]
Row = tuple[str, Callable[[Measured], str | None]]


def megabytes(count: int | None) -> str | None:
    """Bytes in MB of 10^6, as the disk counts."""
    return None if count is None else f"{count / 1e6:,.1f} MB"


def number(value: float | None, digits: int = 2) -> str | None:
    """A number with its thousands apart."""
    return None if value is None else f"{value:,.{digits}f}"


def percent(share: float | None, digits: int = 2) -> str | None:
    """A share of 1 as a percentage."""
    return None if share is None else f"{share:.{digits}%}".replace("%", " %")


ROWS: tuple[Row, ...] = (
    ("perplexity (lower is better)", lambda m: number(m.perplexity)),
    ("sparsity of the prunable weights", lambda m: percent(m.sparsity)),
    ("zeros among all parameters", lambda m: percent(1 - m.nonzero / m.parameters) if m.parameters else None),
    ("parameters", lambda m: f"{m.parameters:,}"),
    ("number format", lambda m: m.dtype),
    ("bytes on disk", lambda m: megabytes(m.bytes_disk)),
    ("resident memory", lambda m: megabytes(m.bytes_resident)),
    ("decoding, tokens/s", lambda m: number(m.decode_tokens_per_second, 1)),
)
"""The measures of a model, one row each; a new measure is one more line here."""


def comparison(columns: Sequence[Column]) -> Table:
    """Measures down, models across: any number of columns of (title, measured)."""
    accuracies = dict.fromkeys(name for _, measured in columns for name in measured.accuracy)
    rows: list[Row] = [*ROWS, *((f"accuracy, {name}", _accuracy(name)) for name in accuracies)]
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("")
    for title, _ in columns:
        table.add_column(Text(title), justify="right", no_wrap=True)
    for label, value in rows:
        cells = [value(measured) for _, measured in columns]
        if any(cell is not None for cell in cells):
            table.add_row(Text(label), *(Text("-" if cell is None else cell) for cell in cells))
    return table


def _accuracy(name: str) -> Callable[[Measured], str | None]:
    return lambda measured: percent(measured.accuracy.get(name), 1)


def pruned(result: PruneResult, beside: Sequence[Column] = ()) -> RenderableType:
    """The table before and after, both continuations, the verdict, and where the result is.

    Args:
        beside: results of earlier runs on the same model, as further columns.
    """
    columns: list[Column] = [("before", result.before), *beside, ("after", result.after)]
    parts: list[RenderableType] = [comparison(columns), Text()]
    told = [(title, measured.continuation) for title, measured in columns if measured.continuation is not None]
    if told:
        prompt = result.protocol.get("prompt")
        if isinstance(prompt, str):
            parts.append(_labelled("prompt", prompt))
        parts += [_labelled(title, text) for title, text in told]
        parts.append(Text())
    parts += [Text(sentence) for sentence in result.verdict]
    return Group(*parts, _where(result))


def _where(result: PruneResult | ConvertResult) -> Text:
    state = "verified" if result.verified else "not verified"
    took = f"{result.seconds:,.1f} s, at most {megabytes(result.peak_rss_bytes)} of memory"
    return Text(f"{result.out} ({state}; {took})")


def converted(result: ConvertResult) -> RenderableType:
    """The table before and after, what came of the matrices, the verdict, and where the result is."""
    columns: list[Column] = [("before", result.before), ("after", result.after)]
    parts: list[RenderableType] = [comparison(columns), Text()]
    told = [(title, measured.continuation) for title, measured in columns if measured.continuation is not None]
    parts += [_labelled(title, text) for title, text in told] + [Text()] * bool(told)
    parts += _usage(result.after.expert_usage)
    parts += [Text(sentence) for sentence in result.verdict]
    return Group(*parts, _where(result))


def allocated(result: AllocateResult) -> RenderableType:
    """Sparsities by kind of matrix, and where the file is."""
    table = Table(show_edge=False, pad_edge=False)
    for number_, title in enumerate(("matrices", "blocks", "fewest zeros", "mean", "most zeros")):
        table.add_column(title, justify="right" if number_ else "left")
    for (kind,), group in _grouped(result.matrices, lambda matrix: (family(matrix.name),)).items():
        shares = [matrix.sparsity for matrix in group]
        cells = (kind, str(len(group)), *(percent(one, 1) or "" for one in (min(shares), _mean(shares), max(shares))))
        table.add_row(*(Text(cell) for cell in cells))
    mean = f"{percent(result.sparsity)} of all weights, divided by {result.allocation}"
    return Group(table, Text(), Text(mean), Text(f"{result.out} ({result.seconds:,.1f} s)"))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def planned(result: PlanResult) -> RenderableType:
    """What would go."""
    weights = f"{result.weights_before:,} -> {result.weights_after:,}"
    changes = [f"config: {key} = {value}" for key, value in result.shape_changes.items()]
    first = f"{result.removed:.1%} of the prunable weights would go: {weights}"
    return Group(*(Text(line) for line in [first, *result.lines, *changes]))


def _labelled(label: str, text: str) -> Text:
    return Text.assemble((f"{label}: ", "bold"), " ".join(text.split()))


def _facts(rows: Sequence[tuple[str, str | None]]) -> Table:
    table = Table.grid(padding=(0, 2))
    for label, value in rows:
        if value is not None:
            table.add_row(Text(label, style="bold"), Text(value))
    return table


T = TypeVar("T")
Measures = tuple[str, Mapping[str, float], Mapping[str, Sequence[float]], Callable[[float], str | None]]
"""A title, values and intervals by the name of what they were measured on, and how a value is written."""


def _grouped(items: Sequence[T], key: Callable[[T], tuple[str, ...]]) -> dict[tuple[str, ...], list[T]]:
    groups: dict[tuple[str, ...], list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def family(name: str) -> str:
    """A name with its numbers as ``*``: the glob, ready for ``--targets``, that names this kind of matrix."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def shape_text(shape: Sequence[int]) -> str:
    """``[576, 1536]`` as ``576 x 1536``."""
    return " x ".join(map(str, shape))


def inspected(result: InspectResult, *, each: bool) -> RenderableType:
    """The facts of a model, its prunable matrices (by kind unless ``each``), and what stays and why."""
    label = (lambda name: name) if each else family
    facts = _facts(
        [
            ("model", result.model),
            ("architecture", result.architecture),
            ("blocks", str(result.blocks)),
            ("number format", result.dtype),
            ("bytes on disk", megabytes(result.bytes_disk)),
            ("parameters", f"{result.parameters:,}, of them {result.nonzero:,} not zero"),
            ("prunable", f"{result.prunable:,} in {len(result.matrices)} matrices"),
            ("sparsity", f"{percent(result.sparsity)} of the prunable weights"),
        ]
    )
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("can be pruned", overflow="fold")
    for title in ("matrices", "shape", "zeros"):
        table.add_column(title, justify="right", no_wrap=True)
    for (name, shape), matrices in _grouped(result.matrices, lambda m: (label(m.name), shape_text(m.shape))).items():
        table.add_row(Text(name), str(len(matrices)), shape, f"{sum(m.zeros for m in matrices):,}")
    kept = Table(show_edge=False, pad_edge=False)
    kept.add_column("stays as it is", overflow="fold")
    kept.add_column("tensors", justify="right", no_wrap=True)
    kept.add_column("because")
    for (name, reason), tensors in _grouped(result.unprunable, lambda u: (label(u.name), u.reason)).items():
        kept.add_row(Text(name), str(len(tensors)), Text(reason))
    refused: list[RenderableType] = []
    if result.obstacle:
        refused = [Text(f"prune refuses this model: {result.obstacle}", style="bold red"), Text()]
    return Group(facts, Text(), *refused, table, Text(), kept)


def evaluated(result: EvaluateResult) -> RenderableType:
    """What was measured, each with its standard error or 95 % interval, and the protocol that made it."""

    def with_error(value: str | None, error: str | None) -> str | None:
        return value if value is None or error is None else f"{value} ± {error}"

    def with_interval(value: str | None, ends: Sequence[float] | None, form: Callable[[float], str | None]) -> str:
        return f"{value}" if ends is None else f"{value} (95 %: {form(ends[0])} to {form(ends[1])})"

    def share(value: float) -> str | None:
        return percent(value, 1)

    def decimal(value: float) -> str | None:
        return number(value, 3)

    rows: list[tuple[str, str | None]] = [
        ("model", result.model),
        ("perplexity", with_error(number(result.perplexity), number(result.perplexity_stderr))),
        ("nats per token", with_error(number(result.nll_per_token, 4), number(result.nll_stderr, 4))),
        ("tokens", None if result.tokens is None else f"{result.tokens:,}"),
        ("tokens/s", number(result.tokens_per_second, 1)),
    ]
    for name, accuracy in result.accuracy.items():
        error, ends = percent(result.accuracy_stderr.get(name), 1), result.accuracy_interval.get(name)
        told = with_error(share(accuracy), error) if ends is None else with_interval(share(accuracy), ends, share)
        rows.append((f"accuracy, {name}", told))
    measures: tuple[Measures, ...] = (
        ("macro F1", result.macro_f1, result.macro_f1_interval, share),
        ("calibration error", result.calibration_error, result.calibration_error_interval, decimal),
        ("loss, nats", result.loss, {}, decimal),
        ("rank correlation", result.rank_correlation, result.rank_correlation_interval, decimal),
    )
    for title, values, intervals, form in measures:
        for name, value in values.items():
            rows.append((f"{title}, {name}", with_interval(form(value), intervals.get(name), form)))
    protocol = [(f"  {key}", str(value)) for key, value in result.protocol.items()]
    return Group(_facts(rows), *_usage(result.expert_usage), Text("protocol", style="bold"), _facts(protocol))


def _usage(usage: Mapping[str, Sequence[float]]) -> list[RenderableType]:
    return [usage_table(usage), Text()] if usage else []


def recovered(result: RecoverResult) -> RenderableType:
    """Dense, pruned or converted, and recovered side by side, how training went, and the verdict."""
    student = "converted" if result.student.get("conversion") else "pruned"
    columns: list[Column] = [(student, result.before), ("recovered", result.after)]
    if result.teacher is not None:
        columns.insert(0, ("dense", result.teacher))
    training = result.training
    speed = training.get("tokens_per_second")
    facts = _facts(
        [
            ("training tokens", f"{training['tokens']:,}"),
            ("tokens/s", number(speed, 1)),
            ("training loss", number(training.get("training_loss"), 4)),
            ("held-out loss, before", number(training.get("held_out_loss_before"), 4)),
            ("held-out loss, after", number(training.get("held_out_loss"), 4)),
            ("generalisation gap, before", number(training.get("generalisation_gap_before"), 4)),
            ("generalisation gap, after", number(training.get("generalisation_gap"), 4)),
            ("zeros held", f"{result.zeros_held:,}"),
        ]
    )
    verified = "verified" if result.verified else "not verified"
    end = f"{result.out} ({verified}; {result.seconds:.1f} s, at most {megabytes(result.peak_rss_bytes)} of memory)"
    return Group(
        comparison(columns), Text(), facts, Text(), *_usage(result.after.expert_usage),
        *(Text(sentence) for sentence in result.verdict), Text(end, style="bold"),
    )  # fmt: skip


def exported(result: ExportResult, *, each: bool = False) -> RenderableType:
    """What was written, how large it is, and what the program that reads it made of it.

    Args:
        each: every matrix of the sparse format has a row; else those of one kind and reason share one.
    """
    ran = result.runtime
    kept = f"{result.zeros - result.zeros_lost:,} of {result.zeros:,}" if result.zeros else None
    bits = None if result.bits_per_weight is None else f"{result.bits_per_weight:.2f}"
    ratio = f"{result.ratio:.2f} times smaller" if result.ratio >= 1 else f"{1 / result.ratio:.2f} times larger"
    positions = ran.get("positions")
    facts = _facts(
        [
            ("tensors", ", ".join(f"{count} {kind}" for kind, count in result.tensors.items())),
            ("bytes of the source", megabytes(result.bytes_folder)),
            ("bytes of the result", f"{megabytes(result.bytes_disk)}, {ratio}"),
            ("bits for each weight of the blocks", bits),
            ("zeros kept", kept),
            ("run by", ran.get("package")),
            ("largest difference of an output", percent(ran.get("output_difference"), 2)),
            ("positions compared", None if positions is None else f"{positions:,}"),
            ("mean difference of log-probabilities", number(ran.get("mean_difference"), 4)),
            ("same likeliest token", percent(ran.get("same_best"), 1)),
            ("perplexity, folder", number(ran.get("perplexity_folder"))),
            ("perplexity, file", number(ran.get("perplexity"))),
            ("prefill, tokens/s", number(ran.get("prefill_tokens_per_second"), 1)),
            ("decoding, tokens/s", number(ran.get("decode_tokens_per_second"), 1)),
        ]
    )
    state = "not verified" if not result.verified else "verified" if ran else "verified, but not run"
    took = f"{result.seconds:,.1f} s, at most {megabytes(result.peak_rss_bytes)} of memory"
    stored: list[RenderableType] = [_stored(result, each=each), Text()] if result.matrices else []
    return Group(*stored, facts, Text(), Text(f"{result.out} ({state}; {took})"))


def _stored(result: ExportResult, *, each: bool) -> Table:
    """Matrices of the sparse format: how they are stored, in how many bytes and bits a weight, and why."""
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("matrix", overflow="fold")
    for title in ("count", "shape", "stored as", "zeros", "bytes", "bits/weight"):
        table.add_column(title, justify="left" if title == "stored as" else "right", no_wrap=True)
    table.add_column("because", overflow="fold")
    label = (lambda name: name) if each else family
    groups = _grouped(result.matrices, lambda m: (label(m.name), shape_text(m.shape), f"{m.kind}, {m.bits} bits"))
    for (name, shape, how), matrices in groups.items():
        weights = math.prod(matrices[0].shape) * len(matrices)
        zeros = sum(matrix.zeros for matrix in matrices)
        nbytes = sum(matrix.nbytes for matrix in matrices)
        reasons = list(dict.fromkeys(matrix.reason for matrix in matrices))
        table.add_row(
            Text(name), str(len(matrices)), shape, how, f"{zeros / weights:.0%}", f"{nbytes:,}",
            f"{8 * nbytes / weights:.2f}", Text(reasons[0] + (" ..." if len(reasons) > 1 else "")),
        )  # fmt: skip
    return table


def plugins(found: Mapping[str, Mapping[str, str]]) -> RenderableType:
    """All plug-ins, one line each, under the name of their kind."""
    table = Table.grid(padding=(0, 2))
    for kind, lines in found.items():
        table.add_row(Text(kind, style="bold"), "")
        for name, line in lines.items():
            table.add_row(Text(f"  {name}"), Text(line))
    return table


def plugin(description: Description) -> RenderableType:
    """All that one plug-in says about itself, options last."""
    parts: list[RenderableType] = [Text(description.name, style="bold"), Text(description.doc), Text()]
    if not description.options:
        return Group(*parts, Text("It has no options of its own."))
    table = Table(show_edge=False, pad_edge=False)
    for title in ("option", "type", "default", ""):
        table.add_column(title, no_wrap=title != "")
    for option in description.options:
        table.add_row(*(Text(text) for text in (option.name, option.type, option.default, option.help)))
    return Group(*parts, table)
