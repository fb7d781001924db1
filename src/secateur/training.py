"""The settings of a recovery run: flags of the command line = arguments of the Python call."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.errors import UnknownNameError, UsageError

MODES = ("full", "lora", "norms-and-biases", "blocks", "adapter-moe")
LOSSES = ("auto", "lm", "kd", "kd+lm", "kd+hidden", "labels", "features")
CACHED = ("kd", "kd+lm")
"""Losses for which the logits of a teacher of text are kept on disk."""
RANK = 16
TOP_K = 64
EXPERTS = 8
EXPERTS_OF_A_TOKEN = 2
DIM = 64
SAVE_MINUTES = 10.0


@dataclass(frozen=True, kw_only=True)
class Training:
    """How quality is trained back. A field left at None takes its default when the model and the data are known."""

    data: str = "builtin"
    """Text to train on: a text file, JSONL with `text` (and `label`), a dataset NAME[:CONFIG[:SPLIT]], or builtin."""
    mode: str = "full"
    """What is trained: full (all weights), lora, norms-and-biases, blocks (one after the other, no whole graph), or
    adapter-moe (adapters of which a router picks some for each token: the model gets larger)."""
    loss: str = "auto"
    """lm, kd (the teacher's logits), kd+lm, kd+hidden, labels, or features; auto takes what suits the model."""
    teacher: str | None = None
    """The dense model to learn from; the source that secateur.json names is taken when this is left out."""
    tokens: int | None = None
    """Budget in training tokens, of all processes together (once through the data)."""
    minutes: float | None = None
    """Budget in minutes of training, turned into steps by a measurement before it starts. The steps alone are counted:
    asking the teacher, loading, verifying and measuring come on top."""
    learning_rate: float | None = None
    """Peak learning rate (full 4e-4, blocks 4e-4, lora 3e-3, else 1e-3)."""
    batch_size: int | None = None
    """Sequences of an optimiser step in each process (1; 2 for blocks; 16 for labelled texts)."""
    sequence_length: int | None = None
    """Tokens in a training window (1024, never more than the model's)."""
    rank: int | None = None
    """Rank of the adapters of --mode lora (16)."""
    top_k: int | None = None
    """Logits of the teacher that are kept for each token (64); the others count as one. With --mode adapter-moe it is
    the adapters of each token instead (2)."""
    experts: int | None = None
    """Adapters behind each feed-forward network with --mode adapter-moe (8)."""
    dim: int | None = None
    """Numbers in an adapter of --mode adapter-moe (64)."""
    epochs: int | None = None
    """Times through the data: labelled texts (3), texts to embed (1), with --mode blocks what the tokens take."""
    held_out: float = 0.05
    """Share of the data that is not trained on and measures generalisation."""
    gradient_checkpointing: str = "auto"
    """on, off, or auto: on for lora and norms-and-biases, the modes that save memory."""
    save_minutes: float | None = None
    """Minutes between checkpoints that --resume can go on from (10)."""
    trainer: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of transformers.TrainingArguments, as KEY=VALUE: schedulers, optimisers, logging, precision."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """cpu, cuda, mps ...; auto takes an accelerator when there is one."""
    compute_dtype: str = "auto"
    """Number format of forward and backward: auto, float32, bfloat16. Weights and optimiser stay float32."""

    def __post_init__(self) -> None:
        for name, value, known in (("mode", self.mode, MODES), ("loss", self.loss, LOSSES)):
            if value not in known:
                raise UnknownNameError(name, value, known)
        if self.gradient_checkpointing not in ("auto", "on", "off"):
            raise UsageError(
                f"gradient_checkpointing is '{self.gradient_checkpointing}'", hint="it must be auto, on or off"
            )
        if self.compute_dtype not in ("auto", "float32", "bfloat16"):
            raise UsageError(f"compute_dtype is '{self.compute_dtype}'", hint="use auto, float32 or bfloat16")
        for name in ("tokens", "batch_size", "rank", "top_k", "experts", "dim", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}", hint="it must be at least 1")
        for name in ("minutes", "learning_rate", "save_minutes"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UsageError(f"{name} is {value}", hint="it must be more than 0, and finite")
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}", hint="it must be at least 0")
        if not 0 <= self.held_out < 1:
            raise UsageError(f"held_out is {self.held_out}", hint="it is a share, at least 0 and less than 1")
        if self.tokens is not None and self.minutes is not None:
            raise UsageError("both tokens and minutes are given", hint="give one budget")
        if self.mode == "blocks" and self.minutes is not None:
            raise UsageError("--mode blocks has no budget in minutes", hint="give --tokens")
        if self.mode == "blocks" and self.trainer:
            raise UsageError("--mode blocks does not run on the Trainer", hint="leave --trainer out")
        if self.teacher is not None and self.loss in ("lm", "labels") and self.mode != "blocks":
            raise UsageError(f"--loss {self.loss} has no teacher", hint="leave --teacher out, or use --loss kd")
        if self.mode == "adapter-moe" and (self.top_k or EXPERTS_OF_A_TOKEN) > (self.experts or EXPERTS):
            raise UsageError(
                f"--top-k {self.top_k or EXPERTS_OF_A_TOKEN} of {self.experts or EXPERTS} experts",
                hint="with --mode adapter-moe it is the number of adapters of each token",
            )
        if self.mode == "blocks" and self.loss != "auto":
            raise UsageError("--mode blocks has a loss of its own", hint="leave --loss out")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; `from_dict` reads it back."""
        return dataclasses.asdict(self) | {"trainer": dict(self.trainer)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Training:
        """Build settings from plain data; what was not given is simply absent.

        Raises:
            UnknownNameError: for an unknown key.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        for key in data:
            if key not in known:
                raise UnknownNameError("setting of recover", key, known)
        return cls(**data)
