"""Operations per token of a folder, with the reason where they cannot be counted"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from secateur.engine.skeleton import build_skeleton
from secateur.errors import SecateurError
from secateur.measure.flops import count_flops
from secateur.study.values import FLOPS


def measure_flops(folder: Path, zeros: Mapping[str, float]) -> tuple[dict[str, float | None], dict[str, str]]:
    """Values of `FLOPS` for one folder, and why those that are None were not counted.

    Args:
        zeros: prunable matrix -> share of its weights that are zero; nothing where whole units went instead.
    """
    try:
        found = count_flops(build_skeleton(folder), zeros)
    except SecateurError as error:
        return dict.fromkeys(FLOPS), dict.fromkeys(FLOPS, error.message)
    return {"flops_per_token": found.per_token, "sparse_flops_per_token": found.sparse_per_token}, {}
