"""A linear layer with low-rank experts beside it, of which a router that needs no training picks some for each token.

y = W x + b + sum over the chosen i of p_i (A_i B_i x + b_i)        p = softmax(|G_i x|), top T, sum 1
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from secateur.layers.replace import sizes

BIAS = "base.bias"


class Fused(nn.Module):
    """``base`` is the layer of the common ancestor. With one expert there is no router: it is always chosen."""

    def __init__(self, base: nn.Module, models: int, rank: int, router_rank: int, top: int) -> None:
        super().__init__()
        self.base = base
        self.out_features, self.in_features = sizes(base)
        self.top = min(top, models)
        like = base.weight
        assert isinstance(like, torch.Tensor)
        made: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.up = nn.Parameter(torch.empty(models, self.out_features, rank, **made))
        self.down = nn.Parameter(torch.empty(models, rank, self.in_features, **made))
        self.expert_bias: nn.Parameter | None = None
        self.router: nn.Parameter | None = None
        if base.bias is not None:
            self.expert_bias = nn.Parameter(torch.empty(models, self.out_features, **made))
        if models > 1:
            self.router = nn.Parameter(torch.empty(models, router_rank, self.in_features, **made))

    @property
    def weight(self) -> torch.Tensor:
        """The matrix of the base, as that layer holds it: for code that asks for its number format or device."""
        weight: torch.Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of the base, (out,)."""
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X (..., in) -> (..., out). Each expert sees the tokens that chose it only."""
        y: torch.Tensor = self.base(x)
        rows = x.reshape(-1, self.in_features)
        added = torch.zeros(len(rows), self.out_features, dtype=y.dtype, device=y.device)
        if self.router is None:
            added = self._expert(0, rows)
        elif rows.device.type == "meta":  # without numbers, the first ones for all: as many products
            route(rows, self.router, self.top)
            added = sum((self._expert(expert, rows) for expert in range(self.top)), added)
        else:
            share = route(rows, self.router, self.top)
            for expert in range(len(self.up)):
                chosen = share[:, expert].nonzero().squeeze(1)
                if len(chosen):
                    part = self._expert(expert, rows[chosen]) * share[chosen, expert, None]
                    added = added.index_add(0, chosen, part.to(added.dtype))
        return y + added.reshape(y.shape)

    @property
    def unread(self) -> int:
        """Parameters that a token does not come to: differences of models that are not chosen."""
        up, down = self.up[0].numel(), self.down[0].numel()
        return (len(self.up) - self.top) * (up + down + (self.out_features if self.expert_bias is not None else 0))

    @property
    def chooses(self) -> bool:
        """Whether some experts are left out."""
        return self.router is not None and self.top < len(self.up)

    def chosen(self, rows: torch.Tensor) -> torch.Tensor:
        """Which experts each token goes through, (tokens, models) bool."""
        assert self.router is not None
        return route(rows, self.router, self.top) > 0

    def _expert(self, expert: int, rows: torch.Tensor) -> torch.Tensor:
        made = (rows @ self.down[expert].t()) @ self.up[expert].t()
        return made if self.expert_bias is None else made + self.expert_bias[expert]


def route(rows: torch.Tensor, router: torch.Tensor, top: int) -> torch.Tensor:
    """What each expert has in each token, (tokens, models): zero where it is not chosen, sum 1.

    Args:
        rows: (tokens, in).
        router: (models, router_rank, in).
    """
    strength = torch.einsum("ti,mgi->tmg", rows.float(), router.float()).norm(dim=2)
    share = strength.softmax(dim=1)
    best, index = share.topk(top, dim=1)
    chosen = torch.zeros_like(share).scatter(1, index, best / best.sum(dim=1, keepdim=True))
    return chosen.to(rows.dtype)


def build(old: nn.Module, entry: Mapping[str, Any]) -> Fused:
    """The layer that takes the place of ``old``, which stays in it."""
    return Fused(old, int(entry["models"]), int(entry["rank"]), int(entry["router_rank"]), int(entry["top"]))


def shapes(out_features: int, in_features: int, entry: Mapping[str, Any], bias: bool) -> dict[str, tuple[int, ...]]:
    """Name in the layer -> shape of what is beside the base."""
    models, rank = int(entry["models"]), int(entry["rank"])
    found: dict[str, tuple[int, ...]] = {"up": (models, out_features, rank), "down": (models, rank, in_features)}
    if bias:
        found["expert_bias"] = (models, out_features)
    if models > 1:
        found["router"] = (models, int(entry["router_rank"]), in_features)
    return found
