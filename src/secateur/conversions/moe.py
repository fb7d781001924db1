"""Feed-forward networks cut into equal experts, of which a router has a few computed for each token (MoEfication).

The weights stay what they are, only the order of the neurons changes. With a_j = |act(g_j x) (u_j x)| the activity of
neuron j (|act(u_j x)| without a gate):

    split       weights: balanced k-means on the rows of the gate (without one, of U), each divided by its norm
                activations: balanced k-means on the activity of the neurons over the calibration tokens
                coactivation: the graph with edges sum over each 8 tokens of min(sum a_i a_j, 1), a divided by its root
                mean square, the 64 strongest of each neuron; cut by METIS into parts of which neurons then move, those
                that lose least of their edges, until all are equal (needs the extra ``metis``)
    oracle      score of expert e = sum of a_j over its neurons, which takes all of them: what routing can reach at most
    similarity  score = c_e x / |x|, c_e the mean of the divided rows of e
    mlp         score = W2 tanh(W1 x / |x|), from W1 = c and W2 = 1 trained on calibration text: binary cross-entropy
                against the oracle's scores, over the largest of the batch; Adam, rate 0.01, batches of 512, 30 epochs

Each token goes through the ``top_k`` experts with the highest scores; the others are not computed. All experts are the
identity. Where we differ: the epoch kept is that which captures the most activity on text that is held out (the
authors' code keeps the one before), with as many experts as will run; the graph has the strongest edges of each neuron
(theirs all above a percentile), and neurons move by their edges (theirs at random).

It saves time, not space, and as much as activity is sparse: a ReLU's is, of SiLU or GELU most neurons say something to
every token. Cost: a forward through the model, and a clustering and a small training for each network. Source: Zhang et
al., "MoEfication: Transformer feed-forward layers are mixtures of experts", 2022 (arXiv 2110.01786).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.conversions._clusters import balanced_clusters
from secateur.conversions._coactivation import check_extra, coactivation_clusters
from secateur.conversions._routers import HELD_OUT, captured, mean_rows, train_router
from secateur.errors import UsageError
from secateur.layers.moe import MoeFfn, expert_scores, router_shapes
from secateur.layers.spec import ROUTERS

SPLITS = ("weights", "activations", "coactivation")
_PROFILE = 1024
"""Tokens over which the activity of neurons is compared."""


@dataclass(frozen=True)
class Moe:
    """Options of the conversion, and what it does with one feed-forward network."""

    name: ClassVar[str] = "moe"

    experts: int | None = None
    """Experts that each feed-forward network is cut into; they must divide its neurons."""
    top_k: int | None = None
    """Experts that are computed for each token; all of them is the identity."""
    router: str = "mlp"
    """What chooses them: `mlp` (trained), `similarity` (from weights), `oracle` (computes everything to choose)."""
    split: str = "weights"
    """What neurons of an expert have in common: their `weights`, their `activations` on calibration text, or that they
    are active together there (`coactivation`: the cut of a graph, with pymetis)."""

    def __post_init__(self) -> None:
        for flag, value in (("--experts", self.experts), ("--top-k", self.top_k)):
            if value is None:
                raise UsageError(f"moe needs {flag}", hint="for example --experts 48 --top-k 12")
            if not str(value).isdecimal() or int(value) < 1:
                raise UsageError(f"{flag} {value}", hint="give a number from 1 on")
            object.__setattr__(self, flag[2:].replace("-", "_"), int(value))
        if self.chosen > self.count:
            raise UsageError(f"--top-k {self.top_k} of {self.experts} experts", hint=f"give 1 to {self.experts}")
        for flag, text, known in (("--router", self.router, ROUTERS), ("--split", self.split, SPLITS)):
            if text not in known:
                raise UsageError(f"{flag} {text}", hint=f"known: {', '.join(known)}")
        if self.split == "coactivation":
            check_extra()

    @property
    def statistics(self) -> bool:
        """Whether calibration text is read."""
        return True

    @property
    def count(self) -> int:
        """``experts``, which is given."""
        assert self.experts is not None
        return self.experts

    @property
    def chosen(self) -> int:
        """``top_k``, which is given."""
        assert self.top_k is not None
        return self.top_k

    def check(self, name: str, neurons: int) -> None:
        """Refuse a number of experts that does not divide the neurons.

        Raises:
            UsageError: naming numbers that do.
        """
        if neurons % self.count:
            fits = [n for n in range(2, neurons) if neurons % n == 0]
            near = sorted(sorted(fits, key=lambda n: abs(n - self.count))[:4])
            raise UsageError(
                f"{self.experts} experts do not divide the {neurons} neurons of {name}",
                hint=f"give --experts {' or '.join(map(str, near))}" if near else "its neurons cannot be divided",
            )

    def arrange(self, layer: MoeFfn, inputs: Tensor | None, generator: torch.Generator) -> Tensor:
        """Neurons in their new order, expert by expert, the most active expert first: (neurons,) int64.

        Args:
            layer: with its weights in the old order.
            inputs: calibration inputs (tokens, in), of which there may be none.
        """
        rows = layer.up if layer.gate is None else layer.gate
        points = F.normalize(rows.detach().float(), dim=1)
        activity = torch.zeros(layer.neurons, device=points.device)
        cluster = None
        if inputs is not None:
            step = max(1, len(inputs) // _PROFILE)
            profile = layer.hidden(inputs[::step][:_PROFILE]).float().abs().t()
            activity = profile.mean(dim=1)
            if self.split == "activations":
                points = F.normalize(profile, dim=1)
            elif self.split == "coactivation":
                cluster = coactivation_clusters(layer.hidden(inputs).float().abs(), self.count, generator)
        if cluster is None:
            cluster = balanced_clusters(points, self.count, generator)
        cluster = cluster.to(points.device)
        weight = torch.zeros(self.count, device=points.device).index_add(0, cluster, activity)
        place = torch.empty(self.count, dtype=torch.int64, device=points.device)
        place[weight.argsort(descending=True, stable=True)] = torch.arange(self.count, device=points.device)
        return place[cluster].argsort(stable=True)

    def route(self, layer: MoeFfn, inputs: Tensor | None, generator: torch.Generator) -> dict[str, Tensor]:
        """The router's tensors by their names in the layer, whose neurons lie in their new order. Float32."""
        if self.router == "oracle":
            return {}
        rows = layer.up if layer.gate is None else layer.gate
        first = mean_rows(rows.detach(), self.count)
        if self.router == "similarity":
            return {"router_in": first}
        if inputs is None:
            return {"router_in": first, "router_out": torch.eye(self.count, device=first.device)}
        activity = expert_scores(layer.hidden(inputs), self.count)
        made = train_router(inputs, activity, first, self.chosen, generator)
        return dict(zip(("router_in", "router_out"), made, strict=True))

    def lost(self, layer: MoeFfn, inputs: Tensor) -> dict[str, float]:
        """What routing costs on the tokens that no router was trained on.

        Returns:
            ``error``, the share of the squares of the outputs that is lost; ``captured`` and ``best``, the share of the
            activity that is in the chosen experts, and what the oracle would have.
        """
        held = inputs[HELD_OUT - 1 :: HELD_OUT] if len(inputs) >= HELD_OUT else inputs
        hidden = layer.hidden(held)
        activity = expert_scores(hidden, self.count)
        whole = hidden @ layer.down
        whole = whole if layer.down_bias is None else whole + layer.down_bias
        left, total = (layer(held) - whole).float().square().sum(), whole.float().square().sum()
        return {
            "error": float(left / total) if total > 0 else 0.0,
            "captured": captured(layer.scores(held), activity, self.chosen),
            "best": captured(activity, activity, self.chosen),
        }

    def added(self, in_features: int) -> int:
        """Parameters of a router."""
        shapes: Mapping[str, tuple[int, ...]] = router_shapes(self.count, in_features, self.router)
        return sum(a * b for a, b in shapes.values())
