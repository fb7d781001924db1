"""``secateur prune``: flags and recipe file to a recipe, the run, and the table before and after."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.allocation_file import is_file
from secateur.cli import console, tables
from secateur.cli.options import (
    CALIBRATION_PANEL,
    MACHINE_PANEL,
    OUTPUT_PANEL,
    Debug,
    Device,
    Json,
    Model,
    Quiet,
    name_of,
    parse_pairs,
)
from secateur.cli.options import recipe_option as option
from secateur.errors import UsageError
from secateur.progress import Reporter
from secateur.recipe import Recipe, load_recipe
from secateur.result import read_after

Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        show_default="MODEL-METHOD-SPARSITY in the current folder",
        rich_help_panel=OUTPUT_PANEL,
        help="Folder to write.",
    ),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="FILE",
        rich_help_panel="What to prune and how",
        help="A YAML file with the same names as the flags; flags win.",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", rich_help_panel=OUTPUT_PANEL, help="Go on with a run that was interrupted.")
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", rich_help_panel=OUTPUT_PANEL, help="Replace OUT; it stays until the new one is whole."),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        rich_help_panel=OUTPUT_PANEL,
        help="Reload OUT in a fresh process with the stock loader and compare it with what was made.",
    ),
]
Measure = Annotated[
    bool,
    typer.Option(
        "--evaluate/--no-evaluate",
        rich_help_panel=OUTPUT_PANEL,
        help="Measure quality, memory and speed before and after.",
    ),
]
MeasureData = Annotated[
    str,
    typer.Option(
        "--data", rich_help_panel=OUTPUT_PANEL, help="Text to measure on: a text file, a dataset, or builtin."
    ),
]
MeasureFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--files",
        metavar="FILE",
        rich_help_panel=OUTPUT_PANEL,
        help="JSONL of pairs (good, bad) or multiple choice to measure accuracy on; can be given again.",
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt", rich_help_panel=OUTPUT_PANEL, help="Text that both models continue.", show_default="a short one"
    ),
]

Beside = Annotated[
    list[Path] | None,
    typer.Option(
        "--beside",
        metavar="FOLDER",
        rich_help_panel=OUTPUT_PANEL,
        help="Result of an earlier run on the same model, shown as one more column; can be given again.",
    ),
]

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", rich_help_panel=OUTPUT_PANEL, help="With --structure or --budget: print the plan and stop there."
    ),
]


def prune(
    model: Model,
    method: Annotated[str | None, option("method")] = None,
    sparsity: Annotated[float | None, option("sparsity")] = None,
    pattern: Annotated[str | None, option("pattern")] = None,
    permute: Annotated[bool | None, option("permute", "--permute/--no-permute")] = None,
    structure: Annotated[list[str] | None, option("structure", metavar="NAMES")] = None,
    budget: Annotated[str | None, option("budget", metavar="KEY=VALUE")] = None,
    depth_by: Annotated[str | None, option("depth_by")] = None,
    round_to: Annotated[int | None, option("round_to")] = None,
    update: Annotated[bool | None, option("update", "--update/--no-update")] = None,
    refit: Annotated[bool | None, option("refit", "--refit/--no-refit")] = None,
    error_correction: Annotated[str | None, option("error_correction")] = None,
    reconstruct: Annotated[str | None, option("reconstruct")] = None,
    reconstruct_options: Annotated[
        list[str] | None, option("reconstruct_options", "--reconstruct-option", metavar="KEY=VALUE")
    ] = None,
    bits: Annotated[int | None, option("bits")] = None,
    group_size: Annotated[int | None, option("group_size")] = None,
    allocation: Annotated[str | None, option("allocation", metavar="NAME|FILE")] = None,
    allocation_options: Annotated[
        list[str] | None, option("allocation_options", "--allocation-option", metavar="KEY=VALUE")
    ] = None,
    method_options: Annotated[
        list[str] | None, option("method_options", "--method-option", metavar="KEY=VALUE")
    ] = None,
    targets: Annotated[list[str] | None, option("targets", metavar="PATTERN")] = None,
    ignore: Annotated[list[str] | None, option("ignore", metavar="PATTERN")] = None,
    overrides: Annotated[list[str] | None, option("overrides", "--override", metavar="PATTERN=SPARSITY")] = None,
    seed: Annotated[int | None, option("seed")] = None,
    recipe: RecipeFile = None,
    calibration: Annotated[str | None, option("calibration", panel=CALIBRATION_PANEL)] = None,
    samples: Annotated[int | None, option("samples", panel=CALIBRATION_PANEL)] = None,
    sequence_length: Annotated[int | None, option("sequence_length", panel=CALIBRATION_PANEL)] = None,
    device: Device = None,
    dtype: Annotated[str | None, option("dtype", panel=MACHINE_PANEL)] = None,
    compute_dtype: Annotated[str | None, option("compute_dtype", panel=MACHINE_PANEL)] = None,
    activation_memory: Annotated[str | None, option("activation_memory", panel=MACHINE_PANEL)] = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    verify: Verify = True,
    evaluate: Measure = True,
    data: MeasureData = "builtin",
    files: MeasureFiles = None,
    prompt: Prompt = None,
    beside: Beside = None,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prune a model, write it as an ordinary folder, verify what was written, and measure before and after."""
    flags = {
        "method": method,
        "sparsity": sparsity,
        "pattern": pattern,
        "permute": permute,
        "structure": structure,
        "budget": budget,
        "depth_by": depth_by,
        "round_to": round_to,
        "update": update,
        "refit": refit,
        "error_correction": error_correction,
        "reconstruct": reconstruct,
        "reconstruct_options": parse_pairs("--reconstruct-option", reconstruct_options or [], "passes=2"),
        "bits": bits,
        "group_size": group_size,
        "allocation": allocation,
        "allocation_options": parse_pairs("--allocation-option", allocation_options or [], "spread=0.1"),
        "method_options": parse_method_options(method_options or []),
        "targets": targets,
        "ignore": ignore,
        "overrides": parse_overrides(overrides or []),
        "seed": seed,
        "calibration": calibration,
        "samples": samples,
        "sequence_length": sequence_length,
        "device": device,
        "dtype": dtype,
        "compute_dtype": compute_dtype,
        "activation_memory": activation_memory,
    }
    # The seed once more: who types one expects something of it.
    typed: dict[str, Any] = {} if seed is None else {"seed": seed}
    with console.working(quiet=quiet) as reporter:
        final = build_recipe(flags, recipe, reporter)
        earlier = [(folder.name, *read_after(folder)) for folder in beside or ()]
    if dry_run:
        _plan(model, final, json=json, quiet=quiet)
        return
    with console.working(quiet=quiet) as reporter:
        where = out if out is not None else default_out(model, final)
        if out is None:
            reporter.note(f"the result goes to {where}")
        from secateur.verbs.prune import prune as run

        result = run(
            model,
            where,
            recipe=final,
            resume=resume,
            overwrite=overwrite,
            verify=verify,
            evaluate=evaluate,
            data=data,
            files=files or (),
            prompt=prompt,
            reporter=reporter,
            **typed,
        )
        shown = []
        for name, digest, measured in earlier:
            if digest == result.source["sha256"]:
                shown.append((name, measured))
            else:
                reporter.warn(f"--beside {name} started from another model: it is not shown")
    console.emit(result, json=json, render=lambda: tables.pruned(result, shown))


