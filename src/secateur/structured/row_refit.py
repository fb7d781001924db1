"""Refits the rows that a gate multiplies, on what paused forwards show of them (`secateur.bilinear`).

A forward that stands at a consumer has shown the input z of these rows and their product with the gate, h = s ∘ u. The
rows give u = z U^T again, so the factors are s = h / u. With the new rows the forward goes on: h is changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.bilinear import refit_rows
from secateur.least_squares import quadratic
from secateur.structured.couplings import Coupling

TOKENS = 8192
"""Tokens that rows are refitted on, spread over all forwards."""


@dataclass
class Shown:
    """What one forward has shown: the inputs of the rows (..., c) and of the consumer (..., n), as they are in it."""

    before: Tensor
    here: Tensor

    def rows(self, count: int) -> tuple[Tensor, Tensor]:
        """Copies of at most ``count`` tokens of both, evenly spread; (tokens, c) and (tokens, n)."""
        before, here = (part.reshape(-1, part.shape[-1]) for part in (self.before, self.here))
        step = max(1, -(-len(here) // max(1, count)))
        return before[::step].clone(), here[::step].clone()

    @property
    def matches(self) -> bool:
        """Whether both are of the same tokens."""
        return self.before.shape[:-1].numel() == self.here.shape[:-1].numel()


@dataclass
class Rows:
    """Rows that stay, (k, c), with their bias (k,) where they have one."""

    weight: Tensor
    bias: Tensor | None

    def of(self, inputs: Tensor) -> Tensor:
        """Their outputs, (..., k), in the number format of the inputs, as a forward computes them."""
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return F.linear(inputs, self.weight.to(inputs.dtype), bias)

    def joined(self) -> Tensor:
        """Weight and bias as one matrix, (k, c) or (k, c + 1), float32."""
        return self.weight.float() if self.bias is None else torch.cat([self.weight, self.bias[:, None]], 1).float()

    @classmethod
    def divided(cls, joined: Tensor, like: Rows) -> Rows:
        """The opposite of `joined`."""
        return cls(joined, None) if like.bias is None else cls(joined[:, :-1], joined[:, -1])


@dataclass
class Refit:
    """What came of it."""

    rows: Rows
    following: Tensor
    """W^T (n, r) of the consumer, its bias as the last row where it has one."""
    loss: float
    """Squared error of the consumer's outputs on the tokens that were looked at, as a share of their squares."""


def refit(
    shown: Sequence[tuple[Tensor, Tensor]], rows: Rows, columns: Tensor, whole: Tensor, made: Tensor, *,
    damping: float, steps: int, rounded: Callable[[Rows], Rows],
) -> Refit:  # fmt: skip
    """Refit the rows, and then once more what follows them.

    Args:
        shown: tokens of the inputs before the rows (t, c) and of the consumer (t, n), from each forward.
        columns: inputs of the consumer that stay, (k,), in the order of the rows.
        whole: W0^T (n, r) of the consumer before anything was removed, its bias as the last row where it has one.
        made: the same of the cut consumer, refitted.
        damping, steps: see `secateur.bilinear.refit_rows`.
        rounded: gives rows as they will be written.
    """
    before, here = (torch.cat(part) for part in zip(*shown, strict=True))
    if before.dtype == torch.float16:  # has no room for sums
        before, here = before.float(), here.float()
    width = here.shape[1]
    biased = len(made) > width
    wanted = here.float() @ whole[:width].float()
    if biased:
        wanted = wanted + whole[width].float()
    old = rows.of(before)
    factors = _divided(here[:, columns], old)
    inputs = before if rows.bias is None else torch.cat([before, before.new_ones(len(before), 1)], dim=1)
    rest = wanted - made[width].float() if biased else wanted
    joined = refit_rows(
        inputs, factors, made[columns].t().float(), rest, rows.joined(), damping=damping, steps=steps
    )  # fmt: skip
    new = rounded(Rows.divided(joined, rows))
    units = (factors * new.of(before)).float()
    if biased:
        units = torch.cat([units, units.new_ones(len(units), 1)], dim=1)
    stays = torch.cat([columns, columns.new_tensor([width])]) if biased else columns
    problem = quadratic(units.t() @ units, units.t() @ wanted, made[stays].t(), damping)
    following = torch.zeros_like(made)
    following[stays] = problem.best(torch.arange(len(stays), device=stays.device)).to(made)
    error = (units @ following[stays].float() - wanted).square().sum() / wanted.square().sum().clamp_min(1e-30)
    return Refit(new, following, float(error))


def go_on(shown: Shown, columns: Tensor, old: Rows, new: Rows) -> None:
    """Let a forward go on as if the new rows had made the consumer's input."""
    with torch._C.DisableTorchFunction():
        held = shown.here[..., columns]
        factors = _divided(held, old.of(shown.before).reshape(held.shape))
        shown.here[..., columns] = factors * new.of(shown.before).reshape(held.shape)


def _divided(product: Tensor, factor: Tensor) -> Tensor:
    """Their quotient, zero where the factor is zero."""
    return torch.where(factor == 0, 0, product / torch.where(factor == 0, 1, factor))


def running_rows(coupling: Coupling, units: Tensor, tensors: Mapping[str, Tensor], bias: str) -> Rows:
    """The rows of the units that stay, from a block's tensors by full name."""
    cut = coupling.linear
    assert cut is not None
    index = cut.indices[units, 0]
    weight = tensors[cut.name].index_select(cut.dim, index.to(tensors[cut.name].device))
    weight = weight.t() if cut.dim == 1 else weight
    return Rows(weight, tensors[bias].index_select(0, index.to(tensors[bias].device)) if bias in tensors else None)


def put_rows(coupling: Coupling, units: Tensor, rows: Rows, tensors: dict[str, Tensor], bias: str) -> None:
    """Put rows into a block's tensors, in copies, each in its own number format."""
    cut = coupling.linear
    assert cut is not None
    index = cut.indices[units, 0]
    made = tensors[cut.name].clone()
    weight = rows.weight.t() if cut.dim == 1 else rows.weight
    made.index_copy_(cut.dim, index.to(made.device), weight.to(made))
    tensors[cut.name] = made
    if rows.bias is not None:
        grown = tensors[bias].clone()
        tensors[bias] = grown.index_copy_(0, index.to(grown.device), rows.bias.to(grown))
