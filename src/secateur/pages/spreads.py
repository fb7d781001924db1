"""Figures of what breaks: how angle, length and margin are spread over tokens, and what corruptions add to the loss."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.pages.figures import Cell, Figure
from secateur.pages.svg import LEFT, RIGHT, TOP, WIDTH, Chart, Scale, element
from secateur.report_result import Distribution, Examined

UNITS = {
    "angle": "angle to the true row, degrees",
    "length": "length of the state",
    "margin": "margin to the strongest rival, logits",
}


def spread_figure(key: str, model: str, one: Distribution) -> Figure:
    """Two histograms over each other: dense and pruned."""
    chart = Chart(UNITS[one.quantity], "tokens", height=260)
    x = Scale(one.edges[0], one.edges[-1], LEFT, WIDTH - RIGHT)
    y = Scale.of([0.0, *map(float, (*one.dense_counts, *one.pruned_counts))], chart.bottom, TOP, zero=True)
    chart.axes(x, y)
    chart.legend([("c0", "dense"), ("c1", model)])
    for colour, counts in (("c0", one.dense_counts), ("c1", one.pruned_counts)):
        steps = [(x(one.edges[0]), y(0.0))]
        for number, count in enumerate(counts):
            steps += [(x(one.edges[number]), y(count)), (x(one.edges[number + 1]), y(count))]
        steps.append((x(one.edges[-1]), y(0.0)))
        path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in steps)
        chart.parts.append(element("path", d=path, class_=f"area {colour}"))
    middle = one.quantiles.index(0.5) if 0.5 in one.quantiles else 0
    for colour, values in (("c0", one.dense), ("c1", one.pruned)):
        place = x(values[middle])
        chart.add("line", x1=place, x2=place, y1=TOP, y2=chart.bottom, class_=f"line dash {colour}")
    note = (
        f"{UNITS[one.quantity].split(',')[0].capitalize()} of every token, {one.condition} text; dashed: the medians."
    )
    title = f"{one.quantity.capitalize()}, {one.condition} text: dense and {model}"
    rows: list[list[Cell]] = [
        [one.edges[i], one.edges[i + 1], a, b]
        for i, (a, b) in enumerate(zip(one.dense_counts, one.pruned_counts, strict=True))
    ]
    return Figure(key, title, note, chart.render(note), ["from", "to", "dense tokens", "pruned tokens"], rows)


def damage_figure(key: str, one: Examined) -> Figure | None:
    """What each corruption adds to the loss, dense and pruned side by side."""
    known = [c for c in one.conditions if c.dense_damage is not None and c.pruned_damage is not None]
    if not known:
        return None
    note = (
        "What a corruption adds to the loss of the tokens that it left in place. A pruned model that is hurt more than "
        "the dense one is less robust, not only worse."
    )
    chart = Chart("corruption", "added loss, nats per token", height=260)
    pairs = [(c.name, c.dense_damage or 0.0, c.pruned_damage or 0.0) for c in known]
    y = Scale.of([value for _, *both in pairs for value in both], chart.bottom, TOP, zero=True)
    chart.axes(None, y)
    middles = chart.names([name for name, *_ in pairs])
    chart.legend([("c0", "dense"), ("c1", one.model)])
    for middle, (name, *both) in zip(middles, pairs, strict=True):
        for shift, colour, side, value in ((-34, "c0", "dense", both[0]), (2, "c1", one.model, both[1])):
            top, foot = sorted((y(value), y(0.0)))
            tip = f"{side}\n{name}: {value:+.4f} nats"
            chart.add(
                "rect",
                x=middle + shift,
                y=top,
                width=32,
                height=max(foot - top, 0.5),
                class_=f"mark {colour}",
                data_tip=tip,
            )
    rows: list[list[Cell]] = [list(row) for row in pairs]
    return Figure(
        key,
        f"Damage by corruptions: dense and {one.model}",
        note,
        chart.render(note),
        ["corruption", "dense", "pruned"],
        rows,
    )


def box_figure(key: str, model: str, found: Sequence[Distribution]) -> Figure:
    """One quantity in clean and damaged text: a box from the lower to the upper quartile for dense and pruned.

    Args:
        found: the distributions of one quantity, one for each condition.
    """
    quantity, levels = found[0].quantity, found[0].quantiles
    five = [levels.index(level) for level in (0.05, 0.25, 0.5, 0.75, 0.95)]
    chart = Chart("text", UNITS[quantity], height=260)
    y = Scale.of([value for one in found for value in (*one.dense, *one.pruned)], chart.bottom, TOP)
    chart.axes(None, y)
    chart.legend([("c0", "dense"), ("c1", model)])
    rows: list[list[Cell]] = []
    for middle, one in zip(chart.names([one.condition for one in found]), found, strict=True):
        for shift, colour, side, values in ((-18, "c0", "dense", one.dense), (18, "c1", "pruned", one.pruned)):
            low, first, half, last, high = (values[place] for place in five)
            place = middle + shift
            rows.append([one.condition, side, low, first, half, last, high])
            tip = f"{side}, {one.condition}\nmedian {half:.4g}\nhalf of the tokens: {first:.4g} to {last:.4g}"
            chart.add("line", x1=place, x2=place, y1=y(low), y2=y(high), class_=f"line {colour}")
            chart.add("rect", x=place - 13, y=y(last), width=26, height=max(y(first) - y(last), 0.5),
                      class_=f"area {colour}", data_tip=tip)  # fmt: skip
            chart.add("line", x1=place - 13, x2=place + 13, y1=y(half), y2=y(half), class_=f"line {colour}")
    note = "Box: from the lower to the upper quartile of all tokens, with the median; line: from 5 % to 95 % of them."
    title = f"{quantity.capitalize()} in clean and damaged text: dense and {model}"
    columns = ["text", "model", "5%", "25%", "50%", "75%", "95%"]
    return Figure(key, title, note, chart.render(note), columns, rows)
