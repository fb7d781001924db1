"""Which inputs a pruning run may put in another order first, and what it says of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from secateur.engine.permute import FreeChannels
from secateur.engine.plan import Plan
from secateur.errors import UnsupportedModelError
from secateur.methods._common import is_identity
from secateur.progress import Reporter
from secateur.recipe import Recipe
from secateur.structured.free_channels import find_free_channels
from secateur.verbs.shape import Model


def free_channels(
    recipe: Recipe, opened: Model, plan: Plan, reporter: Reporter
) -> Mapping[int, Sequence[FreeChannels]]:  # fmt: skip
    """By block what may change places in the matrices that are pruned; says what is left in its order.

    Raises:
        UnsupportedModelError: when it was asked for and there is nothing.
    """
    names = [name for name, target in plan.targets.items() if not is_identity(target)]
    found = find_free_channels(
        opened.skeleton, opened.structure, opened.binding, opened.reader, names, recipe.parsed_pattern
    )
    if not found.free and recipe.permute:
        raise UnsupportedModelError(
            f"--permute finds nothing to put in another order: {'; '.join(found.lines()) or 'no matrix is pruned'}",
            hint="leave --permute out",
        )
    for line in found.lines():
        reporter.note(line)
    return found.free
