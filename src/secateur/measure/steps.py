"""Seconds of single-token decoding steps of models that exist only as configs: random weights, on this machine."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from secateur.engine.skeleton import model_class
from secateur.progress import Reporter

PROMPT, STEPS, ROUNDS = 16, 8, 7
"""Tokens before the first step; steps of each model in a round; rounds that count."""


def step_seconds(
    configs: Sequence[transformers.PreTrainedConfig], *, device: torch.device, dtype: torch.dtype,
    reporter: Reporter | None = None,
) -> list[float]:  # fmt: skip
    """Median time of a decoding step with a cache, batch 1, of each of several models.

    All are in memory at once and take turns, so that a change in the load of the machine meets all of them; a first
    round warms up and does not count.

    Args:
        dtype: number format of the weights.
    """
    reporter = reporter or Reporter()
    reporter.stage("timing decoding steps", len(configs) + ROUNDS + 1)
    models = []
    with torch.random.fork_rng(devices=[]):
        for config in configs:
            torch.manual_seed(0)
            made: Any = model_class(config)._from_config(config, dtype=dtype)
            models.append(_Decoder(made.eval().to(device), device))
            reporter.advance("building")
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for turn in range(ROUNDS + 1):
            for model, seen in zip(models, times, strict=True):
                steps = model.steps()
                seen += steps if turn else []
            reporter.advance()
    return [statistics.median(seen) for seen in times]


class _Decoder:
    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device
        accepted = inspect.signature(model.forward).parameters
        self._keep = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def steps(self) -> list[float]:
        """Seconds of each of a few steps after a short prompt."""
        vocabulary = self._model.config.get_text_config().vocab_size
        ids = (torch.arange(1, PROMPT + 1, device=self._device) * 7919 % vocabulary)[None]
        result = self._model(ids, use_cache=True, **self._keep)
        found = []
        token = result.logits[:, -1:].argmax(-1)
        int(token)
        for _ in range(STEPS):
            start = time.perf_counter()
            result = self._model(token, past_key_values=result.past_key_values, use_cache=True, **self._keep)
            token = result.logits[:, -1:].argmax(-1)
            int(token)  # waits for the device
            found.append(time.perf_counter() - start)
        return found
