"""Operations and parameters per token of a folder, with the reason where operations cannot be counted"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from secateur.engine.skeleton import build_skeleton
from secateur.errors import SecateurError
from secateur.layers.adapter_moe import AdapterMoe
from secateur.layers.fused import Fused
from secateur.layers.moe import MoeFfn
from secateur.measure.flops import count_flops
from secateur.study.values import FLOPS


def measure_flops(folder: Path, zeros: Mapping[str, float]) -> tuple[dict[str, float | None], dict[str, str]]:
    """Values of `FLOPS` for one folder, and why those that are None were not counted.

    Where each token goes through some experts alone (networks that were cut, models in one, adapters), also
    ``active_parameters``: what one token goes through.

    Args:
        zeros: prunable matrix -> share of its weights that are zero; nothing where whole units went instead.
    """
    try:
        skeleton = build_skeleton(folder)
        found = count_flops(skeleton, zeros)
    except SecateurError as error:
        return dict.fromkeys(FLOPS), dict.fromkeys(FLOPS, error.message)
    values: dict[str, float | None] = {
        "flops_per_token": found.per_token, "sparse_flops_per_token": found.sparse_per_token
    }  # fmt: skip
    left = [module.unread for module in skeleton.modules() if isinstance(module, MoeFfn | Fused | AdapterMoe)]
    if left:
        values["active_parameters"] = sum(one.numel() for one in skeleton.parameters()) - sum(left)
    return values, {}
