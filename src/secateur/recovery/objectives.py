"""The loss of one batch: the student's forward, and the teacher's where it is not in the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.recovery.losses import (
    distillation,
    distillation_and_text,
    feature_distance,
    hidden_distance,
    next_token,
    pooled,
)
from secateur.recovery.teacher import top_logits


class _Objective:
    """Forward in ``dtype``; the weights keep theirs."""

    def __init__(self, dtype: torch.dtype = torch.float32, teacher: nn.Module | None = None) -> None:
        self.dtype = dtype
        self.teacher = teacher

    def _run(self, model: nn.Module, **inputs: Any) -> Any:
        device = inputs["input_ids"].device.type
        # Without the cache a weight that is used once a pass need not be kept in both formats.
        with torch.autocast(device, dtype=self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False):
            return model(**inputs)

    def _ask(self, **inputs: Any) -> Any:
        assert self.teacher is not None
        with torch.no_grad():
            return self._run(self.teacher, **inputs)


class LanguageObjective(_Objective):
    """Next tokens (``lm``), the teacher's distribution (``kd``), or that and one more: the sum of the two.

    Args:
        top_k: logits of a live teacher that count; a cached one was cut already.
    """

    def __init__(
        self, loss: str, dtype: torch.dtype = torch.float32, teacher: nn.Module | None = None, top_k: int = 64
    ) -> None:
        super().__init__(dtype, teacher)
        self._loss, self._top_k = loss, top_k

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        hidden = self._loss == "kd+hidden"
        asked = {"output_hidden_states": True} if hidden else {}
        out = self._run(model, input_ids=ids, use_cache=False, **asked)
        # Labels for every position, the last one left out: a slice of the logits would be copied on the way back.
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
        if self._loss == "lm":
            return next_token(out.logits, labels)
        if "teacher_ids" in batch:
            taught = batch["teacher_ids"], batch["teacher_log_probabilities"]
        else:
            dense = self._ask(input_ids=ids, use_cache=False, **asked)
            taught = top_logits(dense.logits, self._top_k)
        if self._loss == "kd+lm":
            return distillation_and_text(out.logits, labels, *taught)
        loss = distillation(out.logits, *taught)
        return loss + hidden_distance(out.hidden_states[1:], dense.hidden_states[1:]) if hidden else loss


class LabelObjective(_Objective):
    """Labels of whole texts, or (``kd``) the teacher's distribution over them."""

    def __init__(self, loss: str, dtype: torch.dtype = torch.float32, teacher: nn.Module | None = None) -> None:
        super().__init__(dtype, teacher)
        self._loss = loss

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = self._run(model, **inputs).logits
        if self._loss == "labels":
            return next_token(logits, batch["labels"])
        dense = self._ask(**inputs).logits
        return distillation(logits, *top_logits(dense, dense.shape[-1]))


class FeatureObjective(_Objective):
    """The teacher's embeddings and their similarities to each other; no labels are needed."""

    def __init__(self, teacher: nn.Module, pooling: str = "mean", dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype, teacher)
        self._pooling = pooling

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        ours = self._run(model, **inputs).last_hidden_state
        theirs = self._ask(**inputs).last_hidden_state
        mask = inputs["attention_mask"]
        return feature_distance(pooled(ours, mask, self._pooling), pooled(theirs, mask, self._pooling))
