"""A linear layer whose matrix is a matrix product operator: a chain of small tensors, also called a tensor train.

W[o_1..o_n, i_1..i_n] = T_1[1, i_1, o_1, :] T_2[:, i_2, o_2, :] ... T_n[:, i_n, o_n, 1]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

BIAS = "bias"


class TensorTrain(nn.Module):
    """A linear layer out of cores (r_{k-1}, i_k, o_k, r_k)."""

    def __init__(
        self, inputs: Sequence[int], outputs: Sequence[int], ranks: Sequence[int], bias: bool, like: torch.Tensor
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.in_features, self.out_features = prod(inputs), prod(outputs)
        self.cores = nn.ParameterList(
            nn.Parameter(torch.empty(shape, **made)) for shape in core_shapes(inputs, outputs, ranks)
        )
        self.bias = nn.Parameter(torch.empty(self.out_features, **made)) if bias else None
        self._rebuilding = rebuild_operations(inputs, outputs, ranks)
        self._chain = chain_operations(inputs, outputs, ranks)

    @property
    def weight(self) -> torch.Tensor:
        """The whole matrix, (out, in)."""
        return rebuild(list(self.cores))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs (..., in) -> (..., out), core by core or through the whole matrix: whatever takes fewer operations."""
        rows = x.numel() // self.in_features
        if rows * self._chain > self._rebuilding + rows * self.in_features * self.out_features:
            return F.linear(x, self.weight, self.bias)
        y = chain(list(self.cores), x.reshape(rows, self.in_features)).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, cores={len(self.cores)}"


def build(old: nn.Module, entry: Mapping[str, Any]) -> TensorTrain:
    """The layer that takes the place of ``old``."""
    assert isinstance(old.weight, torch.Tensor)
    return TensorTrain(entry["inputs"], entry["outputs"], entry["ranks"], old.bias is not None, old.weight)


def core_shapes(inputs: Sequence[int], outputs: Sequence[int], ranks: Sequence[int]) -> list[tuple[int, ...]]:
    """Shapes (r_{k-1}, i_k, o_k, r_k); ``ranks`` are the n - 1 inner ones."""
    left, right = [1, *ranks], [*ranks, 1]
    return [tuple(shape) for shape in zip(left, inputs, outputs, right, strict=True)]


def shapes(out_features: int, in_features: int, entry: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name in the layer -> shape, without the bias."""
    return {f"cores.{k}": s for k, s in enumerate(core_shapes(entry["inputs"], entry["outputs"], entry["ranks"]))}


def dense(tensors: Mapping[str, torch.Tensor], entry: Mapping[str, Any]) -> torch.Tensor:
    """The matrix that the tensors stand for, (out, in) float32."""
    return rebuild([tensors[f"cores.{k}"].float() for k in range(len(entry["inputs"]))])


def rebuild(cores: Sequence[torch.Tensor]) -> torch.Tensor:
    """The matrix (out, in) of cores (r_{k-1}, i_k, o_k, r_k)."""
    whole = cores[0].reshape(-1, cores[0].shape[-1])
    for core in cores[1:]:
        whole = (whole @ core.reshape(core.shape[0], -1)).reshape(-1, core.shape[-1])
    inputs, outputs, count = [c.shape[1] for c in cores], [c.shape[2] for c in cores], len(cores)
    pairs = whole.reshape([size for pair in zip(inputs, outputs, strict=True) for size in pair])
    order = [*range(1, 2 * count, 2), *range(0, 2 * count, 2)]
    return pairs.permute(order).reshape(prod(outputs), prod(inputs))


def chain(cores: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Inputs (rows, in) through the cores one after the other, (rows, out)."""
    rows, rest = x.shape
    done = 1
    for core in cores:
        left, size, out, right = core.shape
        rest //= size
        # (rows·outputs so far, left·i_k, inputs to come) -> (rows·outputs so far, o_k·right, inputs to come)
        x = core.reshape(left * size, out * right).t() @ x.reshape(rows * done, left * size, rest)
        done *= out
    return x.reshape(rows, done)


def chain_operations(inputs: Sequence[int], outputs: Sequence[int], ranks: Sequence[int]) -> int:
    """Multiplications of `chain` for one row."""
    total, done, rest = 0, 1, prod(inputs)
    for left, size, out, right in core_shapes(inputs, outputs, ranks):
        rest //= size
        total += done * left * size * out * right * rest
        done *= out
    return total


def rebuild_operations(inputs: Sequence[int], outputs: Sequence[int], ranks: Sequence[int]) -> int:
    """Multiplications of `rebuild`."""
    total, done = 0, 1
    for left, size, out, right in core_shapes(inputs, outputs, ranks):
        total += done * left * size * out * right if done > 1 else 0
        done *= size * out
    return total
