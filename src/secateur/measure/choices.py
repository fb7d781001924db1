"""Accuracy on minimal pairs and multiple choice: which of several texts does the model find more likely?

Pairs (``good``, ``bad``; BLiMP is of this kind): the sum of the log-probabilities of all tokens of the sentence, not
normalised; right when good > bad.

Multiple choice (``goal``, ``sol1``, ``sol2`` ..., ``label`` counted from 0; PIQA is of this kind): the log-probability
of the solution after ``Question: <goal>\\nAnswer:``, divided by its length in UTF-8 bytes; right when the labelled one
is the largest. Sums (not normalised) are counted too.

Pairs begin with the tokenizer's BOS token, or its EOS token when it has no BOS, so that the first word of a sentence
has a context and is scored as well; with a tokenizer that has neither, the first token is not scored. Multiple choice
has a context of its own and begins with BOS only where the tokenizer itself puts one. A tie
counts as the share of the tied that are right. Standard errors are binomial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from secateur.corpus.load import read_rows
from secateur.errors import CalibrationError
from secateur.measure.perplexity import batch_size
from secateur.measure.scoring import NextTokenScorer
from secateur.progress import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["pairs", "choices"]
_PROMPT = "Question: {goal}\nAnswer:"


@dataclass(frozen=True)
class Item:
    """One question: texts to compare after a common context, and which of them is right."""

    line: int
    context: str
    texts: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Questions:
    """The content of one file."""

    name: str
    kind: Kind
    items: list[Item]


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers; ``protocol`` says in words how they were scored."""

    value: float
    stderr: float
    count: int
    unnormalised: float
    """The same by plain sums of log-probabilities (equal to ``value`` for pairs)."""
    protocol: str


@dataclass(frozen=True)
class _Sequence:
    tokens: list[int]
    start: int
    """The first scored token."""


def read_questions(path: str | Path) -> Questions:
    """Read a JSONL file of pairs or of multiple choice; its columns say which.

    Raises:
        CalibrationError: when the file is missing or empty, or a line is not like the first; the line is named.
    """
    path = Path(path).expanduser()
    items: list[Item] = []
    kind: Kind | None = None
    for line, row in read_rows(path):
        if kind is None:
            kind = _kind(path, line, row)
        items.append(_pair(path, line, row) if kind == "pairs" else _choice(path, line, row))
    if kind is None:
        raise CalibrationError(f"{path} holds no questions", hint="one JSON object a line")
    return Questions(path.name, kind, items)


def score_questions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions,
    *,
    batch: int | None = None,
    reporter: Reporter | None = None,
) -> Accuracy:
    """Score all texts and count the right answers.

    Texts are sorted by length and run in padded batches, so that little of the forward pass is spent on padding.

    Args:
        batch: texts that run together; None chooses by length and device.

    Raises:
        UnsupportedModelError: for a model without next-token logits.
        CalibrationError: for a text without tokens, or longer than the model's window (its line is named).
    """
    reporter = reporter or Reporter()
    training = model.training
    model.eval()
    try:
        scorer = NextTokenScorer(model)
        sequences = _sequences(tokenizer, questions, scorer.max_length)
        padding = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
        sums = _log_likelihoods(scorer, sequences, padding, batch, reporter, questions.name)
    finally:
        model.train(training)
    plain, normalised = 0.0, 0.0
    position = 0
    for item in questions.items:
        scores = sums[position : position + len(item.texts)]
        position += len(item.texts)
        plain += _right(scores, item.label)
        lengths = [max(1, len(text.encode())) for text in item.texts]
        normalised += _right([score / length for score, length in zip(scores, lengths, strict=True)], item.label)
    count = len(questions.items)
    value = (plain if questions.kind == "pairs" else normalised) / count
    error = math.sqrt(value * (1 - value) / count)
    return Accuracy(value, error, count, plain / count, _protocol(tokenizer, questions))


def _right(scores: Sequence[float], label: int) -> float:
    """1 when the labelled score is the largest alone, a share of it when others are as large."""
    best = max(scores)
    return 1 / list(scores).count(best) if scores[label] == best else 0.0


def _protocol(tokenizer: PreTrainedTokenizerBase, questions: Questions) -> str:
    start = _start_token(tokenizer, questions.kind)
    first = "first token not scored" if start is None else f"first token scored after {_name(tokenizer, start)}"
    if questions.kind == "pairs":
        return f"{len(questions.items)} pairs, sum of log-probabilities of the whole sentence, {first}"
    return (
        f"{len(questions.items)} questions, log-probability of the solution per UTF-8 byte after "
        f"{_PROMPT.format(goal='<goal>')!r}, text begins with "
        f"{'no special token' if start is None else _name(tokenizer, start)}"
    )


