"""A plot with two logarithmic axes as an SVG file that stands by itself, drawn with the charts of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from secateur.pages.svg import HEIGHT, LEFT, TOP, WIDTH, Chart, Scale

COLOURS = ("#4b5553", "#0072b2", "#d55e00", "#a8508a", "#00845f", "#b98a00", "#3aa6dd", "#8a4b00")
NAMES = 96
"""Room to the right of the last points, for the names."""
APART = 13
STYLE = (
    ".grid{stroke:#dde2df}.tick,.axis{fill:#5a6664}.line{fill:none;stroke-width:2}"
    ".name{paint-order:stroke;stroke:#fff;stroke-width:3px;stroke-linejoin:round}"
)


def log_log(lines: Mapping[str, Sequence[tuple[float, float]]], x_title: str, y_title: str, label: str) -> str:
    """Draw one line for each name, with the name at its end.

    Args:
        lines: name -> points (x, y), all of them above 0, in any order.
        label: says to a reader who sees nothing what it is.
    """
    chart = Chart(f"{x_title} (log scale)", f"{y_title} (log scale)")
    points = [point for line in lines.values() for point in line]
    x = Scale.of([first for first, _ in points], LEFT, WIDTH - NAMES, log=True)
    y = Scale.of([second for _, second in points], chart.bottom, TOP, log=True)
    chart.axes(x, y)
    ends: list[tuple[float, float, str, str]] = []
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [(x(first), y(second)) for first, second in sorted(line)]
        path = "M" + "L".join(f"{across:.1f} {down:.1f}" for across, down in places)
        chart.add("path", d=path, class_="line", stroke=colour)
        for across, down in places:
            chart.add("circle", cx=across, cy=down, r=3, fill=colour)
        ends.append((places[-1][1], places[-1][0], name, colour))
    lowest = float(TOP)
    for down, across, name, colour in sorted(ends):
        lowest = max(down + 4, lowest)
        chart.add("text", name, x=across + 9, y=lowest, class_="name", fill=colour)
        lowest += APART
    head, _, body = chart.render(label).partition(">")
    head = head.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" ', 1)
    fill = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    return f'{head} font-family="sans-serif" font-size="12"><style>{STYLE}</style>{fill}{body}\n'
