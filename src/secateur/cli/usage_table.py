"""How evenly experts are used, as a histogram for the terminal: how many experts have how much of an even share"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

EDGES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Ends of the bins, in even shares."""
TITLES = ("never", "below 1/4", "1/4 to 1/2", "1/2 to 1", "1 to 2", "2 to 4", "4 and more")
_WIDTH = 40


def histogram(usage: Mapping[str, Sequence[float]]) -> list[int]:
    """Experts of all layers, by their part of what each would have if a layer used its experts evenly.

    Args:
        usage: layer -> share of the tokens that chose each expert.
    """
    counts = [0] * len(TITLES)
    for shares in usage.values():
        even = sum(shares) / len(shares)
        for share in shares:
            counts[0 if share == 0 else 1 + sum(share / even >= edge for edge in EDGES)] += 1
    return counts


def usage_table(usage: Mapping[str, Sequence[float]]) -> RenderableType:
    """The histogram, and the layers in which experts were never chosen."""
    counts = histogram(usage)
    table = Table(show_header=False, show_edge=False, box=None, pad_edge=False)
    for title, count in zip(TITLES, counts, strict=True):
        bar = "█" * (count and max(1, round(_WIDTH * count / max(counts))))
        table.add_row(Text(f"  {title}"), Text(f"{count:,}", justify="right"), Text(bar))
    idle = [name for name, shares in usage.items() if 0 in shares]
    told = f"expert use: {sum(counts):,} experts in {len(usage):,} layers, by how often chosen (1: an even share)"
    parts: list[RenderableType] = [Text(told, style="bold"), table]
    if idle:
        named = ", ".join(idle[:4]) + (f" and {len(idle) - 4:,} more" if len(idle) > 4 else "")
        parts.append(Text(f"  no token of this text chose {counts[0]:,} experts: {named}"))
    return Group(*parts)
