"""What the criteria that score every unit once share."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import WeightValueError
from secateur.masks import lowest_per_row


def best_units(score: Tensor, remove: int, parts: int) -> Tensor:
    """Numbers of the units that stay, ascending: the same number of the lowest goes from each part.

    Args:
        score: (units,), any float.
        remove: units to remove in all, a multiple of ``parts``; of equal scores the lower number goes first.

    Raises:
        WeightValueError: when a score is not finite.
    """
    if not bool(score.isfinite().all()):
        raise WeightValueError("a pruning score is not finite", hint="check the weights and the calibration data")
    keep = lowest_per_row(score.reshape(parts, -1), remove // parts)
    return keep.reshape(-1).nonzero().squeeze(1).cpu()


def column_scores(of_columns: Tensor, columns: Tensor) -> Tensor:
    """Sum over the columns of each unit, (units,)."""
    total: Tensor = of_columns[columns.to(of_columns.device)].sum(dim=1)
    return total


def squared_norms(weight: Tensor) -> Tensor:
    """Squared norm of each column of (out, in), in float64 where the device has it."""
    number = torch.float32 if weight.device.type == "mps" else torch.float64
    return weight.to(number).square().sum(dim=0)
