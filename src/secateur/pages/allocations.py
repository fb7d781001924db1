"""What an allocation asks of every matrix: of a file by itself, and of a model that was pruned with one."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from secateur.allocation_file import AllocationFile, is_file
from secateur.errors import UsageError
from secateur.pages.blocks import block_map
from secateur.report_result import AllocationMap
from secateur.result import AllocatedMatrix, PruneResult

_LARGEST = 1 << 62


def of_file(name: str, path: Path, found: AllocationFile) -> AllocationMap:
    """The allocation of a file, with the command that uses it.

    Args:
        name: what the file is called among the inputs.
    """
    # Anything may stand in a YAML file; a text is all that can be shown.
    model, rule = (value if isinstance(value, str) else "" for value in map(found.origin.get, ("model", "allocation")))
    command = shlex.join(["secateur", "prune", model or "MODEL", "--allocation", str(path)])
    made = _made(name, model or "an unnamed model", found.sparsities, found.shapes, command)
    made.rule = rule
    return made


def of_result(name: str, found: PruneResult) -> AllocationMap | None:
    """What was asked of the matrices of a pruned model; None where the same was asked of all of them.

    Args:
        name: of the model in the report.

    Raises:
        UsageError: when what was asked is no share.
    """
    if not found.allocation:
        return None
    odd = next((each for each, value in found.allocation.items() if not 0 <= value < 1), None)
    if odd is not None:
        raise UsageError(
            f"{name}: its allocation asks {found.allocation[odd]:g} of {odd}, not a share in [0, 1)",
            hint="the file is damaged, or no result of secateur",
        )
    shapes = {matrix.name: matrix.shape for matrix in found.matrices}
    made = _made(_called(found), name, found.allocation, shapes, "")
    made.pruned = True
    return made


def tell(allocations: Sequence[AllocationMap]) -> list[str]:
    """The answer of a report that has nothing but files: what each divides, and that nothing is known of its cost."""
    told = [
        f"{one.name} divides {one.sparsity:.2%} zeros among {one.matrices:,} matrices of {one.map.model}"
        f"{f' by {one.rule}' if one.rule else ''}: from {one.least.sparsity:.1%} in {one.least.name} to "
        f"{one.most.sparsity:.1%} in {one.most.name}."
        for one in allocations
    ]
    return [*told, "No input has a model that was pruned with it: what it costs is not known."]


def _called(found: PruneResult) -> str:
    """The name of a rule, or of a file, and what was laid over it."""
    asked, sparsity = str(found.recipe.get("allocation") or "uniform"), found.recipe.get("sparsity")
    name = Path(asked).name if is_file(asked) else asked
    if is_file(asked) and isinstance(sparsity, int | float) and found.recipe.get("pattern") == "unstructured":
        name += f", moved to {float(sparsity):.1%}"
    return name + (", with overrides" if found.recipe.get("overrides") else "")


def _made(
    name: str, model: str, sparsities: Mapping[str, float], shapes: Mapping[str, Sequence[int]], command: str
) -> AllocationMap:
    # A page is made of files that others wrote: no size may be too large to compute with.
    sizes = {each: min(max(math.prod(shapes.get(each, ())), 1), _LARGEST) for each in sparsities}
    total = sum(value * sizes[each] for each, value in sparsities.items()) / sum(sizes.values())
    least, most = (
        AllocatedMatrix(each, list(shapes.get(each, ())), sparsities[each])
        for each in (pick(sparsities, key=lambda one: sparsities[one]) for pick in (min, max))
    )
    return AllocationMap(name, total, len(sparsities), least, most, block_map(model, sparsities), command=command)
