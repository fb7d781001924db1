"""What was asked of a run: arguments of the call laid over a recipe, and those that nothing in it looks at."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import transformers

from secateur.allocation._base import Allocation, Searching, WithGradients, make_allocation
from secateur.allocation_file import is_file
from secateur.methods._quantised import bare
from secateur.plugins import Chooser, Method, draws, make_method
from secateur.progress import Reporter
from secateur.recipe import Recipe
from secateur.verbs.evaluate import has_language_head


def merge(
    recipe: Recipe | None, method: str | Chooser | None, settings: dict[str, Any]
) -> tuple[Chooser | None, Recipe]:
    """Lay keyword arguments over a recipe; a method object stands beside it, with its options noted in it."""
    values = recipe.as_asked() if recipe is not None else {}
    values.update(settings)
    if isinstance(method, str):
        if values.get("method") != method:
            values["method_options"] = settings.get("method_options", {})
        values["method"] = method
    elif method is not None:
        values["method"], values["method_options"] = getattr(method, "name", type(method).__name__), options_of(method)
    chosen = method if method is not None and not isinstance(method, str) else None
    return chosen, Recipe.from_dict(values, where="prune")


def options_of(method: Chooser | Allocation) -> dict[str, Any]:
    """The options of a method or an allocation rule by name, as its dataclass has them."""
    options: Any = method
    fields = dataclasses.fields(options) if dataclasses.is_dataclass(options) else ()
    return {entry.name: getattr(options, entry.name) for entry in fields}


def combination_sentences(recipe: Recipe) -> list[str]:
    """What the name of a combination stood for in this run; nothing where a method was named."""
    if recipe.combination is None:
        return []
    meant = f"{recipe.method} with --error-correction {recipe.error_correction}"
    return [f"Method {recipe.combination} stood for {meant}."]


def tell_combination(recipe: Recipe, reporter: Reporter) -> None:
    """Say before the work starts what the name of a combination stands for, and what is faster."""
    if recipe.combination is not None:
        meant = f"{recipe.method} with --error-correction {recipe.error_correction}"
        reporter.note(f"method {recipe.combination}: {meant}; --method sparsegpt takes about half the time")


def tell_unmeasured(
    given: Mapping[str, Any], evaluate: bool, skeleton: transformers.PreTrainedModel, reporter: Reporter
) -> None:
    """Warn of what was given to measure with and will not be looked at.

    Args:
        given: by name; what was left out is empty or None. ``files`` can be measured with every model, other texts
            only with one that has a language-model head, a ``prompt`` only with one that decodes.
    """
    decodes = skeleton.can_generate() and not skeleton.config.is_encoder_decoder
    name = type(skeleton).__name__
    for key, value in given.items():
        if not value:
            continue
        why = "" if evaluate else "with --no-evaluate"
        if not why and key == "prompt" and not decodes:
            why = f"on a {name}, which does not continue text"
        elif not why and key not in ("prompt", "files") and not has_language_head(skeleton):
            why = f"on a {name}, which has no language-model head"
        if why:
            reporter.warn(f"--{key.replace('_', '-')} has no effect {why}")


def tell_seed(recipe: Recipe, method: Chooser | None, reporter: Reporter) -> None:
    """Warn of a seed that was given where nothing in the run is drawn at random.

    Args:
        method: what chooses the weights or units that go; None where only an allocation is made.
    """
    if not _random(recipe, method):
        what = f"method {recipe.method}" if method is not None else f"allocation {recipe.allocation}"
        if {*recipe.structure} == {"depth"}:
            what = "the choice of blocks"
        elif method is not None and recipe.allocation != "uniform":
            what += f" with allocation {recipe.allocation}"
        reporter.warn(f"--seed has no effect: {what} draws nothing at random")


def _random(recipe: Recipe, method: Chooser | None) -> bool:
    """Whether the seed may change what a run makes. Criteria for units draw nothing, by their contract."""
    if recipe.reconstruct != "none" or (isinstance(method, Method) and draws(bare(method))):
        return True  # a reconstruction draws the order in which it learns
    if recipe.structure or is_file(recipe.allocation):
        return False
    rule = make_allocation(recipe.allocation, recipe.allocation_options)
    searching = isinstance(rule, Searching) and rule.generations > 0
    return searching or (isinstance(rule, WithGradients) and draws(make_method(rule.solver)))


def tell_unread(recipe: Recipe, given: bool, evaluate: bool, name: str, reporter: Reporter) -> None:
    """Warn of settings of a calibration that this run does not need.

    Args:
        given: data were handed over from Python.
        evaluate: quality is measured, in windows of the same length.
        name: of what needs no data.
    """
    asked = {
        "calibration": given or recipe.calibration != "builtin", "samples": recipe.samples is not None,
        "sequence_length": recipe.sequence_length is not None and not evaluate,
        "compute_dtype": recipe.compute_dtype != "auto", "activation_memory": recipe.activation_memory != "auto",
    }  # fmt: skip
    for key, said in asked.items():
        if said:
            reporter.warn(f"--{key.replace('_', '-')} has no effect: {name} needs no calibration data")
