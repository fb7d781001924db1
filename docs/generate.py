"""Write the generated parts of the documents, or with --check say which are out of date.

Each fact has one source: options come from the docstrings under the fields, the command reference from the command line
itself, the layout from the first line of each module. A generated part stands between two comments:

    <!-- generated: NAME -->
    ...
    <!-- end: NAME -->
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from plots import kernel_plot, solver_plot
from typer.core import TyperArgument, TyperGroup, TyperOption

from secateur.cli.app import app
from secateur.plugins import available, describe, option_help

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "secateur"


def cell(text: str) -> str:
    """Text that is safe in a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell(text) for text in line) + " |" for line in lines)


def plugin_table(kind: str) -> str:
    """One row for each plug-in of a folder."""
    rows = [[f"[`{name}`](#{name})", line] for name, line in available(kind).items()]
    return table(["name", "what it does"], rows)


def plugin_details(kind: str, noun: str) -> str:
    """What each plug-in says about itself, and its options."""
    parts = []
    for name in available(kind):
        description = describe(kind, name, noun)
        parts.append(f"### {name}\n\n```text\n{description.doc.strip()}\n```")
        if description.options:
            rows = [[f"`{o.name}`", f"`{o.type}`", f"`{o.default}`", o.help] for o in description.options]
            parts.append(table(["option", "type", "default", ""], rows))
    return "\n\n".join(parts)


def reconstruct_options() -> str:
    """The options of `prune --reconstruct`."""
    from secateur.engine.reconstruct import Reconstruction

    texts = option_help(Reconstruction)
    rows = [[f"`{f.name}`", str(f.type), f"{f.default:g}", texts[f.name]] for f in dataclasses.fields(Reconstruction)]
    return table(["option", "type", "default", ""], rows)


def command_reference() -> str:
    """Every command with its arguments and flags, as the command line itself knows them."""
    group = typer.main.get_command(app)
    if not isinstance(group, TyperGroup):
        raise SystemExit("error: the command line has no sub-commands")
    parts = []
    for name, command in leaves(group):
        arguments = [p for p in command.params if isinstance(p, TyperArgument)]
        options = [p for p in command.params if isinstance(p, TyperOption)]
        usage = " ".join(str(a.metavar) if a.required else f"[{a.metavar}]" for a in arguments)
        parts.append(f"## secateur {name}\n\n{command.help}\n\n```text\nsecateur {name} {usage} [OPTIONS]\n```")
        parts.append(table(["argument", "meaning"], [[f"`{a.metavar}`", a.help or ""] for a in arguments]))
        for panel in dict.fromkeys(option.rich_help_panel for option in options):
            rows = [[flags(o), o.help or "", default(o)] for o in options if o.rich_help_panel == panel]
            parts.append(table([panel or "flag", "meaning", "default"], rows))
    return "\n\n".join(parts)


