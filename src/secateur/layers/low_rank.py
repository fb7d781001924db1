"""A linear layer as two in sequence: x -> B x (rank numbers) -> A (B x) + bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from secateur.layers.replace import sizes

NAMES = ("1.weight", "0.weight")
"""A (out, rank) and B (rank, in)."""
BIAS = "1.bias"


class LowRank(nn.Sequential):
    """Two ``nn.Linear``; the first has no bias."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, like: torch.Tensor) -> None:
        made: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        super().__init__(
            nn.Linear(in_features, rank, bias=False, **made), nn.Linear(rank, out_features, bias=bias, **made)
        )
        self.in_features, self.out_features = in_features, out_features

    @property
    def weight(self) -> torch.Tensor:
        """A B, (out, in): for code that asks a layer for its number format or device."""
        first, second = self[1].weight, self[0].weight
        assert isinstance(first, torch.Tensor)
        assert isinstance(second, torch.Tensor)
        return first @ second

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of the second, (out,)."""
        return self[1].bias  # type: ignore[return-value]


def build(old: nn.Module, entry: Mapping[str, Any]) -> LowRank:
    """The layer that takes the place of ``old``."""
    out_features, in_features = sizes(old)
    assert isinstance(old.weight, torch.Tensor)
    return LowRank(in_features, out_features, int(entry["rank"]), old.bias is not None, old.weight)


def shapes(out_features: int, in_features: int, entry: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name in the layer -> shape, without the bias."""
    rank = int(entry["rank"])
    return {"1.weight": (out_features, rank), "0.weight": (rank, in_features)}


def dense(tensors: Mapping[str, torch.Tensor], entry: Mapping[str, Any]) -> torch.Tensor:
    """The matrix that the tensors stand for, (out, in) float32."""
    return tensors["1.weight"].float() @ tensors["0.weight"].float()
