"""Random matrices with correlated inputs, for methods that look at inputs."""

from __future__ import annotations

import torch

from secateur.statistics import InputStatistics


def problem(rows, columns, tokens, seed=0, dead=()):
    """A weight (rows, columns), inputs (tokens, columns) of which some are always zero, and their statistics."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix
    x[:, list(dead)] = 0.0
    stats = InputStatistics(columns, "gram")
    stats.update(x)
    return torch.randn(rows, columns, generator=generator), x, stats


def solve(method, weight, stats, target):
    return method.solve(weight, stats, target, generator=torch.Generator())


def output_error(x, weight, pruned):
    """|X (W - Q)^T|^2."""
    return float((x.double() @ (weight - pruned).double().T).square().sum())