def leaves(group: TyperGroup, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every command under its whole name, those of groups of commands too."""
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from leaves(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def flags(option: TyperOption) -> str:
    """All spellings of a flag; what a value must look like stands after one that says it."""
    value = f" {option.metavar}" if option.metavar else ""
    return ", ".join(f"`{name}{value}`" for name in [*option.opts, *option.secondary_opts])


def default(option: TyperOption) -> str:
    """The default of a flag as the help shows it."""
    if option.required:
        return "required"
    if isinstance(option.show_default, str):
        return option.show_default
    if isinstance(option.default, bool):
        return "on" if option.default else ""
    return "" if option.default is None else str(option.default)


def layout() -> str:
    """The tree of the package with the first line of each module's docstring."""
    lines = []
    for path in sorted(
        PACKAGE.rglob("*.py"), key=lambda p: (p.parent != PACKAGE, p.parent, p.stem != "__init__", p.name)
    ):
        relative = path.relative_to(PACKAGE)
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if not doc:
            raise SystemExit(f"error: {path.relative_to(ROOT)} has no docstring")
        first = re.split(r"(?<=\.) |\n", doc.strip(), maxsplit=1)[0].rstrip(".")
        if path.stem == "__init__":
            name = f"{relative.parent}/" if len(relative.parts) > 1 else "src/secateur/"
            name = name if len(relative.parts) == 1 else f"  {name}"
        else:
            name = "  " * len(relative.parts) + path.name
        lines.append(f"{name:<24} {first}".rstrip())
    return "```text\n" + "\n".join(lines) + "\n```"


def results(name: str) -> str:
    """The table of a benchmark, from the file that its script wrote, with machine and command."""
    data = measured(name)
    if data is None:
        return missing(name)
    columns = list(dict.fromkeys(key for row in data["rows"] for key in row))
    rows = [[shown(column, row.get(column)) for column in columns] for row in data["rows"]]
    return "\n\n".join([table(columns, rows), *origin(data)])


def measured(name: str) -> dict[str, Any] | None:
    """What the script of a benchmark wrote; None before it was run."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def missing(name: str) -> str:
    """What stands where a benchmark was not run yet."""
    return f"*Not measured yet: `benchmarks/results/{name}.json` is missing.*"


def origin(data: dict[str, Any]) -> list[str]:
    """How the figures of a benchmark were made: the protocol, then command and machine."""
    machine = data["machine"]
    return [
        data["protocol"],
        f"`{data['command']}`, commit {data['commit']}, on {machine['processor']}, {machine['cores']} cores, "
        f"Python {machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}.",
    ]


SOLVER_PLOT = "solver-size.svg"


def solver_sizes() -> str:
    """Time and memory of the methods by the size of the matrix: a plot, and a table for each."""
    data = measured("solver_size")
    if data is None:
        return missing("solver_size")
    sizes = list(dict.fromkeys((row["outputs"], row["inputs"]) for row in data["rows"]))
    cells = {(row["method"], row["outputs"], row["inputs"]): row for row in data["rows"]}
    methods = list(dict.fromkeys(row["method"] for row in data["rows"]))

    def by_size(column: str) -> str:
        rows = [
            [name, *(shown(column, cells.get((name, *size), {}).get(column)) for size in sizes)] for name in methods
        ]
        return table([column, *(f"{outputs}×{inputs}" for outputs, inputs in sizes)], rows)

    threads = data["machine"]["threads"]
    told = f"One thread of {data['machine']['cores']}" if threads == 1 else f"{threads} threads"
    columns = ("seconds", "peak MB", "of what is given")
    picture = f"![Seconds against the weights of a matrix, both on log scales]({SOLVER_PLOT})"
    return "\n\n".join([picture, *(by_size(column) for column in columns), f"{told}.", *origin(data)])


KERNEL_PLOT = "kernel-speed.svg"


def kernel_speeds() -> str:
    """Each format against our own dense one and against reading alone, by size and threads, and a plot."""
    data = measured("kernels")
    if data is None:
        return missing("kernels")
    sizes = list(dict.fromkeys(row["rows x columns"] for row in data["rows"]))
    cells = {(row["threads"], row["format"], row["rows x columns"]): row for row in data["rows"]}
    parts = [f"![Microseconds of one product against the weights of a matrix, both on log scales]({KERNEL_PLOT})"]
    for threads in dict.fromkeys(row["threads"] for row in data["rows"]):
        rows = []
        for name in dict.fromkeys(row["format"] for row in data["rows"]):
            own = [cells[threads, name, size] for size in sizes]
            bits = f"{own[0]['bits per weight']:.2f}"
            rows.append([name, bits, *(_kernel_cell(row["times dense"], row["of reading"]) for row in own)])
        parts += [table([f"{threads} thread" + "s" * (threads > 1), "bits a weight", *sizes], rows)]
    return "\n\n".join([*parts, *origin(data)])


def _kernel_cell(times: float | None, reading: float | None) -> str:
    return " ".join(([f"{times:.2f}"] if times else []) + ([f"({reading:.0%})"] if reading else []))


COLUMNS = {"blocks": "blocks found", "unstructured": "unstructured", "2:4": "2:4", "depth": "depth", "ffn": "ffn",
           "attention": "attention"}  # fmt: skip
"""Column of the coverage table -> its heading."""


def coverage() -> str:
    """The coverage table, from the rows that `make coverage` wrote: shares, a row a family, reasons, what is absent."""
    data = json.loads((ROOT / "benchmarks" / "results" / "coverage.json").read_text(encoding="utf-8"))
    rows = list(data["families"].values())
    built = [row for row in rows if row["built"]]
    attentive = [row for row in built if row["has_attention"]]
    shares = [[heading, *(share(among, column) for among in (built, attentive))] for column, heading in COLUMNS.items()]
    silent = [f"{row['kind']}/{row['family']}, {column}: {row[column]['why']}" for row in built for column in COLUMNS
              if row[column].get("silent")]  # fmt: skip
    bound = [row for row in attentive if "has no entries for" in row["attention"].get("why", "")]
    together = [row for row in built if "with hidden channels" in row["attention"].get("detail", "")]
    reasons: dict[str, int] = {}
    lines = []
    for row in built:
        cells = []
        for column in COLUMNS:
            cell_ = row[column]
            if cell_["ok"]:
                cells.append(cell_["detail"] if column == "blocks" else "yes")
            else:
                number = reasons.setdefault(general(cell_["why"]), len(reasons) + 1)
                cells.append(("**wrong** " if cell_.get("silent") else "no ") + f"({number})")
        lines.append([f"{row['family']}", f"`{row['class']}`", *cells])
    absent = [[f"{row['family']}", f"`{row['class']}`", row["why"]] for row in rows if not row["built"]]
    return "\n\n".join(
        [
            f"transformers {data['transformers']}, torch {data['torch']}, `{data['command']}`. "
            f"{len(built)} of {len(rows)} families build.",
            table(["", "of the families that build", "of those with an attention"], shares),
            f"Silent failures, a wrong or unloadable result reported as a success: {len(silent)}."
            + "".join(f"\n- {line}" for line in silent),
            f"In {len(together)} families with a yes under attention heads go only together with hidden channels. "
            f"No entry in the config of {len(bound)} families says fewer heads of the same size, alone or with hidden "
            "channels, and nothing else, so no stock class could load such a model.",
            "## Families",
            table(["family", "class", *COLUMNS.values()], lines),
            "## Why not",
            "\n".join(f"{number}. {cell(reason)}" for reason, number in reasons.items()),
            "## Not built",
            table(["family", "class", "what stopped it"], absent),
        ]
    )


def share(rows: list[dict[str, Any]], column: str) -> str:
    """How many rows have a yes in a column."""
    found = sum(row[column]["ok"] for row in rows)
    return f"{found} of {len(rows)}, {found / max(1, len(rows)):.1%}"


def general(reason: str) -> str:
    """A reason without the numbers and names of one family, so that equal ones come together."""
    reason = re.sub(r"\b[\w-]+(\.[\w-]+)+\b", "(a module)", reason)
    reason = re.sub(r"\b[A-Z]\w*(Model|ForCausalLM|For\w+|Encoder|Decoder|Config|HeadModel)\b", "(the class)", reason)
    return re.sub(r"\d[\d.,e+-]*(?<![.,])", "n", reason)


def shown(column: str, value: object) -> str:
    """A figure with the digits that mean something."""
    if isinstance(value, float):
        if column.split()[0] in ("blimp-34x100", "piqa-valid-first919"):
            return f"{value:.1%}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value)


PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "docs/methods.md": {
        "combinations": lambda: plugin_details("combinations", "method"),
        "methods": lambda: plugin_table("methods"),
        "reconstruct options": reconstruct_options,
        "allocation": lambda: plugin_table("allocation"),
        "method details": lambda: plugin_details("methods", "method"),
        "allocation details": lambda: plugin_details("allocation", "allocation"),
    },
    "docs/structured.md": {
        "criteria": lambda: plugin_table("criteria"),
        "criterion details": lambda: plugin_details("criteria", "method for --structure"),
    },
    "docs/experts.md": {
        "criteria": lambda: plugin_table("expert_criteria"),
        "criterion details": lambda: plugin_details("expert_criteria", "method for --structure experts"),
    },
    "docs/coverage.md": {"coverage": coverage},
    "docs/training.md": {"schedule details": lambda: plugin_details("schedules", "schedule")},
    "docs/sparse-format.md": {"sparse sizes": functools.partial(results, "sparse_size")},
    "docs/convert.md": {
        "conversions": lambda: plugin_table("conversions"),
        "conversion details": lambda: plugin_details("conversions", "conversion"),
    },
    "docs/cli.md": {"commands": command_reference},
    "docs/results.md": {
        name: functools.partial(results, name)
        for name in (
            "quality",
            "compute",
            "speed",
            "memory",
            "evaluation",
            "one_shot",
            "two_pass",
            "structured",
            "smaller",
            "conversions",
            "conversion_identity",
            "moe_decode",
            "shared_steps",
            "baselines",
            "noise",
            "recovery",
            "generalisation",
            "step_cost",
            "startup",
            "export_gguf",
            "rounding",
            "prefill",
            "loading",
            "decode",
            "study_sharing",
            "page",
        )
    }
    | {"solver_size": solver_sizes, "kernels": kernel_speeds},
    "CONTRIBUTING.md": {"layout": layout},
}
"""Document -> name of a generated part -> what makes it."""
DRAWINGS: dict[str, Callable[[], str | None]] = {
    f"docs/{SOLVER_PLOT}": lambda: solver_plot(measured("solver_size")),
    f"docs/{KERNEL_PLOT}": lambda: kernel_plot(measured("kernels")),
}
"""Drawing -> what makes it; None where there is nothing to draw, and then there is no file either."""


def filled(text: str, parts: dict[str, Callable[[], str]], where: str) -> str:
    """A document with its generated parts made anew."""
    for name, make in parts.items():
        pattern = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end: {name} -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise SystemExit(f"error: {where} needs the marks of the part '{name}' exactly once")
        body = make()
        text = pattern.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)  # type: ignore[misc]
    return text


def main(arguments: list[str] | None = None) -> int:
    """Write what changed, or with ``--check`` name it and return 1."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a part is out of date")
    check = parser.parse_args(arguments).check
    stale = []
    for name, parts in PARTS.items():
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        wanted = filled(text, parts, name)
        if wanted != text:
            stale.append(name)
            if not check:
                path.write_text(wanted, encoding="utf-8")
    for name, draw in DRAWINGS.items():
        path, drawing = ROOT / name, draw()
        if drawing != (path.read_text(encoding="utf-8") if path.is_file() else None):
            stale.append(name)
            if drawing is None and not check:
                path.unlink()
            elif drawing is not None and not check:
                path.write_text(drawing, encoding="utf-8")
    for name in stale:
        print(f"error: {name} is out of date; run: make docs" if check else f"wrote {name}", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
