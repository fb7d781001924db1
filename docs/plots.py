"""Which lines the plots of the documents draw, from what the benchmarks stored."""

from __future__ import annotations

from typing import Any

from log_log import log_log

FORMATS = (
    "dense bf16", "mask bf16 50 %", "mask bf16 70 %", "dense int8", "mask int8 50 %", "mask int8 70 %", "dense int4",
)  # fmt: skip
"""Those of the kernels that are drawn."""


def solver_plot(data: dict[str, Any] | None) -> str | None:
    """Seconds against the number of weights on log scales, a line for each method; None before it was measured."""
    if data is None:
        return None
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in data["rows"]:
        lines.setdefault(row["method"], []).append((float(row["outputs"] * row["inputs"]), row["seconds"]))
    return log_log(lines, "weights of the matrix", "seconds", "Seconds to solve one matrix against its weights")


def kernel_plot(data: dict[str, Any] | None) -> str | None:
    """Microseconds of a product on one thread against the number of weights, a line for each format."""
    if data is None:
        return None
    lines: dict[str, list[tuple[float, float]]] = {name: [] for name in FORMATS}
    for row in data["rows"]:
        if row["threads"] == 1 and row["format"] in lines and row["microseconds"]:
            rows, columns = map(int, row["rows x columns"].split("x"))
            lines[row["format"]].append((float(rows * columns), row["microseconds"]))
    told = "Microseconds of one product against the weights of its matrix"
    return log_log({name: line for name, line in lines.items() if line}, "weights", "microseconds, one thread", told)
