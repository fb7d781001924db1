"""Calibration data as the keyword arguments of a model's forward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers

TOKENS_AT_ONCE = 1024
"""Short windows are put together up to this many tokens, so that the matrix products are worth their overhead."""


def is_vision(model: transformers.PreTrainedModel) -> bool:
    """Whether the model looks at pixels rather than tokens."""
    return bool(model.main_input_name == "pixel_values")


def batches_of_windows(model: transformers.PreTrainedModel, windows: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Windows (n, L) as batches of at most `TOKENS_AT_ONCE` tokens, one window at the least."""
    rows = max(1, TOKENS_AT_ONCE // windows.shape[1])
    return [inputs_of_window(model, windows[start : start + rows]) for start in range(0, len(windows), rows)]


def inputs_of_window(model: transformers.PreTrainedModel, window: torch.Tensor) -> dict[str, torch.Tensor]:
    """Arguments for token ids (batch, L). An encoder-decoder reads the first half and continues with the second."""
    if not model.config.is_encoder_decoder:
        return {"input_ids": window}
    half = max(1, window.shape[1] // 2)
    decoder = window[:, half:] if window.shape[1] > half else window
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is None:
        start = model.config.pad_token_id or 0
    first = torch.full_like(decoder[:, :1], start)
    return {"input_ids": window[:, :half], "decoder_input_ids": torch.cat([first, decoder[:, :-1]], dim=1)}


def batches_of_samples(samples: Iterable[Mapping[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """Ready-made forward arguments, as a Python caller may give them: only tensors, each with a batch dimension."""
    return [{name: value for name, value in sample.items() if isinstance(value, torch.Tensor)} for sample in samples]


def output_tensor(output: Any) -> torch.Tensor:
    """The tensor that stands for the answer of a model or block: logits, or the last hidden state."""
    if isinstance(output, torch.Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, torch.Tensor):
            return value
    return output[0] if isinstance(output, tuple) else next(iter(output.values()))  # type: ignore[no-any-return]
