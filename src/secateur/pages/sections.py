"""A report as sections of sentences, figures and tables: what the page and the Markdown both show, in their order."""

from __future__ import annotations

from dataclasses import dataclass, field

from secateur.pages.figures import (
    Cell,
    Figure,
    allocation_figure,
    dense_first,
    front_figures,
    loss_figure,
    map_figure,
    sensitivity_figure,
)
from secateur.pages.fronts import AXES
from secateur.pages.spreads import box_figure, damage_figure, spread_figure
from secateur.pages.svg import cut
from secateur.report_result import Comparison, Continued, Distribution, Examined, ReportResult


@dataclass
class Table:
    """A table; cells are values, written by `shown`."""

    key: str
    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""


@dataclass
class Section:
    """One part of the report."""

    key: str
    title: str
    text: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    continued: list[tuple[str, Continued]] = field(default_factory=list)
    """(pruned model, prompt and both continuations)."""


COLUMNS: tuple[tuple[str, str], ...] = (
    ("bits_per_byte", "bits per byte"),
    ("sparsity", "sparsity"), ("zeros", "zeros of all"), ("bytes_disk", "bytes on disk"), ("parameters", "parameters"),
    ("active_parameters", "active parameters"), ("bytes_resident", "resident bytes"),
    ("decode_speedup", "decoding, × dense"),
    ("sentences_speedup", "sentences/s, × dense"), ("sentences_per_second", "sentences/s"),
    ("sentences_speedup_batch_32", "sentences/s at batch 32, × dense"),
    ("sentences_per_second_batch_32", "sentences/s at batch 32"),
    ("joules_per_thousand_sentences", "joules/1,000 sentences"),
    ("decode_tokens_per_second", "decoding, tokens/s"), ("prefill_tokens_per_second", "prefill, tokens/s"),
    ("flops_per_token", "operations/token"), ("sparse_flops_per_token", "operations/token, zeros left out"),
    ("joules_per_token", "joules/token"), ("efficiency", "efficiency ratio"), ("seconds", "seconds to make"),
)  # fmt: skip
"""Value of a model -> its column, in order; quality comes first."""


def sections(result: ReportResult) -> list[Section]:
    """Everything but the answer."""
    found = [_front_section(n, c, drawn, result) for n, (c, drawn) in enumerate(front_figures(result))]
    found += [
        _allocations(result),
        _matrices(result),
        _losses(result),
        _continuations(result),
        *_breakage(result),
        _notes(result),
    ]
    return [one for one in found if one.text or one.figures or one.tables or one.continued]


def _front_section(number: int, comparison: Comparison, drawn: list[Figure], result: ReportResult) -> Section:
    again = any(other.source == comparison.source for other in result.comparisons[:number])
    title = f"Quality against cost: {comparison.source}" + (f", {cut(comparison.protocol, 60)}" if again else "")
    section = Section(f"comparison-{number}", title, figures=drawn)
    section.tables.append(_models(number, comparison, result))
    if comparison.protocol:
        section.text.append(f"Quality is {comparison.quality or 'not measured'}, on {comparison.protocol}.")
    for axis in AXES:
        if axis.name in comparison.missing:
            section.text.append(f"No front for {axis.title.split(',')[0]}: {comparison.missing[axis.name]}.")
    return section


def _models(number: int, comparison: Comparison, result: ReportResult) -> Table:
    """All models of a comparison, baselines first."""
    models = dense_first([result.models[n] for n in comparison.models])
    has = {name for model in models for name in model.values}
    qualities = [n for n in dict.fromkeys(n for model in models for n in model.values)
                 if n in ("perplexity", "nll_per_token") or n.startswith(("accuracy", "macro_f1"))]  # fmt: skip
    chosen = [*((name, name) for name in qualities), *((name, title) for name, title in COLUMNS if name in has)]
    spans = {name for model in models for name in model.intervals if name in qualities or "speedup" in name}
    columns = ["model", "kind"]
    for name, title in chosen:
        columns += [title, f"{title}, 95 %"] if name in spans else [title]
    judged = any(model.meets is not None for model in models)
    rows: list[list[Cell]] = []
    for m in models:
        cells: list[Cell] = [m.name, m.kind]
        for name, title in chosen:
            ends = m.intervals.get(name)
            told = f"{shown(title, ends[0])} to {shown(title, ends[1])}" if ends else None
            cells += [m.values.get(name), told] if name in spans else [m.values.get(name)]
        rows.append([*cells, *([m.meets] if judged else []), m.command])
    columns += [*(["meets constraints"] if judged else []), "command"]
    return Table(f"models-{number}", "All models", columns, rows)


