"""The figures of a report: each a drawing, what it means, and the table that it was drawn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from secateur.pages.fronts import AXES
from secateur.pages.svg import LEFT, RIGHT, TOP, WIDTH, Chart, Scale, cut, short
from secateur.report_result import (
    MADE,
    AllocationMap,
    BlockMap,
    Comparison,
    Examined,
    Front,
    GroupLoss,
    ReportModel,
    ReportResult,
)

Cell = str | float | int | bool | None
COLOURS = 6
"""Classes c0 (dense) to c5 of the style sheet."""


@dataclass
class Figure:
    """One figure; ``columns`` and ``rows`` are its data, which the page offers as CSV."""

    key: str
    title: str
    note: str
    svg: str
    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)


def front_figures(result: ReportResult) -> Iterator[tuple[Comparison, list[Figure]]]:
    """For each comparison a figure for every axis that has data."""
    for number, comparison in enumerate(result.comparisons):
        drawn = [_front(f"front-{number}-{front.axis}", front, comparison, result) for front in comparison.fronts]
        yield comparison, drawn


def _front(key: str, front: Front, comparison: Comparison, result: ReportResult) -> Figure:
    axis = next(axis for axis in AXES if axis.name == front.axis)
    models = result.models
    at = {n: (models[n].values[front.axis], models[n].values[comparison.quality]) for n in front.points}
    values = [y for _, y in at.values()]
    log = comparison.better == "minimize" and min(values) > 0 and max(values) > 4 * min(values)
    chart = Chart(axis.title, comparison.quality + (" (log scale)" if log else ""))
    x = Scale.of([x for x, _ in at.values()], LEFT, WIDTH - RIGHT)
    y = Scale.of(values, chart.bottom, TOP, log=log)
    chart.axes(x, y)
    entries = [("c1", "pruned"), ("c5", "converted"), ("c0", "dense"), ("c2", "quantised only"), ("c3", "other")]
    kinds = {"pruned": "c1", "converted": "c5", "dense": "c0", "quantised": "c2", "other": "c3"}
    seen = {kinds[models[n].kind] for n in front.points}
    chart.legend([entry for entry in entries if entry[0] in seen] + [("c4", "knee")] * (front.knee is not None))
    chart.line([(x(at[n][0]), y(at[n][1])) for n in front.front], "front")
    for n in sorted(front.points, key=lambda n: (n in front.front, models[n].kind not in MADE)):
        place = x(at[n][0]), y(at[n][1])
        class_ = f"mark {kinds[models[n].kind]}" + (" on" if n in front.front else " off")
        class_ += " broken" if models[n].meets is False else ""
        tip = f"{models[n].name}\n{comparison.quality} {at[n][1]:,.4g}\n{axis.title} {short(at[n][0])}"
        if models[n].meets is False:
            tip += "\ndoes not meet the constraints"
        if models[n].kind in MADE:
            chart.add(
                "circle", cx=place[0], cy=place[1], r=4.5 if n in front.front else 3.2, class_=class_, data_tip=tip
            )
        else:
            chart.add("rect", x=place[0] - 4.5, y=place[1] - 4.5, width=9, height=9, class_=class_, data_tip=tip)
    if front.knee is not None:
        chart.add("circle", cx=x(at[front.knee][0]), cy=y(at[front.knee][1]), r=9, class_="ring c4")
    if result.recommended in at:
        chart.add("circle", cx=x(at[result.recommended][0]), cy=y(at[result.recommended][1]), r=7, class_="ring chosen")
    _labels(chart, front, {n: (x(at[n][0]), y(at[n][1])) for n in front.points}, result)
    better = "left" if front.better == "minimize" else "right"
    upper = "below" if comparison.better == "minimize" else "above"
    bend = "it has no knee: too few points lie on it, or none below the line between its ends"
    if front.knee is not None:
        bend = f"its knee is {models[front.knee].name}"
    note = f"Better is {upper} and to the {better}. The line joins the models that no other betters in both; {bend}."
    rows: list[list[Cell]] = [
        [models[n].name, models[n].kind, *at[n], n in front.front, n == front.knee, models[n].meets, models[n].command]
        for n in front.points
    ]
    columns = ["model", "kind", front.axis, comparison.quality, "on the front", "knee", "meets constraints", "command"]
    return Figure(
        key, f"{comparison.quality} against {axis.title.split(',')[0]}", note, chart.render(note), columns, rows
    )


def _labels(chart: Chart, front: Front, places: dict[int, tuple[float, float]], result: ReportResult) -> None:
    """Names of the baselines, the knee and the recommended one, where they cover least of the points and each other."""
    special = [n for n in front.points if result.models[n].kind not in MADE or n in (front.knee, result.recommended)]
    if len(front.points) <= 8:
        special = front.points
    taken: list[tuple[float, float, float]] = []
    for n in special[:12]:
        name = cut(("recommended: " if n == result.recommended else "") + result.models[n].name, 34)
        wide = 6.6 * len(name)
        best: tuple[float, float, float, str] | None = None
        for step, (side, shift) in enumerate((s, h) for h in (4, -12, 20, -28, 36, -44, 52, -60) for s in (1, -1)):
            x, y = places[n][0] + 13 * side, places[n][1] + shift
            left = x if side == 1 else x - wide
            inside = left >= LEFT and left + wide <= WIDTH and TOP + 10 < y < chart.bottom - 2
            covered = sum(left - 3 < px < left + wide + 3 and y - 12 < py < y + 4 for px, py in places.values())
            crossed = sum(abs(y - other) < 13 and left < end and start < left + wide for start, end, other in taken)
            cost = 1000.0 * (not inside) + 200 * crossed + 4 * covered + step
            if best is None or cost < best[0]:
                best = (cost, x, y, "start" if side == 1 else "end")
        if best is not None:
            _, x, y, anchor = best
            taken.append((x, x + wide, y) if anchor == "start" else (x - wide, x, y))
            if abs(y - places[n][1]) > 15:
                chart.add("line", x1=places[n][0], y1=places[n][1], x2=x, y2=y - 4, class_="leader")
            chart.text(x, y, name, anchor=anchor)


def map_figure(key: str, one: BlockMap) -> Figure:
    """Sparsity by block and kind of matrix, the deeper the colour the more zeros."""
    note = f"Share of the weights that are zero, {one.model}: no colour is none, full colour is all."
    return _heat(key, f"Sparsity of {one.model}", note, "zero", one, 0.0, 1.0)


def allocation_figure(key: str, one: AllocationMap) -> Figure:
    """What was asked of every matrix, from the least to the most: small differences are the point of it."""
    low, high = one.least.sparsity, one.most.sparsity
    model, sign = one.map.model, "asked of" if one.pruned else "for"
    scale = f"no colour is the least, {low:.1%}, full colour the most, {high:.1%}"
    if low == high:
        low, high, scale = 0.0, 1.0, "no colour is none, full colour is all"
    note = f"Share of the weights that are to be zero, {sign} {model}: {scale}. Of all together {one.sparsity:.2%}."
    return _heat(key, f"Allocation {one.name}, {sign} {model}", note, "asked for", one.map, low, high)


def _heat(key: str, title: str, note: str, what: str, one: BlockMap, least: float, most: float) -> Figure:
    """Blocks by kinds of matrices, coloured from ``least`` (none) to ``most`` (full)."""
    left = 8 + 6.6 * max((len(cut(kind, 26)) for kind in one.kinds), default=1)
    wide = (WIDTH - RIGHT - left) / max(len(one.blocks), 1)
    high = 24
    chart = Chart("block", "", height=46 + high * len(one.kinds))
    for row, kind in enumerate(one.kinds):
        chart.text(left - 8, 10 + high * row + 16, cut(kind, 26), anchor="end", class_="tick")
        for column, block in enumerate(one.blocks):
            value = one.sparsity[row][column]
            if value is None:
                continue
            place = {"x": left + wide * column + 0.5, "y": 10 + high * row + 0.5, "width": wide - 1, "height": high - 1}
            tip = f"block {block}, {kind}\n{value:.2%} {what}"
            shade = max(0.0, min(1.0, (value - least) / (most - least)))
            chart.add("rect", **place, class_="cell", fill_opacity=f"{shade:.3f}", data_tip=tip)
            if wide >= 24:
                dark = " deep" if shade > 0.55 else ""
                middle = left + wide * (column + 0.5)
                chart.text(middle, 10 + high * row + 16, f"{value:.0%}", anchor="middle", class_=f"value{dark}")
    each = max(1, -(-int(5 + 8 * max((len(b) for b in one.blocks), default=1)) // int(max(wide, 1))))
    for column in range(0, len(one.blocks), each):
        middle = left + wide * (column + 0.5)
        chart.text(middle, 10 + high * len(one.kinds) + 15, one.blocks[column], anchor="middle", class_="tick")
    chart.text((left + WIDTH) / 2, chart.height - 4, "block", anchor="middle", class_="axis")
    rows: list[list[Cell]] = [
        [block, kind, one.sparsity[row][column]]
        for row, kind in enumerate(one.kinds)
        for column, block in enumerate(one.blocks)
    ]
    return Figure(key, title, note, chart.render(note), ["block", "matrix", "sparsity"], rows)


def sensitivity_figure(maps: Sequence[BlockMap]) -> Figure | None:
    """What pruning cost in each block, as a share of what it cost in all of them; for models that say it."""
    known = [one for one in maps if any(one.loss) and all(value is not None for value in one.loss)][: COLOURS - 1]
    if not known:
        return None
    longest = max(known, key=lambda one: len(one.blocks))
    series: list[tuple[str, list[float | None]]] = []
    rows: list[list[Cell]] = []
    for one in known:
        losses = {block: value or 0.0 for block, value in zip(one.blocks, one.loss, strict=True)}
        total = sum(losses.values())
        series.append((one.model, [100 * losses[b] / total if b in losses and total else None for b in longest.blocks]))
        rows += [[one.model, block, value, value / total if total else None] for block, value in losses.items()]
    note = (
        "Squared error that pruning left in the outputs of a block's matrices, by the method's estimate, in per cent "
        "of the model's sum: where pruning hurt most. Sums of different methods are not comparable, their shapes are."
    )
    svg = _lines(
        longest.blocks,
        [(name, values, None) for name, values in series],
        "block",
        "share of the error, %",
        note,
        first=1,
    )
    return Figure("sensitivity", "Sensitivity per block", note, svg, ["model", "block", "error", "share"], rows)


def loss_figure(
    key: str, title: str, x_title: str, note: str, seen: Sequence[tuple[Examined, list[GroupLoss]]]
) -> Figure:
    """Loss of groups of tokens: the dense model once, every pruned model of it beside, with standard errors."""
    labels = list(dict.fromkeys(group.label for _, groups in seen for group in groups))
    dense = {group.label: group for group in seen[0][1]}
    series = [
        (
            "dense",
            [dense[n].dense if n in dense else None for n in labels],
            [_error(dense.get(n), "dense") for n in labels],
        )
    ]
    rows: list[list[Cell]] = []
    for one, groups in seen[: COLOURS - 1]:
        own = {group.label: group for group in groups}
        values = [own[name].pruned if name in own else None for name in labels]
        series.append((one.model, values, [_error(own.get(name), "pruned") for name in labels]))
    for one, groups in seen:
        rows += [
            [one.model, g.label, g.tokens, g.dense, g.dense_stderr, g.pruned, g.pruned_stderr, g.difference,
             g.difference_stderr] for g in groups
        ]  # fmt: skip
    columns = [
        "model", x_title, "tokens", "dense loss", "standard error", "pruned loss", "standard error (pruned)",
        "difference", "standard error (difference)",
    ]  # fmt: skip
    return Figure(key, title, note, _lines(labels, series, x_title, "loss, nats per token", note), columns, rows)


def _error(group: GroupLoss | None, side: str) -> float | None:
    return None if group is None else group.dense_stderr if side == "dense" else group.pruned_stderr


Series = tuple[str, Sequence[float | None], Sequence[float | None] | None]


def _lines(
    names: Sequence[str], series: Sequence[Series], x_title: str, y_title: str, label: str, *, first: int = 0
) -> str:
    """Lines over named places, with bars of one standard error where there are any."""
    chart = Chart(x_title, y_title)
    ends = [
        value + sign * ((errors[i] if errors else None) or 0.0)
        for _, values, errors in series for i, value in enumerate(values) if value is not None for sign in (-1, 1)
    ]  # fmt: skip
    y = Scale.of(ends, chart.bottom, TOP, zero=True)
    chart.axes(None, y)
    middles = chart.names(names)
    colours = [f"c{(number + first) % COLOURS}" for number in range(len(series))]
    chart.legend([(colour, name) for colour, (name, _, _) in zip(colours, series, strict=True)])
    for colour, (name, values, errors) in zip(colours, series, strict=True):
        points = [(middles[i], y(value)) for i, value in enumerate(values) if value is not None]
        if points:
            chart.line(points, colour)
        for i, value in enumerate(values):
            if value is None:
                continue
            error = errors[i] if errors else None
            told = f" ± {error:.3g}" if error is not None else ""
            if error:
                chart.add(
                    "line",
                    x1=middles[i],
                    x2=middles[i],
                    y1=y(value - error),
                    y2=y(value + error),
                    class_=f"line {colour}",
                )
            tip = f"{name}\n{names[i]}: {value:.4g}{told}"
            chart.add("circle", cx=middles[i], cy=y(value), r=3.5, class_=f"mark {colour}", data_tip=tip)
    return chart.render(label)


def dense_first(models: Sequence[ReportModel]) -> list[ReportModel]:
    """Baselines before what was made of the dense model, each as they came."""
    order = {"dense": 0, "quantised": 1, "other": 2, "pruned": 3, "converted": 3}
    return sorted(models, key=lambda model: order[model.kind])
