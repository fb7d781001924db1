"""Cut a text into windows of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from secateur.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def windows(
    text: str, tokenizer: PreTrainedTokenizerBase, sequence_length: int, samples: int | None = None
) -> torch.Tensor:
    """Tokenise a text whole, without special tokens, and cut it in windows that do not overlap.

    Args:
        sequence_length: tokens in a window.
        samples: take the first so many windows; None takes all. The rest of the tokens is left out.

    Returns:
        int64 tensor of shape (samples, sequence_length).

    Raises:
        CalibrationError: when the text has too few tokens; the message says how many are needed and how many there are.
    """
    # verbose=False: transformers would warn that the whole text is longer than the model's window, which it may be.
    tokens = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    wanted = samples or 1
    needed = wanted * sequence_length
    if len(tokens) < needed:
        several = f"{wanted} windows of {sequence_length:,} tokens" if wanted > 1 else "one window"
        possible = len(tokens) // sequence_length
        hint = "give a longer text, or a smaller --sequence-length"
        if possible:
            hint = f"give a longer text, or --samples {possible}, or a smaller --sequence-length"
        raise CalibrationError(
            f"the text is too short: {several} need {needed:,} tokens, there are {len(tokens):,}", hint=hint
        )
    count = samples or len(tokens) // sequence_length
    return torch.tensor(tokens[: count * sequence_length], dtype=torch.int64).view(count, sequence_length)
