"""The table of `secateur bench`: models down, quantities across, then what it means."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from secateur.bench_result import BenchResult, Quantities
from secateur.cli.tables import number


def _millions(value: float | None) -> str | None:
    return None if value is None else f"{value / 1e6:,.1f}"


COLUMNS: tuple[tuple[str, Callable[[Quantities], str | None]], ...] = (
    ("weights, M", lambda row: _millions(row.parameters)),
    ("non-zero, M", lambda row: _millions(row.nonzero)),
    ("file, MB", lambda row: _millions(row.bytes_disk)),
    ("memory, MB", lambda row: _millions(row.bytes_resident)),
    ("MFLOP/token", lambda row: _millions(row.flops_per_token)),
    ("without zeros", lambda row: _millions(row.sparse_flops_per_token)),
    ("perplexity", lambda row: number(row.perplexity)),
    ("bits/byte", lambda row: number(row.bits_per_byte, 3)),
    ("prefill, tok/s", lambda row: number(row.prefill_tokens_per_second, 0)),
    ("first token, s", lambda row: number(row.seconds_to_first_token, 3)),
    ("decode, tok/s", lambda row: number(row.decode_tokens_per_second, 1)),
    ("8 rows, tok/s", lambda row: number(row.decode_tokens_per_second_batch_8, 1)),
    ("J/token", lambda row: number(row.joules_per_token, 3)),
    ("mg CO2/token", lambda row: None if row.grams_co2_per_token is None else f"{1e3 * row.grams_co2_per_token:.3g}"),
    ("of dense", lambda row: number(row.efficiency)),
)
"""A new quantity is one more line here. A column that nothing was measured for is left out."""


def benched(result: BenchResult) -> RenderableType:
    """Quantities down, models across; the sentences; and what was not measured."""
    rows: list[Quantities] = [result, *result.against]
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("")
    for row in rows:
        table.add_column(Text(f"{row.name}\n{row.format}\n{row.runtime}"), justify="right")
    for title, value in COLUMNS:
        cells = [value(row) for row in rows]
        if any(cell is not None for cell in cells):
            table.add_row(Text(title), *(Text("-" if cell is None else cell) for cell in cells))
    parts: list[RenderableType] = [table, Text()]
    before = ""
    for sentence in result.verdict:  # those about one model stand together
        subject, colon, rest = sentence.partition("): ")
        if not colon or not subject.startswith("Against "):
            parts.append(Text(sentence))
            continue
        if subject != before:
            parts.append(Text(f"{subject}):", style="bold"))
        before = subject
        parts.append(Text(f"  {rest}"))
    reasons: dict[str, set[str]] = {}
    for row in rows:
        for name, why in row.missing.items():
            reasons.setdefault(why, set()).add(name)
    if reasons:
        parts.append(Text())
    parts += [Text(f"not measured: {', '.join(sorted(names))}: {why}") for why, names in reasons.items()]
    return Group(*parts)
