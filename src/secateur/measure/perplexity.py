"""Perplexity of a text cut in windows: exp of the mean negative log-likelihood of the predicted tokens."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from secateur.measure.scoring import NextTokenScorer
from secateur.progress import Reporter

# Tokens in a batch: enough to fill the matrix products, no more memory than that.
_BATCH_TOKENS = {"cpu": 1024, "other": 16384}


@dataclass(frozen=True)
class Perplexity:
    """What was measured, in nats per token; ``stderr`` (of the mean over windows) is None for a single window."""

    nll_per_token: float
    stderr: float | None
    tokens: int
    """Tokens that were predicted: all but the first of each window."""
    seconds: float
    by_window: tuple[float, ...] = ()
    """The same for each window."""

    @property
    def perplexity(self) -> float | None:
        """exp(nll); None when it is beyond the largest float, as it can be for a model that is destroyed."""
        try:
            value = math.exp(self.nll_per_token)
        except OverflowError:
            return None
        return value if math.isfinite(value) else None

    @property
    def perplexity_stderr(self) -> float | None:
        """Standard error carried over to the perplexity, to first order."""
        return None if self.stderr is None or self.perplexity is None else self.perplexity * self.stderr

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def batch_size(device: torch.device, length: int) -> int:
    """Sequences of ``length`` tokens that run together."""
    return max(1, _BATCH_TOKENS["cpu" if device.type == "cpu" else "other"] // max(length, 1))


def perplexity(
    model: Any, windows: torch.Tensor, *, batch: int | None = None, reporter: Reporter | None = None
) -> Perplexity:
    """Measure a causal model on windows that do not overlap.

    Every token but the first of its window is predicted from the tokens before it in the window; nothing is added to
    the windows; log-softmax in fp32; the mean is taken in fp64. The standard error treats windows as independent draws.

    Args:
        windows: (count, length) int64 token ids, length at least 2.
        batch: windows that run together; None chooses by device.

    Raises:
        UnsupportedModelError: for a model without next-token logits, with the reason.
        CalibrationError: for a token outside the model's vocabulary.
        RunError: when the model gives NaN.
    """
    reporter = reporter or Reporter()
    count, length = windows.shape
    if length < 2:
        raise ValueError("a window of one token predicts nothing")
    training = model.training
    model.eval()
    try:
        scorer = NextTokenScorer(model)
        size = batch or batch_size(scorer.device, length)
        reporter.stage("perplexity", -(-count // size))
        start = time.perf_counter()
        means = []
        for rows in windows.split(size):
            scored = torch.ones_like(rows, dtype=torch.bool)
            scored[:, 0] = False
            means.append(scorer(rows, scored).double().view(len(rows), length - 1).mean(dim=1))
            reporter.advance()
        seconds = time.perf_counter() - start
    finally:
        model.train(training)
    by_window = torch.cat(means)
    error = float(by_window.std() / math.sqrt(count)) if count > 1 else None
    return Perplexity(float(by_window.mean()), error, count * (length - 1), seconds, tuple(by_window.tolist()))
