"""Operations per token of a folder, where the counter of `secateur.measure` can be had"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.engine.skeleton import build_skeleton
from secateur.errors import SecateurError
from secateur.study.values import FLOPS

MODULE = "secateur.measure.flops"


def can_count() -> bool:
    """Whether there is a counter at all."""
    return importlib.util.find_spec(MODULE) is not None


def measure_flops(folder: Path, zeros: Mapping[str, float]) -> tuple[dict[str, float | None], dict[str, str]]:
    """Values of `FLOPS` for one folder, and why those that are None were not counted.

    Args:
        zeros: prunable matrix -> share of its weights that are zero; nothing where whole units went instead.
    """
    none: dict[str, float | None] = dict.fromkeys(FLOPS)
    if not can_count():
        return none, dict.fromkeys(FLOPS, "this version of secateur has no counter of operations")
    count: Any = importlib.import_module(MODULE).count_flops
    try:
        found = count(build_skeleton(folder), zeros)
    except SecateurError as error:
        return none, dict.fromkeys(FLOPS, error.message)
    return {"flops_per_token": float(found.per_token), "sparse_flops_per_token": float(found.sparse_per_token)}, {}
