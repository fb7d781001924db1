"""Experts behind a feed-forward network that share it and differ by a small adapter each (PESC).

With z = FFN(x), and g the softmax over the T largest of the E numbers R x:

y = z + sum over the T chosen i of g_i U_i GELU(D_i z)        R (E, d), D_i (a, d), U_i (d, a)

which is the published sum of g_i (z + U_i GELU(D_i z)), as the g_i are 1 together. With U = 0 it is the network itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

NAME = "adapters"
"""What they are called in the network that they stand behind."""
DROPOUT = 0.1
"""Share of z that is left out in training."""


class AdapterMoe(nn.Module):
    """``router`` (experts, width), ``down`` (experts, dim, width) and ``up`` (experts, width, dim)."""

    router: nn.Parameter
    down: nn.Parameter
    up: nn.Parameter

    def __init__(self, experts: int, top: int, dim: int, width: int, like: torch.Tensor) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.experts, self.top, self.dim, self.width = experts, top, dim, width
        for name, shape in shapes(experts, dim, width).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **made)))

    @property
    def entry(self) -> dict[str, Any]:
        """What the config says of it."""
        return {
            "kind": "adapter_moe", "experts": self.experts, "top": self.top, "dim": self.dim, "width": self.width,
        }  # fmt: skip

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """What comes to z (..., width), the output of the network for its input x (..., width)."""
        rows, out = x.reshape(-1, self.width), z.reshape(-1, self.width)
        share = self.route(rows)
        out = F.dropout(out, DROPOUT, self.training)
        added = torch.zeros(len(out), self.width, dtype=torch.float32, device=out.device)
        if rows.device.type == "meta":  # without numbers, the first ones for all: as many products
            added = sum((self._expert(expert, out) for expert in range(self.top)), added)
        else:
            for expert in range(self.experts):
                chosen = share[:, expert].nonzero().squeeze(1)
                if len(chosen):
                    made = self._expert(expert, out[chosen]).float() * share[chosen, expert, None]
                    added = added.index_add(0, chosen, made)
        return added.to(z.dtype).reshape(z.shape)

    def route(self, rows: torch.Tensor) -> torch.Tensor:
        """What each expert has in each token (tokens, experts) float32: zero where it is not chosen, 1 together."""
        with torch.autocast("cpu" if rows.is_meta else rows.device.type, enabled=False):  # rounding must not choose
            logits = F.linear(rows.float(), self.router.float())
        best, index = logits.topk(self.top, dim=1)
        return torch.zeros_like(logits).scatter(1, index, best.softmax(dim=1))

    @property
    def unread(self) -> int:
        """Parameters that a token does not come to: adapters that are not chosen."""
        return (self.experts - self.top) * 2 * self.dim * self.width

    @property
    def chooses(self) -> bool:
        """Whether some experts are left out."""
        return self.top < self.experts

    def chosen(self, rows: torch.Tensor) -> torch.Tensor:
        """Which experts each token goes through, (tokens, experts) bool."""
        return self.route(rows) > 0

    def _expert(self, expert: int, rows: torch.Tensor) -> torch.Tensor:
        return F.linear(F.gelu(F.linear(rows, self.down[expert])), self.up[expert])

    def extra_repr(self) -> str:
        return f"experts={self.experts}, top={self.top}, dim={self.dim}, width={self.width}"


class _Behind:
    """A hook behind the network: what the adapters make comes to its output."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        return output + module.get_submodule(NAME)(x, output)


def build(old: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
    """The network itself, with adapters in it: the names of its own tensors stay."""
    like = next(old.parameters())
    made = AdapterMoe(int(entry["experts"]), int(entry["top"]), int(entry["dim"]), int(entry["width"]), like)
    setattr(old, NAME, made)
    old.register_forward_hook(_Behind(), with_kwargs=True)
    return old


def shapes(experts: int, dim: int, width: int) -> dict[str, tuple[int, ...]]:
    """Name in the layer -> shape."""
    return {"router": (experts, width), "down": (experts, dim, width), "up": (experts, width, dim)}
