"""A feed-forward network cut into equal experts, of which a router has a few computed for each token (MoEfication).

h_e = act(G_e x + g_e) * (U_e x + u_e), or act(U_e x + u_e) without a gate;  y = sum over the chosen e of D_e^T h_e + d

The neurons of an expert lie one after the other in all matrices, so an expert is a slice: nothing is masked, and what
is not chosen is not read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from secateur.errors import CheckpointError

BIASES = {"gate": "gate_bias", "up": "up_bias", "down": "down_bias"}
"""Matrix of the layer -> its bias."""
GATHERED = 1 << 20
"""Bytes of a matrix up to which the experts of one token are gathered into one, on a CPU."""


class MoeFfn(nn.Module):
    """``gate`` (neurons, in), ``up`` (neurons, in) and ``down`` (neurons, out), neuron by neuron, and a router."""

    gate: nn.Parameter | None
    router_in: nn.Parameter | None
    router_out: nn.Parameter | None
    gate_bias: nn.Parameter | None
    up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(self, old: nn.Module, entry: Mapping[str, Any]) -> None:
        super().__init__()
        up, down = old.get_submodule(entry["up"]), old.get_submodule(entry["down"])
        gate = old.get_submodule(entry["gate"]) if entry["gate"] else None
        self.neurons, self.in_features = _sizes(up)
        self.out_features = _sizes(down)[0]
        self.experts, self.top, self.router = int(entry["experts"]), int(entry["top"]), str(entry["router"])
        if self.neurons % self.experts:
            raise CheckpointError(
                f"config.json cuts {self.neurons} neurons into {self.experts} experts", hint="convert the model again"
            )
        self.act = old.get_submodule(entry["act"])
        like = up.weight
        assert isinstance(like, torch.Tensor)
        made: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.gate = nn.Parameter(torch.empty(self.neurons, self.in_features, **made)) if gate is not None else None
        self.up = nn.Parameter(torch.empty(self.neurons, self.in_features, **made))
        self.down = nn.Parameter(torch.empty(self.neurons, self.out_features, **made))
        for layer, name, size in (
            (gate, "gate_bias", self.neurons), (up, "up_bias", self.neurons), (down, "down_bias", self.out_features),
        ):  # fmt: skip
            has = layer is not None and layer.bias is not None
            self.register_parameter(name, nn.Parameter(torch.empty(size, **made)) if has else None)
        for name in ("router_in", "router_out"):
            shape = router_shapes(self.experts, self.in_features, self.router).get(name)
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **made)) if shape else None)

    @property
    def unread(self) -> int:
        """Parameters that a token does not come to: neurons of experts that are not chosen.

        The oracle computes all neurons in order to choose, and then leaves out their part of the output alone.
        """
        neurons = self.neurons - self.top * self.neurons // self.experts
        into = 0 if self.router == "oracle" else sum(
            self.in_features + (bias is not None)
            for matrix, bias in ((self.gate, self.gate_bias), (self.up, self.up_bias)) if matrix is not None
        )  # fmt: skip
        return neurons * (into + self.out_features)

    def hidden(self, rows: torch.Tensor, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Neurons ``first`` to ``last`` for rows (tokens, in): (tokens, neurons)."""
        return self._hidden(lambda name: self._read(name, first, last, rows))

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """What the router says of each expert, (tokens, experts) float32; the oracle computes all neurons for it."""
        if self.router == "oracle":
            return expert_scores(self.hidden(rows), self.experts)
        assert self.router_in is not None
        return route(rows, self.router_in, self.router_out)

    @property
    def chooses(self) -> bool:
        """Whether some experts are left out."""
        return self.top < self.experts

    def chosen(self, rows: torch.Tensor) -> torch.Tensor:
        """Which experts each token goes through, (tokens, experts) bool."""
        scores = self.scores(rows)
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(self.top, dim=1).indices, True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X (..., in) -> (..., out). Of an expert that no token chose nothing is computed."""
        rows = x.reshape(-1, self.in_features)
        if self.top == self.experts:
            y = self.hidden(rows) @ self.down
        else:
            known = self.hidden(rows) if self.router == "oracle" else None
            scores = self.scores(rows) if known is None else expert_scores(known, self.experts)
            best = scores.topk(self.top, dim=1).indices
            if rows.device.type == "meta":  # without numbers, the first ones for all: as many products
                some = self.top * self.neurons // self.experts
                y = (self.hidden(rows, 0, some) if known is None else known[:, :some]) @ self.down[:some]
            else:
                y = self._one(rows, best[0], known) if len(rows) == 1 else self._many(rows, best, known)
        y = y if self.down_bias is None else y + self.down_bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def _one(self, rows: torch.Tensor, best: torch.Tensor, known: torch.Tensor | None) -> torch.Tensor:
        """One token, (1, in) -> (1, out): the chosen experts are read where they lie, or gathered where that is quick.

        Many small products take longer than a copy that fits into the cache; a large copy takes longer than they do.
        """
        best, size = best.sort().values, self.neurons // self.experts
        if rows.device.type != "cpu" or self.top * size * self.up.element_size() * self.in_features <= GATHERED:

            def taken(name: str) -> torch.Tensor:
                whole = getattr(self, name)
                found: torch.Tensor = whole.reshape(self.experts, -1).index_select(0, best)
                return found.reshape(-1, *whole.shape[1:])

            h = (
                self._hidden(lambda name: self._product(name, taken, rows))
                if known is None
                else (known.reshape(self.experts, size)[best].reshape(1, -1))
            )
            return h @ taken("down")
        cuts = [(a * size, b * size) for a, b in runs(best.tolist())]
        x = rows[0]
        if known is None:
            h = self._hidden(lambda name: torch.cat([self._times(name, a, b, x) for a, b in cuts]))
        else:
            h = torch.cat([known[0, a:b] for a, b in cuts])
        y = torch.zeros(self.out_features, dtype=h.dtype, device=h.device)
        for (a, b), part in zip(cuts, h.split([b - a for a, b in cuts]), strict=True):
            y = torch.addmv(y, self.down[a:b].t(), part)
        return y[None]

    def _many(self, rows: torch.Tensor, best: torch.Tensor, known: torch.Tensor | None) -> torch.Tensor:
        """Many tokens, (tokens, in) -> (tokens, out): each expert for those that chose it."""
        size = self.neurons // self.experts
        chosen = torch.zeros(len(rows), self.experts, dtype=torch.bool, device=rows.device).scatter_(1, best, True)
        y = torch.zeros(len(rows), self.out_features, dtype=rows.dtype, device=rows.device)
        for expert, column in enumerate(chosen.unbind(1)):
            tokens = column.nonzero().squeeze(1)
            if len(tokens):
                first, last = expert * size, (expert + 1) * size
                h = self.hidden(rows[tokens], first, last) if known is None else known[tokens, first:last]
                y = y.index_add(0, tokens, (h @ self.down[first:last]).to(y.dtype))
        return y

    def _hidden(self, product: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The neurons from what the matrices ``gate`` and ``up`` make of the input."""
        h: torch.Tensor = self.act(product("up" if self.gate is None else "gate"))
        return h if self.gate is None else h * product("up")

    def _read(self, name: str, first: int, last: int | None, rows: torch.Tensor) -> torch.Tensor:
        return self._product(name, lambda of: getattr(self, of)[first:last], rows)

    def _product(self, name: str, part: Callable[[str], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        return F.linear(rows, part(name), None if getattr(self, BIASES[name]) is None else part(BIASES[name]))

    def _times(self, name: str, first: int, last: int, x: torch.Tensor) -> torch.Tensor:
        """The same of one vector, which is quicker than of a matrix with one row."""
        weight, bias = getattr(self, name)[first:last], getattr(self, BIASES[name])
        return torch.mv(weight, x) if bias is None else torch.addmv(bias[first:last], weight, x)

    def extra_repr(self) -> str:
        return f"neurons={self.neurons}, experts={self.experts}, top={self.top}, router={self.router}"


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, or of what GPT-2 has in its place; told apart here without transformers."""
    out, inner = ("out_features", "in_features") if hasattr(layer, "out_features") else ("nf", "nx")
    return int(getattr(layer, out)), int(getattr(layer, inner))


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as half-open ranges, as few as possible.

    >>> list(runs([0, 1, 2, 5, 7, 8]))
    [(0, 3), (5, 6), (7, 9)]
    """
    for _, group in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        held = [number for _, number in group]
        yield held[0], held[-1] + 1


def expert_scores(hidden: torch.Tensor, experts: int) -> torch.Tensor:
    """Sum of the magnitudes of the neurons of each expert: (tokens, neurons) -> (tokens, experts) float32."""
    return hidden.float().abs().reshape(len(hidden), experts, -1).sum(dim=2)


def route(rows: torch.Tensor, first: torch.Tensor, second: torch.Tensor | None) -> torch.Tensor:
    """Scores (tokens, experts) of rows (tokens, in): W2 tanh(W1 x / |x|), or W1 x / |x| where there is no W2.

    Args:
        first: (experts, in).
        second: (experts, experts).
    """
    found = F.linear(F.normalize(rows.float(), dim=1), first.float())
    return found if second is None else F.linear(found.tanh(), second.float())


def build(old: nn.Module, entry: Mapping[str, Any]) -> MoeFfn:
    """The layer that takes the place of a whole feed-forward network."""
    return MoeFfn(old, entry)


def router_shapes(experts: int, in_features: int, router: str) -> dict[str, tuple[int, ...]]:
    """Name in the layer -> shape of what the router has."""
    found: dict[str, tuple[int, ...]] = {} if router == "oracle" else {"router_in": (experts, in_features)}
    return found | ({"router_out": (experts, experts)} if router == "mlp" else {})