def title_of(result: ReportResult) -> str:
    """What the report is of: the sources of its models, or the files where there is nothing but allocations."""
    sources = [comparison.source for comparison in result.comparisons]
    return ", ".join(dict.fromkeys(sources or [f"allocation {one.name}" for one in result.allocations]))


def _allocations(result: ReportResult) -> Section:
    section = Section("allocations", "What was asked of each matrix")
    section.figures = [allocation_figure(f"allocation-{n}", one) for n, one in enumerate(result.allocations)]
    rows: list[list[Cell]] = [
        [one.name, one.map.model, one.rule or None, one.matrices, one.sparsity, one.least.sparsity, one.least.name,
         one.most.sparsity, one.most.name, one.command] for one in result.allocations
    ]  # fmt: skip
    columns = ["allocation", "model", "made by", "matrices", "sparsity", "least", "least in", "most", "most in",
               "command"]  # fmt: skip
    section.tables = [Table("allocated", "Allocations", columns, rows)] if rows else []
    return section


def _matrices(result: ReportResult) -> Section:
    section = Section("matrices", "Where the zeros are, and where pruning hurt")
    for number, one in enumerate(result.maps):
        if any(value for row in one.sparsity for value in row):
            section.figures.append(map_figure(f"map-{number}", one))
        elif not one.gone:
            section.text.append(f"{one.model} has no zeros to draw: nothing was pruned, or whole units went.")
        if one.gone:
            section.text.append(f"{one.model}: {'; '.join(one.gone)}.")
    if result.undrawn:
        section.text.append(f"{result.undrawn} more models on the fronts are not drawn; their inputs have the numbers.")
    sensitivity = sensitivity_figure(result.maps)
    if sensitivity is not None:
        section.figures.append(sensitivity)
    elif result.maps:
        section.text.append("No figure of sensitivity: no input says what pruning cost each of its matrices.")
    return section


def _losses(result: ReportResult) -> Section:
    section = Section("losses", "Which tokens lose")
    section.text += [f"{one.model} was not run: {one.skipped}." for one in result.examined if one.skipped]
    for number, (source, seen) in enumerate(_by_source(result)):
        section.text.append(f"{source}: {seen[0].text}.")
        section.figures += [
            loss_figure(
                f"frequency-{number}", f"Loss by frequency of the token: {source}", "rank of the token in the text",
                "Tokens by how frequent they are in the whole text, rank 1 the most frequent; bars: standard errors.",
                [(one, one.by_frequency) for one in seen],
            ),
            loss_figure(
                f"position-{number}", f"Loss by position in the window: {source}", "tokens before it in the window",
                "Tokens by how much text the model has seen before them; bars are standard errors.",
                [(one, one.by_position) for one in seen],
            ),
        ]  # fmt: skip
    return section


def _by_source(result: ReportResult) -> list[tuple[str, list[Examined]]]:
    groups: dict[str, list[Examined]] = {}
    for one in result.examined:
        if not one.skipped and one.by_frequency:
            groups.setdefault(one.source, []).append(one)
    return list(groups.items())


def _continuations(result: ReportResult) -> Section:
    section = Section("continuations", "The same prompts, continued by both")
    section.continued = [(one.model, each) for one in result.examined for each in one.continued]
    return section


def _breakage(result: ReportResult) -> list[Section]:
    found = []
    for number, one in enumerate(one for one in result.examined if one.conditions):
        section = Section(f"breakage-{number}", f"What breaks in {one.model}, and why", list(one.why))
        section.figures = [
            spread_figure(f"spread-{number}-{d.quantity}", one.model, d)
            for d in one.distributions
            if d.condition == "clean"
        ]
        by_quantity: dict[str, list[Distribution]] = {}
        for spread in one.distributions:
            by_quantity.setdefault(spread.quantity, []).append(spread)
        section.figures += [
            box_figure(f"boxes-{number}-{quantity}", one.model, spreads)
            for quantity, spreads in by_quantity.items()
            if len(spreads) > 1
        ]
        damage = damage_figure(f"damage-{number}", one)
        section.figures += [damage] if damage is not None else []
        section.tables = [_conditions(number, one), _quantiles(number, one), _broken(number, one)]
        section.tables = [table for table in section.tables if table.rows]
        found.append(section)
    return found


