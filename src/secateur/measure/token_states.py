"""What a causal model makes of every token of a window: its loss, and the state that its logits are read from.

The state is the input of the output matrix, after the final norm. The logit of a token is the state's inner product
with the token's row in that matrix: |state| |row| cos(angle). So a true token can lose by a larger angle to its row, or
by a shorter state; the margin, its logit less the largest other one, says whether it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from secateur.errors import RunError, UnsupportedModelError
from secateur.measure.scoring import POSITIONS, NextTokenScorer


@dataclass(frozen=True)
class TokenStates:
    """All but the first token of one window of n + 1 tokens; every tensor is (n,)."""

    tokens: torch.Tensor
    """int64, the true tokens."""
    rivals: torch.Tensor
    """int64, the likeliest other token."""
    loss: torch.Tensor
    """float64, nats."""
    angle: torch.Tensor
    """float64, degrees between the state and the true token's row."""
    length: torch.Tensor
    """float64, Euclidean length of the state."""
    margin: torch.Tensor
    """float64, logit of the true token less that of its rival."""

    def __len__(self) -> int:
        return len(self.tokens)


class StateReader:
    """Reads the states of a causal model, one window at a time.

    ``linear`` says that the logits are the states times the output matrix and nothing else, not even a bias.

    Raises:
        UnsupportedModelError: for a model without next-token logits, with the reason.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._scorer = NextTokenScorer(model)
        self._head = model.get_output_embeddings()
        weight = getattr(self._head, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
            raise UnsupportedModelError(
                f"the head of {type(model).__name__} is a {type(self._head).__name__}, not a matrix",
                hint="states are compared with the rows of an output matrix",
            )
        self._rows = weight
        self.linear = self._scorer.body is not None and getattr(self._head, "bias", None) is None

    @property
    def vocabulary(self) -> int:
        return self._scorer.vocabulary

    def __call__(
        self, window: torch.Tensor, lengths: Sequence[torch.Tensor] = ()
    ) -> tuple[TokenStates, list[torch.Tensor]]:
        """The states of one window, and for each entry of ``lengths`` the losses if the states had these lengths.

        Args:
            window: (n + 1,) int64 token ids, at least two.
            lengths: each (n,): the states keep their direction. Only for a ``linear`` model.

        Raises:
            RunError: when the model gives NaN or infinity.
        """
        if lengths and not self.linear:
            raise ValueError("the logits of this model are not linear in its states")
        device = self._scorer.device
        wanted = window[1:].to(device)
        with torch.inference_mode():
            states, logits = self._run(window.to(device)[None])
            parts = []
            for start in range(0, len(wanted), POSITIONS):
                part = slice(start, start + POSITIONS)
                scores = (self._head(states[part]) if logits is None else logits[part]).float()
                parts.append(self._look(states[part], scores, wanted[part], [other[part] for other in lengths]))
            rivals, loss, angle, length, margin, *other = (
                torch.cat(column).cpu() for column in zip(*parts, strict=True)
            )
        if not all(bool(column.isfinite().all()) for column in (loss, angle, length, margin)):
            raise RunError(
                f"{type(self.model).__name__} gives NaN or infinity instead of logits",
                hint="the model is broken, or its number format too small",
            )
        return TokenStates(window[1:].cpu(), rivals, loss, angle, length, margin), other

    def _run(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """States (n, hidden) of all positions that predict a token, and their logits where the head is not enough."""
        if self._scorer.body is not None:
            return self._scorer.body(input_ids=tokens, use_cache=False).last_hidden_state[0, :-1], None
        seen: list[torch.Tensor] = []
        hook = self._head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            logits = self.model(input_ids=tokens, use_cache=False).logits
        finally:
            hook.remove()
        if not seen or seen[-1].shape[-1] != self._rows.shape[1] or seen[-1].shape[-2] != tokens.shape[1]:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does not apply its head to one state for every token",
                hint="its losses can be measured, its states cannot",
            )
        return seen[-1].reshape(tokens.shape[1], -1)[:-1], logits[0, :-1]

    def _look(
        self, states: torch.Tensor, logits: torch.Tensor, wanted: torch.Tensor, lengths: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """rivals, loss, angle, length, margin, and the losses at other lengths; states (p, hidden), logits (p, V)."""
        true = logits.gather(1, wanted[:, None])
        best, rivals = logits.scatter(1, wanted[:, None], float("-inf")).max(dim=1)
        rows = self._rows[wanted].double()
        length = states.double().norm(dim=1)
        # The product of two tiny lengths may be 0: a state of length 0 has no direction, and counts as a right angle.
        size = (length * rows.norm(dim=1)).clamp_min(torch.finfo(torch.float64).tiny)
        angle = ((states.double() * rows).sum(dim=1) / size).clamp(-1, 1).acos().rad2deg()
        losses = [
            F.cross_entropy(logits.double() * (other.to(logits.device) / length)[:, None], wanted, reduction="none")
            for other in lengths
        ]
        loss = F.cross_entropy(logits, wanted, reduction="none").double()
        return [rivals, loss, angle, length, (true[:, 0] - best).double(), *losses]