def _name(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(token))


def _start_token(tokenizer: PreTrainedTokenizerBase, kind: Kind) -> int | None:
    """The token before everything, None for none."""
    bos: int | None = tokenizer.bos_token_id
    if kind == "pairs":
        return tokenizer.eos_token_id if bos is None else bos
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def _sequences(tokenizer: PreTrainedTokenizerBase, questions: Questions, limit: int | None) -> list[_Sequence]:
    """Tokens of every text of every question, in order."""
    start = _start_token(tokenizer, questions.kind)
    prefix = [] if start is None else [start]
    texts = [item.context + text for item in questions.items for text in item.texts]
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    whole = tokenizer(texts, **options)["input_ids"]
    contexts = tokenizer([item.context for item in questions.items], **options)["input_ids"]
    sequences: list[_Sequence] = []
    for item, context in zip(questions.items, contexts, strict=True):
        for _ in item.texts:
            tokens = whole[len(sequences)]
            # A tokenizer may join the end of the context with the text: what is no longer common belongs to the text.
            common = next((i for i, (a, b) in enumerate(zip(context, tokens, strict=False)) if a != b), len(context))
            first = max(len(prefix) + min(common, len(tokens)), 1)
            sequence = _Sequence(prefix + tokens, first)
            if first >= len(sequence.tokens):
                raise CalibrationError(f"{questions.name}, line {item.line}: a text has no token to score")
            if limit is not None and len(sequence.tokens) > limit:
                raise CalibrationError(
                    f"{questions.name}, line {item.line}: {len(sequence.tokens)} tokens, the model takes {limit}"
                )
            sequences.append(sequence)
    return sequences


def _log_likelihoods(
    scorer: NextTokenScorer,
    sequences: Sequence[_Sequence],
    padding: int,
    batch: int | None,
    reporter: Reporter,
    name: str,
) -> list[float]:
    """Summed log-probability of the scored tokens of each sequence, in the order given."""
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index].tokens))
    batches: list[list[int]] = []
    while order:
        size = batch or batch_size(scorer.device, len(sequences[order[0]].tokens))
        batches.append(order[:size])
        order = order[size:]
    reporter.stage(name, len(batches))
    sums = [0.0] * len(sequences)
    for indices in batches:
        length = len(sequences[indices[0]].tokens)
        tokens = torch.full((len(indices), length), padding)
        scored = torch.zeros(tokens.shape, dtype=torch.bool)
        mask = torch.zeros(tokens.shape, dtype=torch.int64)
        for row, index in enumerate(indices):
            sequence = sequences[index]
            end = len(sequence.tokens)
            tokens[row, :end] = torch.tensor(sequence.tokens)
            scored[row, sequence.start : end] = True
            mask[row, :end] = 1
        losses = scorer(tokens, scored, None if bool(mask.all()) else mask).double()
        parts = losses.split(scored.sum(dim=1).tolist())
        for index, part in zip(indices, parts, strict=True):
            sums[index] = -float(part.sum())
        reporter.advance()
    return sums


def _kind(path: Path, line: int, row: dict[str, Any]) -> Kind:
    if {"good", "bad"} <= row.keys():
        return "pairs"
    if {"goal", "sol1", "sol2", "label"} <= row.keys():
        return "choices"
    raise CalibrationError(
        f"{path}, line {line}: columns {', '.join(row) or '(none)'} are neither pairs nor multiple choice",
        hint="pairs have good and bad; multiple choice has goal, sol1, sol2 and label (evaluate also reads text and "
        "label, and text1, text2 and score)",
    )


def _text(path: Path, line: int, row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise CalibrationError(f"{path}, line {line}: no text in column '{column}'")
    return value


def _pair(path: Path, line: int, row: dict[str, Any]) -> Item:
    return Item(line, "", (_text(path, line, row, "good"), _text(path, line, row, "bad")), 0)


def _choice(path: Path, line: int, row: dict[str, Any]) -> Item:
    columns = ["sol1", "sol2"]
    while f"sol{len(columns) + 1}" in row:
        columns.append(f"sol{len(columns) + 1}")
    texts = tuple(" " + _text(path, line, row, column).strip() for column in columns)
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(texts):
        raise CalibrationError(
            f"{path}, line {line}: label is {label!r}", hint=f"it must be a whole number from 0 to {len(texts) - 1}"
        )
    return Item(line, _PROMPT.format(goal=_text(path, line, row, "goal").strip()), texts, label)
