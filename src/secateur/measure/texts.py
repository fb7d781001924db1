"""Many texts through a model: batches sorted by length, so that little of it is padding; answers in file order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from secateur.errors import CalibrationError, RunError
from secateur.measure.perplexity import batch_size
from secateur.progress import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Read = Callable[[Any, torch.Tensor], torch.Tensor]
"""From the model's output and the attention mask (batch, L) to one row for each text (batch, width)."""

# Tokenizers that know no limit say 1e30.
_NO_LIMIT = 10**9


@dataclass(frozen=True)
class Tokens:
    """Token ids of each text, special tokens of the tokenizer included."""

    sequences: list[list[int]]
    limit: int | None
    """The most tokens of a text; what is longer was cut."""
    cut: int
    """How many texts were cut."""

    @property
    def told(self) -> str:
        """The cut in words, for a protocol."""
        if not self.cut:
            return "no text cut"
        return f"{self.cut} of {len(self.sequences)} texts cut to {self.limit} tokens"


def tokenise(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, limit: int | None, name: str
) -> Tokens:
    """Tokenise with the tokenizer's own special tokens; texts longer than the model takes are cut.

    Args:
        limit: the most tokens of a text, beside what tokenizer and config say; None for no other limit.
        name: of the data, for messages.

    Raises:
        CalibrationError: for a text without tokens, or a token that the model does not know.
    """
    known = (limit, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None))
    limits = [int(value) for value in known if value is not None and 0 < value < _NO_LIMIT]
    limit = min(limits) if limits else None
    # verbose=False: transformers would warn of the long texts, which are counted and cut below.
    sequences = tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
    long = [] if limit is None else [index for index, tokens in enumerate(sequences) if len(tokens) > limit]
    for index in long:
        # Cut by the tokenizer, which keeps the special tokens at the end.
        sequences[index] = tokenizer(texts[index], truncation=True, max_length=limit)["input_ids"]
    for index, tokens in enumerate(sequences):
        if not tokens:
            raise CalibrationError(f"{name}: text {index + 1} has no tokens")
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(max(tokens) for tokens in sequences)
    if largest >= rows:
        raise CalibrationError(
            f"{name}: token {largest} is outside the model's vocabulary of {rows}",
            hint="the tokenizer does not belong to this model",
        )
    return Tokens(sequences, limit, len(long))


@contextlib.contextmanager
def padding_token(model: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[int | None]:
    """The token to pad with: the config's, else the tokenizer's padding token, else its end token; None for none.

    Decoders with a classification head look for the last token that is not the config's ``pad_token_id``. Where the
    config has none it holds the chosen one meanwhile; afterwards the config is as it was.
    """
    config = model.config.get_text_config()
    before = getattr(config, "pad_token_id", None)
    known = before if before is not None and before >= 0 else None
    token = next((t for t in (known, tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), None)
    if known is None:
        config.pad_token_id = token
    try:
        yield token
    finally:
        if known is None:
            config.pad_token_id = before


def run_texts(
    model: Any,
    tokens: Tokens,
    padding: int | None,
    read: Read,
    *,
    name: str,
    batch: int | None = None,
    reporter: Reporter | None = None,
) -> torch.Tensor:
    """One row for each text, (n, width) float32 on the CPU, in the order of the texts.

    Args:
        padding: token to pad with on the right; without one, texts run alone.
        batch: texts that run together; None chooses by length and device.

    Raises:
        RunError: when the model gives NaN.
    """
    reporter = reporter or Reporter()
    device = next(model.parameters()).device
    order = sorted(range(len(tokens.sequences)), key=lambda index: -len(tokens.sequences[index]))
    batches: list[list[int]] = []
    while order:
        size = 1 if padding is None else batch or batch_size(device, len(tokens.sequences[order[0]]))
        batches.append(order[:size])
        order = order[size:]
    reporter.stage(name, len(batches))
    rows: list[torch.Tensor | None] = [None] * len(tokens.sequences)
    training = model.training
    model.eval()
    try:
        for indices in batches:
            ids = torch.full((len(indices), len(tokens.sequences[indices[0]])), padding or 0)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(indices):
                sequence = tokens.sequences[index]
                ids[row, : len(sequence)] = torch.tensor(sequence)
                mask[row, : len(sequence)] = 1
            ids, mask = ids.to(device), mask.to(device)
            with torch.inference_mode():
                answers = read(model(input_ids=ids, attention_mask=mask), mask).float().cpu()
            for index, answer in zip(indices, answers, strict=True):
                rows[index] = answer
            reporter.advance()
    finally:
        model.train(training)
    found = torch.stack([row for row in rows if row is not None])
    if bool(found.isnan().any()):
        raise RunError(
            f"{type(model).__name__} gives NaN", hint="its number format may be too small: try --dtype float32"
        )
    return found
