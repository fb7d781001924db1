"""`secateur allocate`: divide a sparsity among the matrices of a model, and write who gets how much."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from secateur.allocation._base import make_allocation
from secateur.allocation_file import ENDINGS, AllocationFile, is_file, write_allocation
from secateur.checkpoint.source import open_source
from secateur.errors import OutputError, UsageError
from secateur.progress import Recorder, Reporter
from secateur.recipe import Recipe
from secateur.result import AllocatedMatrix, AllocateResult
from secateur.verbs.asked import options_of, tell_seed, tell_unread
from secateur.verbs.calibration import Data
from secateur.verbs.job import prepare
from secateur.verbs.provenance import peak_rss_bytes

DEFAULT = "sensitivity"
"""The rule when none is named."""
_LOOKED_AT = {
    "allocation", "allocation_options", "sparsity", "targets", "ignore", "overrides", "calibration", "samples",
    "sequence_length", "seed", "device", "compute_dtype", "activation_memory",
}  # fmt: skip


def allocate(
    model: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    calibration: str | Path | Data | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    **settings: Any,
) -> AllocateResult:
    """Divide a sparsity by a rule and write a file for ``prune(..., allocation=out)``. No weight is changed.

    Args:
        model: a folder, a hub id, a ``.gguf`` file, or ``demo``.
        out: YAML file to write.
        recipe: ``settings`` are fields of `Recipe` by name and win over it; those that say how weights are pruned are
            not looked at. Without a recipe the rule is sensitivity.
        calibration: as in the recipe, or token ids (n, L), or a list of forward arguments.
        overwrite: replace an existing file.

    Raises:
        SecateurError: for bad input; nothing was written.
    """
    started = time.monotonic()
    recorder = Recorder(reporter)
    where = Path(out)
    _check_out(where, overwrite)
    if isinstance(calibration, str | Path):
        settings["calibration"] = str(calibration)
    own_data = None if isinstance(calibration, str | Path) else calibration
    asked = {"allocation": DEFAULT} if recipe is None else recipe.to_dict()
    if recipe is not None and recipe.structure:
        raise UsageError("an allocation divides zeros, and --structure removes whole units", hint="leave it out")
    odd = next((name for name in settings if name not in _LOOKED_AT), None)
    if odd is not None and odd in Recipe.__dataclass_fields__:
        raise UsageError(f"{odd} has no meaning for an allocation", hint=f"it looks at {', '.join(sorted(_LOOKED_AT))}")
    values = {name: value for name, value in asked.items() if name in _LOOKED_AT} | settings
    final = Recipe.from_dict({**values, "method": "magnitude"}, where="allocate")
    with ExitStack() as stack:
        source = open_source(model, reporter=recorder)
        job = prepare(source, final, None, own_data, recorder, stack)
        if not job.calibration_read:
            tell_unread(final, own_data is not None, False, f"allocation {final.allocation}", recorder)
        if "seed" in settings:
            tell_seed(final, None, recorder)
        shapes = {spec.name: spec.shape for spec in job.structure.matrices}
        sizes = {spec.name: spec.size for spec in job.structure.matrices}
        sparsities = {name: target.sparsity for name, target in job.plan.targets.items()}
    total = sum(sizes[name] * value for name, value in sparsities.items()) / sum(sizes[name] for name in sparsities)
    options = {}
    if not is_file(final.allocation):
        options = options_of(make_allocation(final.allocation, final.allocation_options))
    origin = {"model": str(model), "allocation": final.allocation, "options": options}
    write_allocation(where, AllocationFile(sparsities, {name: shapes[name] for name in sparsities}, total, origin))
    return AllocateResult(
        out=str(where),
        model=str(model),
        allocation=final.allocation,
        allocation_options=options,
        sparsity=total,
        matrices=[AllocatedMatrix(name, shapes[name], value) for name, value in sparsities.items()],
        protocol=job.calibration_protocol,
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss_bytes(),
        warnings=recorder.warnings,
    )


def _check_out(where: Path, overwrite: bool) -> None:
    if not is_file(where.name):
        raise OutputError(f"{where} does not end in {' or '.join(ENDINGS)}", hint="an allocation is a YAML file")
    if where.is_dir() or (where.exists() and not overwrite):
        raise OutputError(f"{where} exists", hint="choose another file, or give --overwrite to replace it")
    if not where.absolute().parent.is_dir():
        raise OutputError(f"there is no folder {where.absolute().parent}", hint="make it first")
