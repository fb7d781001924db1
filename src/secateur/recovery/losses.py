"""What training minimises: next tokens, the teacher's distribution, its hidden states, its embeddings.

The losses over a vocabulary compute their own gradient while they compute their value, a few rows at a time: what
remains in memory is one tensor of the size of the logits, in their number format, instead of the several float32 copies
that autograd would keep. It is handed on in place, so a loss can be gone back through once only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 32
"""Rows of logits that are float32 at one time: few enough to stay in a cache."""


class _NextToken(torch.autograd.Function):
    """Mean cross-entropy with one right class for each row; rows labelled -100 do not count."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        counted = labels != -100
        count = max(int(counted.sum()), 1)
        total = logits.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(logits)
        for rows in torch.arange(len(logits), device=logits.device).split(_ROWS):
            value, part = _surprise(logits[rows].float(), labels[rows], counted[rows])
            total += value
            gradient[rows] = (part / count).to(logits.dtype)
        ctx.save_for_backward(gradient)
        return total / count

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(outputs[0]), None


class _Distillation(torch.autograd.Function):
    """Mean KL divergence from the teacher over its top-k classes and the rest taken as one class."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, log_p: Tensor) -> Tensor:
        total = logits.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(logits)
        for rows in torch.arange(len(logits), device=logits.device).split(_ROWS):
            value, part = _rest_divergence(logits[rows].float(), ids[rows], log_p[rows].float())
            total += value.sum()
            gradient[rows] = (part / len(logits)).to(logits.dtype)
        ctx.save_for_backward(gradient)
        return total / max(len(logits), 1)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(outputs[0]), None, None


class _DistillationAndText(torch.autograd.Function):
    """The sum of the two, with one gradient for both."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ids: Tensor, log_p: Tensor) -> Tensor:
        counted = labels != -100
        count = max(int(counted.sum()), 1)
        total = logits.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(logits)
        for rows in torch.arange(len(logits), device=logits.device).split(_ROWS):
            z = logits[rows].float()
            divergence, part = _rest_divergence(z, ids[rows], log_p[rows].float())
            surprise, other = _surprise(z, labels[rows], counted[rows])
            total += divergence.sum() / len(logits) + surprise / count
            gradient[rows] = (part / len(logits) + other / count).to(logits.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(outputs[0]), None, None, None


def _surprise(z: Tensor, labels: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of -log q of the labels of the rows that count, and its gradient by the logits: q, less 1 on the label."""
    y = labels.clamp_min(0)[:, None]
    log_q = z.log_softmax(-1)
    value = -(log_q.gather(-1, y)[:, 0] * counted).sum()
    gradient = log_q.exp_()
    gradient.scatter_add_(-1, y, torch.full_like(gradient[:, :1], -1.0))
    return value, gradient.mul_(counted[:, None])


def _rest_divergence(z: Tensor, ids: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """KL of each row and its gradient by the logits: q - p on the teacher's classes, else q·(1 - p_rest/q_rest)."""
    tiny = torch.finfo(torch.float32).tiny
    log_q = z.log_softmax(-1)
    q = log_q.exp()
    p = log_p.exp()
    top_q = q.gather(-1, ids)
    complete = ids.shape[-1] == z.shape[-1]
    # Summed over the classes themselves: 1 - sum(top) would be noise where the teacher's classes have nearly all.
    rest_q = q.scatter(-1, ids, 0.0).sum(-1) if not complete else torch.zeros_like(q[:, 0])
    rest_p = (1 - p.sum(-1)).clamp_min(0) if not complete else torch.zeros_like(q[:, 0])
    value = (p * (log_p - log_q.gather(-1, ids))).sum(-1)
    value += torch.where(rest_p > 0, rest_p * (rest_p.clamp_min(tiny).log() - rest_q.clamp_min(tiny).log()), 0.0)
    mass = p.sum(-1) + rest_p
    gradient = q * (mass - rest_p / rest_q.clamp_min(tiny))[:, None]
    gradient.scatter_(-1, ids, top_q * mass[:, None] - p)
    return value, gradient


def next_token(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats.

    Args:
        logits: (..., classes), e.g. (2, 1023, 49152) in bfloat16.
        labels: (...) class numbers; -100 leaves a row out.
    """
    loss: Tensor = _NextToken.apply(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
    return loss


def distillation(logits: Tensor, ids: Tensor, log_probabilities: Tensor) -> Tensor:
    """Mean KL(teacher || student) in nats, over the k classes that the teacher found most likely and the rest as one.

    It is the exact divergence when k is the number of classes, and never more than that otherwise (merging classes
    cannot raise a divergence). Source: Hinton et al. 2015 (arXiv 1503.02531), temperature 1.

    Args:
        logits: the student's, (..., classes).
        ids: (..., k) class numbers, those of a row all different.
        log_probabilities: (..., k) natural logarithms of the teacher's probabilities of these classes.
    """
    k = ids.shape[-1]
    loss: Tensor = _Distillation.apply(
        logits.reshape(-1, logits.shape[-1]), ids.reshape(-1, k), log_probabilities.reshape(-1, k)
    )
    return loss


def distillation_and_text(logits: Tensor, labels: Tensor, ids: Tensor, log_probabilities: Tensor) -> Tensor:
    """`distillation` and `next_token` of the same logits, added: one gradient in memory instead of two.

    Args:
        logits: (..., classes).
        labels: (...) class numbers; -100 leaves a row out of the text's part.
        ids, log_probabilities: (..., k), of the teacher.
    """
    k = ids.shape[-1]
    loss: Tensor = _DistillationAndText.apply(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ids.reshape(-1, k), log_probabilities.reshape(-1, k)
    )
    return loss


def hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over layers and tokens of |s - t|² / |t|²: relative, so that tokens with huge activations weigh like others.

    Args:
        student, teacher: hidden states of the same layers, each (batch, tokens, features).
    """
    distances = []
    for ours, theirs in zip(student, teacher, strict=True):
        theirs = theirs.to(ours.device, torch.float32)
        scale = theirs.square().sum(-1).clamp_min(1e-6)
        distances.append(((ours.float() - theirs).square().sum(-1) / scale).mean())
    return torch.stack(distances).mean()


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """How far embeddings are from the teacher's, themselves and in their similarities to each other.

    1 - cosine of each text with its own teacher embedding, plus the mean squared difference of all pairwise cosines.

    Args:
        student, teacher: (texts, features), any length; at least one text.
    """
    ours, theirs = F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1)
    own = 1 - (ours * theirs).sum(-1).mean()
    count = len(ours)
    if count < 2:
        return own
    apart = ~torch.eye(count, dtype=torch.bool, device=ours.device)
    return own + (ours @ ours.T - theirs @ theirs.T)[apart].square().mean()


def pooled(states: Tensor, attention_mask: Tensor, pooling: str = "mean") -> Tensor:
    """One embedding for each text: the mean over its tokens, or its first token.

    Args:
        states: (texts, tokens, features); attention_mask: (texts, tokens), 0 for padding.
        pooling: ``mean`` or ``cls``.
    """
    if pooling == "cls":
        return states[:, 0].float()
    mask = attention_mask[..., None].float()
    return (states.float() * mask).sum(1) / mask.sum(1).clamp_min(1)