def _conditions(number: int, one: Examined) -> Table:
    columns = [
        "text", "tokens", "dense loss", "pruned loss", "standard error (difference)", "right, dense", "right, pruned",
        "lost", "gained", "by length", "by direction", "added, dense", "added, pruned", "standard error (added)",
    ]  # fmt: skip
    rows: list[list[Cell]] = [
        [c.name, c.tokens, c.dense_loss, c.pruned_loss, c.difference_stderr, c.dense_right, c.pruned_right, c.lost,
         c.gained, c.length_part, c.direction_part, c.dense_damage, c.pruned_damage,
         c.damage_stderr] for c in one.conditions
    ]  # fmt: skip
    note = (
        "Losses in nats per token; right, lost, gained are shares of the tokens; by length and by direction add up to "
        "the difference; added is what the damage adds to the loss of the tokens left in place."
    )
    return Table(f"conditions-{number}", "Clean and damaged text", columns, rows, note)


def _quantiles(number: int, one: Examined) -> Table:
    sides = ("dense", "pruned", "change")
    levels = one.distributions[0].quantiles if one.distributions else []
    columns = ["text", "quantity", *(f"{side} {level:.0%}" for side in sides for level in levels)]
    rows: list[list[Cell]] = [
        [d.condition, d.quantity, *(value for side in sides for value in getattr(d, side))] for d in one.distributions
    ]
    note = "Angle in degrees, length as it is (its change: relative), margin in logits; quantiles over the tokens."
    return Table(f"quantiles-{number}", "Quantiles of angle, length and margin", columns, rows, note)


def _broken(number: int, one: Examined) -> Table:
    columns = [
        "text",
        "before it",
        "token",
        "strongest rival",
        "margin, dense",
        "margin, pruned",
        "angle",
        "length",
        "loss",
    ]
    rows: list[list[Cell]] = [
        [b.condition, b.before, b.token, b.rival, b.margin_dense, b.margin_pruned, b.angle_change, b.length_change,
         b.loss_change] for b in one.broken
    ]  # fmt: skip
    note = "Those whose margin fell farthest; angle, length (relative) and loss are changes from dense to pruned."
    return Table(f"broken-{number}", "The tokens that broke most", columns, rows, note)


def _notes(result: ReportResult) -> Section:
    section = Section("notes", "What the inputs say, and how they were made")
    for name, lines in result.verdicts.items():
        section.text += [f"{name}: {line}" for line in lines]
    for study, objectives in result.importances.items():
        rows: list[list[Cell]] = [[o, s, share] for o, shares in objectives.items() for s, share in shares.items()]
        section.tables.append(
            Table(f"importances-{len(section.tables)}", f"What matters most in {study}",
                  ["objective", "setting", "share"], rows,
                  "How far a setting tells the best quarter of the trials from the others (PED-ANOVA), as a share.")
        )  # fmt: skip
    if result.failures:
        names = ["origin", "trial", "state", "reason"]
        lost: list[list[Cell]] = [[failure.get(name, "") for name in names] for failure in result.failures]
        section.tables.append(Table("failures", "Trials that did not come to their end", names, lost))
    facts: list[list[Cell]] = [
        [name, key, str(value)] for name, machine in result.machines.items() for key, value in machine.items()
    ]
    facts += [["", library, version] for library, version in result.versions.items()]
    if facts:
        section.tables.append(Table("machines", "Machines and versions", ["input", "", "value"], facts))
    return section


def shown(column: str, value: Cell) -> str:
    """A cell for people, by the name of its column."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if column == "tokens":
        return f"{value:,.0f}"
    if column.endswith("bytes") or column == "bytes on disk":
        return f"{value / 1e6:,.1f} MB"
    shares = ("sparsity", "zeros of all", "least", "most", "lost", "gained", "share", "length")
    if column in shares or column.startswith(("right,", "accuracy", "macro_f1")):
        return f"{value:.1%}"
    if column.endswith("parameters") or abs(value) >= 10_000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.4g}"
    if column in ("perplexity", "efficiency ratio") or column.endswith("× dense"):
        return f"{value:,.2f}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
