"""Routers, trained or from weights: which experts of a feed-forward network have the most to say to a token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.layers.moe import route

RATE = 0.01
BATCH = 512
EPOCHS = 30
HELD_OUT = 10
"""Every so many-th token is held out: it decides which epoch is kept, and measures the result."""


def mean_rows(rows: Tensor, experts: int) -> Tensor:
    """Mean of the normalised rows of each expert, (experts, in) float32; rows (neurons, in) lie expert by expert."""
    return F.normalize(rows.float(), dim=1).reshape(experts, -1, rows.shape[1]).mean(dim=1)


def captured(scores: Tensor, activity: Tensor, top: int) -> float:
    """Share of the activity (tokens, experts) that is in the ``top`` experts with the highest scores of each token."""
    chosen = scores.topk(top, dim=1).indices
    total = float(activity.detach().sum())
    return float(activity.detach().gather(1, chosen).sum()) / total if total > 0 else 1.0


def train_router(
    inputs: Tensor, activity: Tensor, start: Tensor, top: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """W1 (experts, in) and W2 (experts, experts) of the epoch that captures the most on tokens that are held out.

    Binary cross-entropy against the activity divided by the largest of the batch, Adam. Gradients reach W1 and W2 only.

    Args:
        inputs: (tokens, in), of the feed-forward network.
        activity: (tokens, experts).
        start: W1 to begin with; W2 begins with the identity.
    """
    inputs, activity = inputs.detach().float(), activity.detach().float()
    first, second = start.detach().float().clone(), torch.eye(len(start), device=start.device)
    held = torch.arange(len(inputs), device=inputs.device) % HELD_OUT == HELD_OUT - 1
    if not bool(held.any()):
        return first, second
    seen, wanted = inputs[~held], activity[~held]
    best, kept = captured(route(inputs[held], first, second), activity[held], top), (first.clone(), second.clone())
    with torch.enable_grad():
        first.requires_grad_(True)
        second.requires_grad_(True)
        adam = torch.optim.Adam([first, second], lr=RATE)
        for _ in range(EPOCHS):
            order = torch.randperm(len(seen), generator=generator).to(seen.device)
            for batch in order.split(BATCH):
                target = wanted[batch]
                target = target / target.max().clamp(min=1e-12)
                loss = F.binary_cross_entropy_with_logits(route(seen[batch], first, second), target)
                first.grad, second.grad = torch.autograd.grad(loss, (first, second))
                adam.step()
            share = captured(route(inputs[held], first.detach(), second.detach()), activity[held], top)
            if share > best:
                best, kept = share, (first.detach().clone(), second.detach().clone())
    return kept