def _plan(model: str, recipe: Recipe, *, json: bool, quiet: bool) -> None:
    with console.working(quiet=quiet) as reporter:
        from secateur.verbs.prune import plan

        planned = plan(model, recipe=recipe, reporter=reporter)
    console.emit(planned, json=json, render=lambda: tables.planned(planned))


def build_recipe(flags: Mapping[str, Any], file: Path | None, reporter: Reporter) -> Recipe:
    """Lay the flags that were given over the recipe file.

    A flag replaces the value of the file. ``--method-option`` replaces one option, not all; but the options in the
    file belong to the file's method and are left out, with a warning, when ``--method`` names another. The same holds
    for ``--allocation-option``.

    Raises:
        RecipeError: for an unknown key or a value of the wrong kind in the file.
        UsageError: for a flag with a value that makes no sense.
    """
    given = {name: value for name, value in flags.items() if value is not None and value != [] and value != {}}
    recipe = _laid_over(given, file, reporter)
    # Unused at their default, they do no harm in a file; who types one expects something of it.
    recipe.refuse_unused(name for name in ("round_to", "update") if name in given)
    return recipe


def _laid_over(given: dict[str, Any], file: Path | None, reporter: Reporter) -> Recipe:
    if file is None:
        return Recipe.from_dict(given, where="flags")
    data = {str(key).replace("-", "_"): value for key, value in load_recipe(file).items()}
    Recipe.from_dict(data, where=str(file))  # a fault of the file is told as one of the file
    for owner in ("method", "allocation", "reconstruct"):
        name = f"{owner}_options"
        options = data.get(name)
        if not isinstance(options, Mapping):
            continue
        said = given.get(owner, data.get(owner))
        if said == data.get(owner) or (owner == "reconstruct" and said != "none"):  # every way has the same options
            given[name] = {**options, **given.get(name, {})}
        else:
            data.pop(name)
            reporter.warn(f"{file}: {name} are left out, they belong to {data.get(owner, f'the default {owner}')}")
    return Recipe.from_dict({**data, **given}, where=f"{file} with flags")


def parse_method_options(texts: Sequence[str]) -> dict[str, str]:
    """Read ``KEY=VALUE`` texts; the method turns the values into their types.

    Raises:
        UsageError: for a text without ``=`` or a key given twice.
    """
    return parse_pairs("--method-option", texts, "damping=0.05")


def parse_overrides(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Read ``PATTERN=SPARSITY`` texts; the last ``=`` divides, since a regular expression may hold one.

    Raises:
        UsageError: for a text of another form.
    """
    overrides = []
    for text in texts:
        match, _, sparsity = text.rpartition("=")
        try:
            value = float(sparsity)
        except ValueError:
            match = ""
        if not match:
            raise UsageError(
                f"--override '{text}' is not PATTERN=SPARSITY", hint="for example: --override '*down_proj*=0.6'"
            )
        overrides.append({"match": match, "sparsity": value})
    return overrides


def default_out(model: str, recipe: Recipe) -> Path:
    """The folder to write when none is given: ``demo-wanda-0.5``, ``Llama-3.2-1B-alps-2-4``, ``demo-bytes-0.75``.

    Raises:
        UsageError: when no name can be made from MODEL.
    """
    if recipe.budget is not None:
        return Path(f"{name_of(model)}-{re.sub(r'[^0-9A-Za-z.]+', '-', recipe.budget)}")
    pattern = recipe.parsed_pattern
    amount = f"{recipe.effective_sparsity:g}" if pattern.unstructured else f"{pattern.keep}-{pattern.group}"
    done = "-".join(recipe.structure) or recipe.method
    if is_file(recipe.allocation) and recipe.sparsity is None and pattern.unstructured:
        amount = Path(recipe.allocation).stem
    return Path(f"{name_of(model)}-{done}-{amount}")
