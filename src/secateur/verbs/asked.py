"""What was asked of a pruning run: arguments of the call laid over a recipe."""

from __future__ import annotations

import dataclasses
from typing import Any

from secateur.plugins import Chooser
from secateur.recipe import Recipe


def merge(
    recipe: Recipe | None, method: str | Chooser | None, settings: dict[str, Any]
) -> tuple[Chooser | None, Recipe]:
    """Lay keyword arguments over a recipe; a method object stands beside it, with its options noted in it."""
    values = recipe.to_dict() if recipe is not None else {}
    values.update(settings)
    if isinstance(method, str):
        if values.get("method") != method:
            values["method_options"] = settings.get("method_options", {})
        values["method"] = method
    elif method is not None:
        values["method"], values["method_options"] = getattr(method, "name", type(method).__name__), options_of(method)
    chosen = method if method is not None and not isinstance(method, str) else None
    return chosen, Recipe.from_dict(values, where="prune")


def options_of(method: Chooser) -> dict[str, Any]:
    """The options of a method by name, as its dataclass has them."""
    options: Any = method
    fields = dataclasses.fields(options) if dataclasses.is_dataclass(options) else ()
    return {entry.name: getattr(options, entry.name) for entry in fields}
