"""One model out of several that were fine-tuned from the same base, without data (SMILE); or one as a small difference.

For each linear layer, with D_i = W_i - W the difference of model i from the base and U S V^T its singular values:

    expert i    A_i = U[:, :k] (out, k),  B_i = (S V^T)[:k] (k, in),  bias b_i - b
    router i    G_i = V[:, :g]^T (g, in)
    y = W x + b + sum over chosen i of p_i (A_i B_i x + b_i - b),   p = softmax(|G_i x|), the T largest, sum 1

A layer in which no model differs from the base stays as it is. Everything else (embeddings, norms) is the base's, as
published, or the mean over the models (``rest``); of a single model it is that model's own.

Parameters that come: M (k (in + out) + g in + out if there is a bias) for each layer. With one model there is no choice
to be made, so no router is kept (g = 0), and ``--format delta`` writes A, B and what else differs alone.

Cost: one SVD for each layer and model. Full rank with one model gives that model back. Source: Tang et al., "SMILE:
zero-shot sparse mixture of low-rank experts construction from pre-trained foundation models", 2024 (arXiv 2408.10174).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.errors import UsageError

FULL = "full"
FORMATS = ("model", "delta")
RESTS = ("auto", "base", "mean", "model")
DOUBLE_LIMIT = 2048
"""Up to this many rows and columns the SVD is computed in float64."""


@dataclass(frozen=True)
class Fused:
    """Options of the conversion, and what it does with one matrix."""

    name: ClassVar[str] = "fused"

    models: str | tuple[str, ...] = ()
    """Models that were fine-tuned from MODEL, one or more: folders or hub ids."""
    rank: int | str = 32
    """Rank of each difference; `full` keeps it exactly."""
    router_rank: int = 8
    """Directions by which the router knows the inputs of each model."""
    top: int = 1
    """Models that each token goes through."""
    rest: str = "auto"
    """Embeddings, norms and the like: those of the `base`, the `mean` of the models, or of the one `model`; `auto`:
    of the model when it is one, else of the base."""
    format: str = "model"
    """`model`, a folder to open; or `delta`, the difference of one model from its base only."""
    base: str | None = None
    """Apply a delta: MODEL is the folder of one, and this the model that it was made from."""

    def __post_init__(self) -> None:
        given = (self.models,) if isinstance(self.models, str) else self.models
        object.__setattr__(self, "models", tuple(str(model) for model in given))
        if self.base is not None:
            if self.models:
                raise UsageError("--base applies a delta, --models makes one", hint="give one of them")
            return
        if not self.models:
            raise UsageError("fused needs --models", hint="for example: secateur convert BASE --to fused --models A B")
        if self.rank != FULL and (not str(self.rank).isdecimal() or int(self.rank) < 1):
            raise UsageError(f"--rank {self.rank}", hint=f"give a number from 1 on, or {FULL}")
        if self.router_rank < 1:
            raise UsageError(f"--router-rank {self.router_rank}", hint="give a number from 1 on")
        if not 1 <= self.top <= len(self.models):
            raise UsageError(f"--top {self.top} of {len(self.models)} models", hint="give 1 to the number of models")
        for value, known, flag in ((self.format, FORMATS, "--format"), (self.rest, RESTS, "--rest")):
            if value not in known:
                raise UsageError(f"{flag} {value}", hint=f"known: {', '.join(known)}")
        if len(self.models) > 1 and (self.format == "delta" or self.rest == "model"):
            flag = "--format delta" if self.format == "delta" else "--rest model"
            raise UsageError(f"{flag} is for one model, {len(self.models)} were given", hint="give one with --models")

    @property
    def statistics(self) -> bool:
        """Whether calibration text is read."""
        return False

    @property
    def origin_of_rest(self) -> str:
        """``base``, ``mean`` or ``model``."""
        return self.rest if self.rest != "auto" else "model" if len(self.models) == 1 else "base"

    def entry(self, name: str, shape: tuple[int, int]) -> dict[str, Any]:
        """What the config says of the layer that takes the place of a matrix (out, in).

        Raises:
            UsageError: when a rank is more than the matrix has.
        """
        most = min(shape)
        rank = most if self.rank == FULL else int(self.rank)
        router = self.router_rank if len(self.models) > 1 else 0
        for flag, value in (("--rank", rank), ("--router-rank", router)):
            if value > most:
                raise UsageError(
                    f"{flag} {value} is more than {name} ({shape[0]} x {shape[1]}) has, which is {most}",
                    hint=f"give {flag} {most} or less" + (f", or --rank {FULL}" if flag == "--rank" else ""),
                )
        return {"kind": "fused", "models": len(self.models), "rank": rank, "router_rank": router, "top": self.top}

    def solve(
        self, base: Tensor, tuned: Sequence[Tensor], rank: int, router_rank: int
    ) -> tuple[dict[str, Tensor], float]:
        """``up`` (M, out, rank), ``down`` (M, rank, in) and, with a router, ``router`` (M, router_rank, in), float32;
        and the share lost of the squares of the differences.

        Args:
            base: (out, in).
            tuned: the same matrix of each model.
        """
        ups, downs, routers = [], [], []
        lost = whole = 0.0
        for weight in tuned:
            up, down, directions, squares = low_rank_difference(base, weight, rank)
            ups.append(up)
            downs.append(down)
            routers.append(directions[:router_rank])
            lost, whole = lost + float(squares[rank:].sum()), whole + float(squares.sum())
        made = {"up": torch.stack(ups).float(), "down": torch.stack(downs).float()}
        if router_rank:
            made["router"] = torch.stack(routers).float()
        return made, lost / whole if whole else 0.0


def low_rank_difference(base: Tensor, tuned: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A (out, rank), B (rank, in), the right singular vectors (min(out, in), in), the squares of singular values."""
    number = torch.float64 if max(base.shape) <= DOUBLE_LIMIT else torch.float32
    u, s, v = torch.linalg.svd(tuned.to(number) - base.to(number), full_matrices=False)
    return u[:, :rank], s[:rank, None] * v[:rank], v, s.square()
