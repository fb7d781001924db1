"""The search of an allocation rule on the whole model: what it costs, and the divergence that it is judged by."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from secateur.allocation._base import Searching, Share
from secateur.checkpoint.source import Source
from secateur.engine.blocks import MatrixSpec
from secateur.engine.device import trim_memory
from secateur.engine.inputs import output_tensor
from secateur.engine.levels import Leveled, LevelStore
from secateur.measure.model import load_model
from secateur.progress import Reporter
from secateur.recovery.blocks import duration
from secateur.recovery.losses import distillation
from secateur.recovery.teacher import top_logits
from secateur.seeds import derived_seed

CLASSES = 64
"""Most likely next tokens of the dense model that are kept for each token."""


@dataclass
class Dense:
    """What the dense model says about some windows."""

    windows: list[torch.Tensor]
    """Token ids, (1, length) each."""
    answers: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Of each: classes and their log-probabilities, (length, k)."""
    seconds: float = 0.0
    """That a window took."""


def ask_dense(model: Any, windows: Sequence[torch.Tensor], compute: torch.dtype) -> Dense:
    """Note what the dense model says, and how long that takes."""
    found = Dense(list(windows))
    started = time.monotonic()
    for window in windows:
        ids, logs = top_logits(_logits(model, window, compute), CLASSES)
        found.answers.append((ids.cpu(), logs.cpu()))
    found.seconds = (time.monotonic() - started) / max(1, len(windows))
    return found


def tell_cost(rule: Searching, dense: Dense, store: LevelStore, weights: int, reporter: Reporter) -> None:
    """Say what the search will take; refuse it where the disk is too small.

    Args:
        weights: of all matrices together.

    Raises:
        DiskSpaceError: with both sizes.
    """
    store.require_space(weights)
    tokens = sum(window.shape[1] for window in dense.windows) / len(dense.windows)
    reporter.note(
        f"the search of the allocation: {rule.generations} generations, at most {rule.forwards:,} forwards of "
        f"{tokens:,.0f} tokens, about {duration(rule.forwards * dense.seconds)} after the matrices are measured; "
        f"{store.nbytes(weights) / 1e9:.1f} GB on disk meanwhile"
    )


class _Bench:
    """As `secateur.allocation._base.Bench`: divergence from the dense model's next tokens, in nats."""

    def __init__(
        self, model: Leveled, dense: Dense, compute: torch.dtype, generator: random.Random, reporter: Reporter
    ) -> None:
        self.generator, self.windows = generator, len(dense.windows)
        self.history: list[float] = []
        self._model, self._dense, self._compute, self._reporter = model, dense, compute, reporter

    @torch.no_grad()
    def loss(self, levels: Mapping[str, int], windows: Sequence[int]) -> float:
        self._model.bring(levels)
        total, tokens = 0.0, 0
        for number in windows:
            window = self._dense.windows[number]
            logits = _logits(self._model.model, window, self._compute)
            ids, logs = (one.to(logits.device) for one in self._dense.answers[number])
            total += float(distillation(logits, ids, logs)) * len(logits)
            tokens += len(logits)
        return total / tokens

    def tell(self, loss: float) -> None:
        self.history.append(loss)
        self._reporter.advance(f"divergence {loss:.4f}")


def search(
    rule: Searching, source: Source, specs: Mapping[str, MatrixSpec], store: LevelStore, dense: Dense,
    shares: Sequence[Share], start: Mapping[str, float], sparsity: float, seed: int, device: torch.device,
    compute: torch.dtype, reporter: Reporter,
) -> dict[str, float]:  # fmt: skip
    """What a rule makes of the division that it starts from.

    Args:
        specs: of the matrices that are divided among, by name; others stay dense meanwhile.
    """
    model = load_model(source.folder, device=str(device), dtype="float32")
    generator = random.Random(derived_seed(seed, "allocation"))
    bench = _Bench(Leveled(model, specs, store), dense, compute, generator, reporter)
    reporter.stage("searching", rule.generations + 1)
    made = rule.refine(shares, start, sparsity, bench)
    first, last = bench.history[0], bench.history[-1]
    reporter.note(
        f"the search took the divergence from the dense model on {bench.windows} calibration windows from {first:.4f} "
        f"to {last:.4f} nats a token"
    )
    del model, bench
    trim_memory()
    return made


@torch.no_grad()
def _logits(model: Any, window: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """Of each token, (length, classes)."""
    with torch.autocast(window.device.type, compute, enabled=compute != torch.float32):
        output: Any = model(input_ids=window, use_cache=False)
    return output_tensor(output)[0]
