"""A report as Markdown, for terminals and CI. No text of a result means anything to Markdown or to HTML in it."""

from __future__ import annotations

from secateur.pages.sections import Table, sections, shown, title_of
from secateur.pages.svg import clean
from secateur.report_result import ReportResult


def markdown(result: ReportResult) -> str:
    """The report as Markdown, for terminals and CI: the answer, and every table that the page has or draws."""
    lines = ["# Report: " + _cell(title_of(result)), ""]
    lines += [_cell(sentence) for sentence in result.answer]
    if result.command:
        lines += ["", *_fence(result.command)]
    lines += ["", *(f"- warning: {_cell(text)}" for text in result.warnings)]
    for section in sections(result):
        lines += ["", f"## {_cell(section.title)}", ""]
        for text in section.text:
            lines += [_cell(text), ""]
        for figure in section.figures:
            # Of a front its own members, of a long list of cells nothing: the page and the JSON have them.
            rows = [row for row in figure.rows if row[4]] if figure.key.startswith("front-") else figure.rows
            if figure.key.startswith(("front-", "frequency-", "position-", "damage-", "sensitivity")):
                lines += [*_table(Table(figure.key, figure.title, figure.columns, rows, figure.note)), ""]
        for table in section.tables:
            lines += [*_table(table), ""]
        for model, each in section.continued:
            lines += [f"- prompt: {_cell(each.prompt)}", f"  - dense: {_cell(each.dense)}",
                      f"  - {_cell(model)}: {_cell(each.pruned)}"]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def _table(table: Table) -> list[str]:
    lines = [f"### {_cell(table.title)}", ""]
    lines += [_cell(table.note), ""] if table.note else []
    heads = [column or " " for column in table.columns]
    lines.append("| " + " | ".join(_cell(head) for head in heads) + " |")
    lines.append("|" + " --- |" * len(heads))
    for row in table.rows:
        cells = [shown(column, value) for column, value in zip(table.columns, row, strict=True)]
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return lines


_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\`*_[]|~"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"})


def _cell(text: str) -> str:
    """A text on one line that means nothing to Markdown and HTML."""
    return " ".join(clean(text).split()).translate(_MARKDOWN)


def _fence(text: str) -> list[str]:
    """A text as code, in a fence that is longer than any in it."""
    text = " ".join(clean(text).split())
    ticks = "`" * max(
        3, 1 + max((len(run) for run in text.replace("`", " ` ").split() if set(run) == {"`"}), default=0)
    )
    ticks = ticks if ticks not in text else "`" * (text.count("`") + 3)
    return [f"{ticks}bash", text, ticks]
