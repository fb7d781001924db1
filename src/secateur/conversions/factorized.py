"""Matrices as products of smaller ones: two factors, or a chain of small tensors (matrix product operator).

    2 cores:       W (out, in) ~ A (out, r) B (r, in)                 parameters r (out + in)
    n > 2 cores:   W[o_1..o_n, i_1..i_n] = T_1[1, i_1, o_1, :] ... T_n[:, i_n, o_n, 1]
                   parameters sum of r_{k-1} i_k o_k r_k, with i_1 ... i_n = in and o_1 ... o_n = out

With the Gram matrix G = X^T X of the inputs, the error of a matrix is tr (W - W') G (W - W')^T / tr W G W^T: the share
of its outputs' squares that is lost. For two cores the best of rank r is W' = U U^T W, where U (out, r) holds the first
left singular vectors of W G^(1/2); a chain is cut from the singular vectors of W itself, and G decides how far. Ranks
follow from a budget: each further parameter goes where it lessens the error most, and a matrix may stay whole.

Full rank is the identity, and larger than the matrix: r (out + in) > out·in from r = out·in / (out + in) on. Parameters
are saved by a lower rank, or by tying the middle tensor, which holds most of them, over all blocks (``share_central``);
a trained model does not survive the latter without training.

Cost: one SVD of each matrix, and a forward through the model for G; with a budget two. Sources: Eckart and Young, 1936;
Liu et al., "Enhancing scalability of pre-trained language models via efficient parameter sharing", 2023
(arXiv 2303.16753); Oseledets, "Tensor-train decomposition", 2011.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.budgets import parse_budget
from secateur.conversions._spread import Curve
from secateur.conversions._tensor_train import decompose, full_ranks, split_size, truncate
from secateur.errors import BudgetError, UsageError
from secateur.layers.tensor_train import core_shapes, rebuild

FULL = "full"
CORES = (2, 3, 4, 5)
WEIGHTINGS = ("activations", "none")
DOUBLE_LIMIT = 8192
"""Up to this many rows and columns everything is computed in float64."""
_GRID = 24
"""Ranks of a chain that are looked at for a budget."""
_DAMPING = 1e-7
"""What is added to the diagonal of G, as a share of its mean, so that it has a Cholesky factor."""


@dataclass(frozen=True)
class Factorized:
    """Options of the conversion, and what it does with one matrix."""

    name: ClassVar[str] = "factorized"

    cores: int = 2
    """Tensors that a matrix becomes: 2 (two factors, from the SVD), or 3, 4, 5 (a chain, matrix product operator)."""
    rank: int | str | None = None
    """One rank for every matrix, or for every bond of a chain that has as many; `full` is the identity."""
    budget: str | None = None
    """Instead of a rank: share of the block parameters that may stay, such as `parameters=0.8`."""
    weighting: str = "activations"
    """What errors are weighted by: `activations` (of calibration text), or `none` for the plain SVD."""
    share_central: bool = False
    """Tie the middle tensor of a chain over all blocks. The model then needs training before it is of any use."""

    def __post_init__(self) -> None:
        if self.cores not in CORES:
            raise UsageError(f"--cores {self.cores}", hint=f"known: {', '.join(map(str, CORES))}")
        if (self.rank is None) == (self.budget is None):
            raise UsageError(
                "factorized needs --rank or --budget, not both"
                if self.budget
                else "factorized needs --rank or --budget",
                hint="for example --budget parameters=0.8, or --rank 64",
            )
        if self.rank not in (None, FULL) and (not str(self.rank).isdecimal() or int(str(self.rank)) < 1):
            raise UsageError(f"--rank {self.rank}", hint=f"give a number from 1 on, or {FULL}")
        if self.budget is not None and parse_budget(self.budget).key != "parameters":
            raise BudgetError(f"budget '{self.budget}'", hint="factorized knows parameters=SHARE only")
        if self.weighting not in WEIGHTINGS:
            raise UsageError(f"--weighting {self.weighting}", hint=f"known: {', '.join(WEIGHTINGS)}")
        if self.share_central and (self.cores == 2 or self.budget is not None):
            why = "2 cores have no middle tensor" if self.cores == 2 else "tied tensors have the same rank everywhere"
            raise UsageError(f"--share-central: {why}", hint="use --cores 3 or 5 with --rank, for example --rank full")

    @property
    def statistics(self) -> bool:
        """Whether G is looked at."""
        return self.weighting != "none"

    @property
    def share(self) -> float | None:
        """The budget as a number."""
        return parse_budget(self.budget).value if self.budget is not None else None

    @property
    def central(self) -> str | None:
        """Name of the tensor that is tied; None when none is."""
        return f"cores.{self.cores // 2}" if self.share_central else None

    def entry(self, name: str, shape: tuple[int, int], rank: int | None = None) -> dict[str, Any]:
        """What the config says of the layer that takes the place of a matrix (out, in).

        Args:
            rank: None for the option.

        Raises:
            UsageError: when the sizes are no such products, or the rank is more than the matrix has.
        """
        out_features, in_features = shape
        asked = self.rank if rank is None else rank
        most = min(shape)
        inputs = outputs = full = [0]
        if self.cores > 2:
            inputs = split_size(in_features, self.cores, f"{name}: the input size")
            outputs = split_size(out_features, self.cores, f"{name}: the output size")
            full = full_ranks(inputs, outputs)
            most = max(full)
        limit = most if asked == FULL else int(str(asked))
        if limit > most:
            raise UsageError(
                f"rank {limit} is more than {name} ({out_features} x {in_features}) has, which is {most}",
                hint=f"give --rank {most} or less, --rank {FULL}, or a budget",
            )
        if self.cores == 2:
            return {"kind": "low_rank", "rank": limit}
        return {"kind": "tensor_train", "inputs": inputs, "outputs": outputs, "ranks": [min(limit, r) for r in full]}

    def solve(self, weight: Tensor, gram: Tensor | None, entry: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors of a layer by their names in it, float32.

        Args:
            weight: (out, in).
            gram: X^T X of its inputs, (in, in); None weighs all alike.
        """
        if entry["kind"] == "low_rank":
            first, second = low_rank(weight, gram, int(entry["rank"]))
            return {"1.weight": first.float(), "0.weight": second.float()}
        cores = truncate(decompose(_exact(weight), entry["inputs"], entry["outputs"]), max(entry["ranks"]))
        return {f"cores.{k}": core.float() for k, core in enumerate(cores)}

    def curve(self, name: str, weight: Tensor, gram: Tensor | None) -> tuple[list[int | None], Curve]:
        """Ranks that a matrix may get, None for staying whole, and what each costs."""
        out_features, in_features = weight.shape
        whole = out_features * in_features
        ranks: list[int | None] = []
        parameters, errors = [], []
        if self.cores == 2:
            lost = lost_shares(weight, gram)
            for rank in range(1, (whole - 1) // (out_features + in_features) + 1):
                if rank <= len(lost):
                    ranks.append(rank)
                    parameters.append(rank * (out_features + in_features))
                    errors.append(float(lost[rank - 1]))
        else:
            entry = self.entry(name, (out_features, in_features), 1)
            cores = decompose(_exact(weight), entry["inputs"], entry["outputs"])
            most = max(full_ranks(entry["inputs"], entry["outputs"]))
            for rank in sorted({max(1, round(most ** (k / _GRID))) for k in range(_GRID + 1)}):
                shapes = self.entry(name, (out_features, in_features), rank)
                size = sum(prod(s) for s in core_shapes(shapes["inputs"], shapes["outputs"], shapes["ranks"]))
                if size < whole:
                    ranks.append(rank)
                    parameters.append(size)
                    errors.append(relative_error(weight, rebuild(truncate(cores, rank)), gram))
        return [*ranks, None], Curve([*parameters, whole], [*errors, 0.0])


def low_rank(weight: Tensor, gram: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """A (out, rank), with orthonormal columns, and B (rank, in), whose product has the least weighted error.

    Args:
        weight: (out, in), e.g. (1536, 576).
        gram: (in, in), None for the plain SVD.
    """
    w = _exact(weight)
    if w.shape[0] <= w.shape[1] and gram is not None:
        # U as eigenvectors of W G W^T: complete and orthonormal, whatever the rank of G.
        basis = torch.linalg.eigh(_symmetric(w @ gram.to(w) @ w.t())).eigenvectors.flip(1)
    else:
        basis = torch.linalg.svd(w if gram is None else w @ _root(gram.to(w)), full_matrices=False).U
    first = basis[:, :rank]
    return first, first.t() @ w


def lost_shares(weight: Tensor, gram: Tensor | None) -> Tensor:
    """Error of `low_rank` for rank 1, 2, ... min(out, in): what the singular values that are left out hold."""
    w = _exact(weight)
    if w.shape[0] <= w.shape[1]:
        small = w @ w.t() if gram is None else w @ gram.to(w) @ w.t()
    else:
        root = w if gram is None else w @ _root(gram.to(w))
        small = root.t() @ root
    squares = torch.linalg.eigvalsh(_symmetric(small)).clamp(min=0).flip(0)
    total = squares.sum()
    return (total - squares.cumsum(0)).clamp(min=0) / total if total > 0 else torch.zeros_like(squares)


def relative_error(weight: Tensor, made: Tensor, gram: Tensor | None) -> float:
    """Share of the squares of the outputs that is lost: tr D G D^T / tr W G W^T with D = W - W'."""
    w, lost = _exact(weight), _exact(weight) - made.to(_exact(weight))
    whole = w.square().sum() if gram is None else ((w @ gram.to(w)) * w).sum()
    left = lost.square().sum() if gram is None else ((lost @ gram.to(w)) * lost).sum()
    return float(left.clamp(min=0) / whole) if whole > 0 else 0.0


def _exact(weight: Tensor) -> Tensor:
    narrow = max(weight.shape) > DOUBLE_LIMIT or weight.device.type == "mps"
    return weight.to(torch.float32 if narrow else torch.float64)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.t()) / 2


def _root(gram: Tensor) -> Tensor:
    """L with L L^T = G but for a trace of damping, as much as it takes."""
    mean = float(gram.diagonal().mean()) or 1.0
    damping = _DAMPING
    while True:
        damped = gram + damping * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        found = torch.linalg.cholesky_ex(damped)
        if not int(found.info):
            factor: Tensor = found.L
            return factor
        damping *= 10
