"""Where the weights of a training are, and which schedule can be followed there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from secateur.errors import UsageError
from secateur.recovery.parts import in_parts
from secateur.schedules import Matrix, Schedule


def check_placement(args: Any, model: nn.Module, matrices: Sequence[Matrix], schedule: Schedule) -> None:
    """Refuse a training in which the schedule would not see or reach the weights.

    Args:
        args: those of the Trainer.

    Raises:
        UsageError: naming what divides the weights.
    """
    if getattr(args, "deepspeed", None) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise UsageError(
            "SparsityCallback cannot follow DeepSpeed, which updates copies of the weights",
            hint="train with data parallelism, or with FSDP2 and schedule hold",
        )
    kinds = {type(module).__name__ for module in model.modules()}
    if "FullyShardedDataParallel" in kinds or any(matrix.parameter.numel() == 0 for matrix in matrices):
        raise UsageError(
            "SparsityCallback cannot follow FSDP1, which flattens the weights",
            hint="use FSDP2 (fsdp_config version 2) and schedule hold, or data parallelism",
        )
    divided = [matrix for matrix in matrices if in_parts(matrix.parameter)]
    if not divided:
        return
    if not _by_fsdp2(model, divided):
        raise UsageError(
            f"SparsityCallback cannot follow tensor parallelism, which cuts {divided[0].name}",
            hint="train with data parallelism, or with FSDP2 and schedule hold",
        )
    if not getattr(schedule, "in_parts", False):
        raise UsageError(
            f"schedule {schedule.name} compares the weights of whole matrices, and FSDP2 leaves each process a part",
            hint="use schedule hold, or data parallelism",
        )


def _by_fsdp2(model: nn.Module, matrices: Sequence[Matrix]) -> bool:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import Replicate, Shard

    cuts = {type(cut) for matrix in matrices for cut in cast("Any", matrix.parameter).placements}
    return any(isinstance(module, FSDPModule) for module in model.modules()) and cuts <= {Shard, Replicate}
