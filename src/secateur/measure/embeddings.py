"""Sentence embeddings, and whether two models, or a model and people, find the same texts alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.errors import UnsupportedModelError
from secateur.measure.ranks import RESAMPLES, RankCorrelation, with_interval
from secateur.measure.texts import padding_token, run_texts, tokenise
from secateur.progress import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Embeddings = NDArray[np.float32]

_PARTS = {"Transformer", "Pooling", "Normalize"}


@dataclass(frozen=True)
class Pooling:
    """How the vectors of the tokens become one of the text, and the most tokens of a text (None: no own limit)."""

    kind: Literal["mean", "cls"] = "mean"
    limit: int | None = None

    @property
    def told(self) -> str:
        """In words, for a protocol."""
        which = "mean over the tokens" if self.kind == "mean" else "first token"
        return f"{which}, L2-normalised" + ("" if self.limit is None else f", at most {self.limit} tokens")


def read_pooling(folder: Path | None) -> Pooling:
    """The pooling that a folder in the form of sentence-transformers asks for; the mean where it says nothing.

    Raises:
        UnsupportedModelError: when it asks for something else than mean or first token, or for further layers.
    """
    if folder is None:
        return Pooling()
    for part in _json(folder / "modules.json") or []:
        kind = str(part.get("type", "")).rpartition(".")[2]
        if kind not in _PARTS:
            raise UnsupportedModelError(
                f"{folder / 'modules.json'}: the embedding goes through a further layer ({kind})",
                hint="embeddings are measured after mean or first-token pooling only",
            )
    config = _json(folder / "1_Pooling" / "config.json") or {}
    modes = [
        name.removeprefix("pooling_mode_") for name, on in config.items() if on is True and "pooling_mode_" in name
    ]
    if "pooling_mode" in config:  # the newer form: one name, or a list of them
        value = config["pooling_mode"]
        modes = value if isinstance(value, list) else [value]
    limit = (_json(folder / "sentence_bert_config.json") or {}).get("max_seq_length")
    match modes:
        case [] | ["mean_tokens"] | ["mean"]:
            return Pooling("mean", limit)
        case ["cls_token"] | ["cls"]:
            return Pooling("cls", limit)
    raise UnsupportedModelError(
        f"{folder / '1_Pooling' / 'config.json'} asks for {' and '.join(map(str, modes))}",
        hint="embeddings are measured after mean or first-token pooling only",
    )


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def check_encoder(model: Any, name: str) -> None:
    """Refuse a model that gives no vector for each token of a text.

    Raises:
        UnsupportedModelError: with the reason; ``name`` says what it was to be measured on.
    """
    hint = f"{name} needs an embedding model: a base encoder such as BertModel, without a head"
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise UnsupportedModelError(f"{type(model).__name__} reads {model.main_input_name}, not text", hint=hint)
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{type(model).__name__} is an encoder-decoder", hint=hint)
    if model.base_model is not model:
        raise UnsupportedModelError(f"{type(model).__name__} has a head on top of its encoder", hint=hint)


def embed(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    folder: Path | None = None,
    max_length: int | None = None,
    batch: int | None = None,
    name: str = "embeddings",
    reporter: Reporter | None = None,
) -> Embeddings:
    """One vector of length 1 for each text, (n, d) float32, in the order of the texts.

    No prompt is put before a text, and texts longer than the model takes are cut.

    Args:
        folder: of the model; its ``1_Pooling/config.json`` says whether the mean over the tokens of the text (special
            tokens included, padding not) or the first token is taken. None, or a folder without it: the mean.
        max_length: the most tokens of a text, where config and tokenizer do not say it.
        batch: texts that run together; None chooses by length and device.
        name: of the data, for progress and messages.

    Raises:
        UnsupportedModelError: for a model that is no base encoder, or another pooling.
        CalibrationError: for a text without tokens.
        RunError: when the model gives NaN.
    """
    reporter = reporter or Reporter()
    check_encoder(model, name)
    pooling = read_pooling(folder)
    limits = [limit for limit in (max_length, pooling.limit) if limit is not None]
    tokens = tokenise(model, tokenizer, texts, limit=min(limits) if limits else None, name=name)
    if tokens.cut:
        reporter.note(f"{name}: {tokens.told}")

    def read(output: Any, mask: torch.Tensor) -> torch.Tensor:
        states = output.last_hidden_state.float()
        if pooling.kind == "cls":
            pooled = states[:, 0]
        else:
            weights = mask[:, :, None].to(states.dtype)
            pooled = (states * weights).sum(dim=1) / weights.sum(dim=1)
        return torch.nn.functional.normalize(pooled, dim=-1)

    with padding_token(model, tokenizer) as padding:
        found = run_texts(model, tokens, padding, read, name=name, batch=batch, reporter=reporter)
    rows: Embeddings = found.numpy()
    return rows


def similarity_correlation(
    ours: Embeddings, dense: Embeddings, *, resamples: int = RESAMPLES, seed: int = 0
) -> RankCorrelation:
    """Whether two models find the same texts alike: Spearman's correlation of all cosine similarities of pairs i < j.

    The interval is a 95 % percentile interval of the bootstrap over texts, not over pairs, which share their texts. A
    text that is drawn twice makes no pair with itself.

    Args:
        ours: (n, d) rows of length 1, n at least 3.
        dense: (n, e) rows of length 1 for the same texts.
    """
    count = len(ours)
    first, second = np.triu_indices(count, k=1)
    sides = [(rows.astype(np.float64) @ rows.astype(np.float64).T)[first, second] for rows in (ours, dense)]
    generator = np.random.default_rng(seed)

    def draw() -> NDArray[Any]:
        times = np.bincount(generator.integers(count, size=count), minlength=count)
        return (times[first] * times[second]).astype(np.float64)

    return with_interval(sides[0], sides[1], (draw() for _ in range(resamples)))


def pairs_correlation(
    first: Embeddings, second: Embeddings, scores: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> RankCorrelation:
    """Spearman's correlation of the cosine similarity of pairs with given scores; bootstrap over pairs.

    Args:
        first: (n, d) rows of length 1.
        second: (n, d), the other text of each pair.
        scores: n numbers; more is more alike.
    """
    count = len(first)
    cosine = (first.astype(np.float64) * second.astype(np.float64)).sum(axis=1)
    generator = np.random.default_rng(seed)
    draws = (
        np.bincount(generator.integers(count, size=count), minlength=count).astype(np.float64) for _ in range(resamples)
    )
    return with_interval(cosine, np.asarray(scores, dtype=np.float64), draws)
