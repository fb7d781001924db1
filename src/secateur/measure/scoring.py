"""The log-probability a causal model gives to each next token: what perplexity and choices are made of.

Memory: logits of a whole window (tokens x vocabulary, fp32) are often larger than the model. Where the model is a body
followed by its output matrix and nothing else, the matrix is applied to a few positions at a time. Whether it is, is
not guessed from names but tried once: both ways must give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from secateur.errors import CalibrationError, RunError, UnsupportedModelError

# Positions whose logits are in memory at once: 256 x 50,000 x 4 bytes = 51 MB.
POSITIONS = 256

_PROBE_TOKENS = 12


class NextTokenScorer:
    """Scores next tokens with a causal model.

    ``body`` and ``head`` are its two parts where the logits are the output matrix applied to the body's states and
    nothing else; None where they are more than that.

    Raises:
        UnsupportedModelError: for a model without next-token logits; the message says why it has none.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.vocabulary = _check_structure(model)
        self.body: Any = None
        self.head: Any = None
        with torch.inference_mode():
            self._probe()

    @property
    def max_length(self) -> int | None:
        """The most tokens the model takes, None when it does not say."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else None

    def __call__(
        self, tokens: torch.Tensor, scored: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Negative log-likelihoods in nats, fp32, in row order.

        Args:
            tokens: (batch, length) int64.
            scored: (batch, length) bool; True for each token to be scored. The first column has no context: never True.
            attention_mask: (batch, length), 0 at padding on the right; None when there is none.

        Raises:
            CalibrationError: for a token the model has no row for.
            RunError: when a score is NaN.
        """
        if int(tokens.max()) >= self.vocabulary:
            raise CalibrationError(
                f"token {int(tokens.max())} is outside the model's vocabulary of {self.vocabulary}",
                hint="the tokenizer does not belong to this model",
            )
        if bool(scored[:, 0].any()):
            raise ValueError("the first token of a sequence has no context to be scored in")
        predicts = scored[:, 1:].to(self.device)  # position t predicts token t + 1
        tokens = tokens.to(self.device)
        targets = tokens[:, 1:][predicts]
        arguments: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
        if attention_mask is not None:
            arguments["attention_mask"] = attention_mask.to(self.device)
        with torch.inference_mode():
            if self.body is not None:
                states = self.body(**arguments).last_hidden_state[:, :-1][predicts]
                head = self.head
            else:
                states = self.model(**arguments).logits[:, :-1][predicts]
                head = torch.nn.Identity()
            parts = [
                F.cross_entropy(head(some).float(), wanted, reduction="none")
                for some, wanted in zip(states.split(POSITIONS), targets.split(POSITIONS), strict=True)
            ]
            losses = torch.cat(parts).cpu()
        if bool(losses.isnan().any()):
            raise RunError(
                f"{type(self.model).__name__} gives NaN instead of probabilities",
                hint="its number format may be too small: try --dtype float32",
            )
        return losses

    def _probe(self) -> None:
        """One short forward: is the model causal, and does the body with the head alone give its logits?"""
        model = self.model
        tokens = torch.arange(_PROBE_TOKENS, device=self.device).remainder(self.vocabulary).repeat(2, 1)
        tokens[1, -1] = (tokens[1, -1] + 1) % self.vocabulary
        logits = model(input_ids=tokens, use_cache=False).logits
        if logits.ndim != 3 or logits.shape[1] != _PROBE_TOKENS or logits.shape[2] < 2:
            raise _refusal(model, "its output is not one row of logits per token")
        change = (logits[0].float() - logits[1].float()).abs().amax(dim=-1)
        # Some slack for arithmetic that depends on the neighbours in a batch; an encoder's change is of equal size.
        if float(change[:-1].max()) > 0.05 * float(change[-1]):
            raise _refusal(model, "it is an encoder: each position sees the tokens that it would have to predict")
        body, head = getattr(model, model.base_model_prefix, None), model.get_output_embeddings()
        if isinstance(body, torch.nn.Module) and body is not model and isinstance(head, torch.nn.Module):
            states = getattr(body(input_ids=tokens, use_cache=False), "last_hidden_state", None)
            if isinstance(states, torch.Tensor) and torch.equal(head(states), logits):
                self.body, self.head = body, head


def _check_structure(model: Any) -> int:
    """Refuse what cannot have next-token logits without running it; return the size of the vocabulary."""
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise _refusal(model, f"it reads {model.main_input_name}, not text")
    if getattr(model.config, "is_encoder_decoder", False):
        raise _refusal(model, "it is an encoder-decoder: its logits depend on a second text")
    embedding = model.get_input_embeddings()
    if model.get_output_embeddings() is None or embedding is None:
        raise _refusal(model, "it has no language-model head")
    return int(embedding.weight.shape[0])


def _refusal(model: Any, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} has no next-token logits: {reason}",
        hint="perplexity, pairs and choices need a decoder-only language model",
    )
