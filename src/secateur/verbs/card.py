"""The model card (README.md) of a result: what was done and what was measured, for whoever finds the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from secateur.layers.spec import is_converted
from secateur.result import RESULT_FILE, ConvertResult, ExportResult, Measured, PruneResult, RecoverResult


def write_card(folder: Path, result: PruneResult) -> None:
    """Write README.md with the metadata block that the Hugging Face hub reads."""
    recipe = result.recipe
    done = f"pattern {recipe['pattern']}, {result.sparsity:.2%} of the prunable weights are zero"
    if recipe["structure"]:
        done = f"structure {', '.join(recipe['structure'])}, {result.sparsity:.2%} of the prunable weights are gone"
    what = (
        f"`{result.source['name']}`, pruned by [secateur](https://pypi.org/project/secateur/): method "
        f"{recipe['method']}, {done}."
    )
    _write(folder, result, what, "The whole recipe, versions, hashes and the result for every matrix are")


def write_recovery_card(folder: Path, result: RecoverResult) -> None:
    """The same for a model that was trained after pruning or conversion."""
    kind = "converted" if result.student.get("conversion") else "pruned"
    what = (
        f"`{result.student['name']}`, a {kind} model, trained by [secateur](https://pypi.org/project/secateur/) on "
        f"{result.training['tokens']:,} tokens"
    )
    if kind == "pruned" or result.zeros_held:
        what += f" with its {result.zeros_held:,} zeros held: {result.sparsity:.2%} of the prunable weights are zero"
    what += "."
    how = ORDINARY
    if is_converted(json.loads((folder / "config.json").read_text(encoding="utf-8"))):
        how = WITH_SECATEUR
    _write(folder, result, what, "Settings, losses, versions and hashes are", how=how)


def write_export_card(folder: Path, result: ExportResult) -> None:
    """README.md of an exported folder: what it was made from, and what it takes to open it."""
    what = f"`{result.source['name']}`, written by [secateur](https://pypi.org/project/secateur/)"
    if result.format == "hf":
        lines = [f"{what}.", "", "It is an ordinary checkpoint: `AutoModel...from_pretrained` loads it."]
    elif result.format == "torchao":
        lines = [
            f"{what} with the weights of its linear layers in 8 bits, and activations rounded to 8 bits as they come.",
            "",
            "transformers opens it where torchao is installed (`pip install torchao`): `AutoModel...from_pretrained`.",
        ]
    else:
        lines = [
            f"{what} with its zeros left out: {result.bits_per_weight:.2f} bits for each weight of its blocks.",
            "",
            "transformers opens it after `import secateur`, and not without: it would warn and make weights up.",
            "",
            "```python",
            "import secateur",
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")',
            "```",
            "",
            f"What became of every matrix, versions and hashes are in `{RESULT_FILE}`.",
        ]
    header = ["---", "library_name: transformers", "tags: [pruned, sparse, secateur]", "---", ""]
    text = "\n".join([*header, f"# {Path(result.out).name}", "", *lines, ""])
    (folder / "README.md").write_text(text, encoding="utf-8")


ORDINARY = "It is an ordinary checkpoint: `AutoModel...from_pretrained` loads it, secateur is not needed."


WITH_SECATEUR = "`import secateur` first; then `AutoModel...from_pretrained` loads it. No code is in the folder."


def write_conversion_card(folder: Path, result: ConvertResult) -> None:
    """The same for a model whose layers were converted, or for the difference of one."""
    what = (
        f"`{result.source['name']}`, converted by [secateur](https://pypi.org/project/secateur/): {result.conversion}, "
        + ", ".join(f"{name} {value}" for name, value in result.options.items() if value not in (None, [], "auto"))
        + "."
    )
    how = ORDINARY
    if result.options.get("format") == "delta":
        how = "It is no model by itself: `secateur convert FOLDER --to fused --base BASE -o MODEL` makes one."
    elif any(matrix.kind != "dense" for matrix in result.matrices):
        how = WITH_SECATEUR
    _write(folder, result, what, "All settings, versions, hashes and the result for every matrix are", "converted", how)


def _write(
    folder: Path, result: PruneResult | RecoverResult | ConvertResult, what: str, rest: str,
    tags: str = "pruned, sparse", how: str = ORDINARY,
) -> None:  # fmt: skip
    lines = [
        "---",
        "library_name: transformers",
        f"tags: [{tags}, secateur]",
        "---",
        "",
        f"# {Path(result.out).name}",
        "",
        what,
        "",
        how,
        "",
        "| | before | after |",
        "|---|---|---|",
        *(f"| {title} | {before} | {after} |" for title, before, after in _rows(result.before, result.after)),
        "",
        *(f"- {sentence}" for sentence in result.verdict),
        "",
        "## How it was made",
        "",
        *_lines(result.protocol),
        f"- verified after writing: {'yes' if result.verified else 'no'}",
        "",
        f"{rest} in `{RESULT_FILE}`.",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _lines(protocol: dict[str, Any], indent: str = "") -> list[str]:
    """A protocol as a list, what is nested one step further in."""
    lines = []
    for key, value in protocol.items():
        title = f"{indent}- {key.replace('_', ' ')}:"
        lines += [title, *_lines(value, indent + "  ")] if isinstance(value, dict) else [f"{title} {value}"]
    return lines


def _rows(before: Measured, after: Measured) -> list[tuple[str, str, str]]:
    def row(title: str, name: str, form: str) -> tuple[str, str, str] | None:
        values = [getattr(side, name) for side in (before, after)]
        if all(value is None for value in values):
            return None
        first, second = ("-" if value is None else form.format(value) for value in values)
        return title, first, second

    rows = [
        row("perplexity", "perplexity", "{:.2f}"),
        row("sparsity of the prunable weights", "sparsity", "{:.2%}"),
        row("parameters", "parameters", "{:,}"),
        row("weights that are not zero", "nonzero", "{:,}"),
        row("bytes on disk", "bytes_disk", "{:,}"),
        row("bytes in memory", "bytes_resident", "{:,}"),
        row("decoded tokens per second", "decode_tokens_per_second", "{:.1f}"),
    ]
    rows += [
        (f"accuracy, {name}", f"{value:.2%}", f"{after.accuracy[name]:.2%}")
        for name, value in before.accuracy.items()
        if name in after.accuracy
    ]
    return [entry for entry in rows if entry is not None]
