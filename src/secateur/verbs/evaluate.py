"""`secateur evaluate`: how good a model is, with the protocol that says how it was measured."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from secateur.checkpoint.source import Source, open_source
from secateur.corpus.labelled import (
    LABELLED,
    SCORED_PAIRS,
    Labelled,
    ScoredPairs,
    first_columns,
    read_labelled,
    read_scored_pairs,
)
from secateur.corpus.load import Text, load_text
from secateur.corpus.windows import windows
from secateur.errors import CalibrationError, UsageError
from secateur.measure.choices import Questions, read_questions, score_questions
from secateur.measure.classify import check_classifier, classify
from secateur.measure.embeddings import (
    Embeddings,
    check_encoder,
    embed,
    pairs_correlation,
    read_pooling,
    similarity_correlation,
)
from secateur.measure.expert_usage import expert_usage
from secateur.measure.lm_eval import run_tasks
from secateur.measure.model import load_model
from secateur.measure.perplexity import perplexity
from secateur.measure.ranks import RESAMPLES, RankCorrelation
from secateur.progress import Reporter
from secateur.result import EvaluateResult
from secateur.verbs.calibration import load_tokenizer, maximum_length, window_length

PARAGRAPHS = 256
"""Texts on which two embedding models are compared: 32,640 pairs."""
_WORDS = 5  # shorter paragraphs are headings and rules


def evaluate(
    model: str | Path | transformers.PreTrainedModel,
    *,
    tokenizer: Any = None,
    data: str | Path | None = "builtin",
    sequence_length: int | None = None,
    samples: int | None = None,
    max_samples: int | None = None,
    files: Sequence[str | Path] = (),
    tasks: Sequence[str] = (),
    against: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    reporter: Reporter | None = None,
) -> EvaluateResult:
    """Perplexity of a text, accuracy on files of questions or labels and on public tasks, and embedding similarity.

    Args:
        model: a folder, hub id, ``.gguf`` file, ``demo``, ``demo-encoder``, or a model in memory (with its
            ``tokenizer``), which stays on its device and in its number format.
        data: text for perplexity and for ``against``, see `secateur.corpus.load.load_text`; None measures neither. The
            built-in text is no reason to refuse a model without a language-model head: it is passed over when there
            is something else to measure.
        sequence_length: tokens in a window; None is 2048, or what the model can take.
        samples: exactly so many windows; None takes the whole text.
        max_samples: no more windows than that, fewer when the text has fewer.
        files: JSONL files of pairs (good, bad), multiple choice (goal, sol1, sol2, label), labelled texts (text, label;
            for a sequence classifier) or scored pairs (text1, text2, score; for an embedding model).
        tasks: tasks of lm-eval.
        against: another embedding model, usually the dense one: on up to `PARAGRAPHS` paragraphs of ``data``, the rank
            correlation of the cosine similarities that the two models give to all pairs. Perplexity is not measured.

    Raises:
        UsageError: for arguments that make no sense, or data that is missing, too short or malformed.
        SourceError: when the model cannot be found or opened.
        UnsupportedModelError: when it has no next-token logits, or is of the wrong kind for a file or ``against``.
    """
    reporter = reporter or Reporter()
    for name, value, least in (
        ("sequence_length", sequence_length, 2),
        ("samples", samples, 1),
        ("max_samples", max_samples, 1),
    ):
        if value is not None and value < least:
            raise UsageError(f"{name} is {value}", hint=f"it must be at least {least}")
    if data is None and not files and not tasks:
        hint = "give data, files or tasks" if against is None else "against needs data: the texts to compare on"
        raise UsageError("nothing to measure", hint=hint)
    if data is None and against is not None:
        raise UsageError("against needs texts to compare on, and data is None", hint="give data, or leave against out")
    contents = read_files(files)
    text = None if data is None else load_text(data, "measure")  # before the model, which takes longer to open
    paragraphs = _paragraphs(text) if text is not None and against is not None else []
    dense = None if against is None else open_source(against, reporter=reporter, packed=True, torchao=True)
    folder = None
    if isinstance(model, str | Path):
        name = str(model)
        folder = open_source(model, reporter=reporter, packed=True, torchao=True).folder
        tokenizer = tokenizer or load_tokenizer(folder)
        opened = load_model(folder, device=device, dtype=dtype)
    else:
        name = getattr(model.config, "name_or_path", "") or type(model).__name__
        opened = model
        if tokenizer is None:
            raise UsageError("a model in memory needs its tokenizer", hint="evaluate(model, tokenizer=...)")
        if (device, dtype) != ("auto", "auto"):
            raise UsageError(
                "a model in memory stays as it is", hint="move it with model.to(...), leave device and dtype"
            )
    ours = _Opened(opened, tokenizer, folder, reporter)
    contents = _suited(contents, opened)
    if dense is not None:
        check_encoder(opened, "against")
    elif text is not None and data == "builtin" and (files or tasks) and not has_language_head(opened):
        reporter.note(f"perplexity is not measured: {type(opened).__name__} has no language-model head")
        text = None
    result = EvaluateResult(name)
    result.protocol = {
        "class": type(opened).__name__,
        "dtype": str(opened.dtype).removeprefix("torch."),
        "device": str(opened.device),
    }
    if dense is not None and text is not None:
        compared = _Opened.of(dense, device, dtype, reporter)
        _against(result, ours, compared, str(against), paragraphs, text.origin)
    elif text is not None:
        length = window_length(sequence_length, opened)
        cut = windows(text.text, tokenizer, length, samples)[:max_samples]
        _perplexity(result, ours, cut, text.origin)
    for key, (_, content) in contents.items():
        _file(result, ours, key, content)
    if tasks:
        for score in run_tasks(opened, tokenizer, tasks, reporter=reporter):
            result.accuracy[score.task] = score.value
            if score.stderr is not None:
                result.accuracy_stderr[score.task] = score.stderr
            result.protocol[score.task] = score.protocol
    return result


def has_language_head(model: transformers.PreTrainedModel) -> bool:
    """Whether a model has an output matrix over the vocabulary, so that perplexity can be asked of it."""
    return bool(model.main_input_name == "input_ids" and model.get_output_embeddings() is not None)


@dataclass
class _Opened:
    """A model ready to be measured; ``folder`` is None for a model in memory."""

    model: transformers.PreTrainedModel
    tokenizer: Any
    folder: Path | None
    reporter: Reporter

    @classmethod
    def of(cls, source: Source, device: str, dtype: str, reporter: Reporter) -> _Opened:
        """Open a model that was found."""
        opened = load_model(source.folder, device=device, dtype=dtype)
        return cls(opened, load_tokenizer(source.folder), source.folder, reporter)

    def embed(self, texts: Sequence[str], name: str) -> Embeddings:
        return embed(
            self.model, self.tokenizer, texts, folder=self.folder, max_length=maximum_length(self.model), name=name,
            reporter=self.reporter,
        )  # fmt: skip


_Content = Questions | Labelled | ScoredPairs


def _perplexity(result: EvaluateResult, ours: _Opened, cut: Any, origin: str) -> None:
    measured = perplexity(ours.model, cut, reporter=ours.reporter)
    result.perplexity, result.perplexity_stderr = measured.perplexity, measured.perplexity_stderr
    result.nll_per_token, result.nll_stderr = measured.nll_per_token, measured.stderr
    result.tokens, result.tokens_per_second = measured.tokens, measured.tokens_per_second
    result.protocol["perplexity"] = perplexity_protocol(origin, cut)
    result.expert_usage = expert_usage(ours.model, cut)
    if measured.perplexity is None:
        ours.reporter.warn(f"the perplexity is too large for a number: {measured.nll_per_token:.1f} nats per token")


def perplexity_protocol(origin: str, cut: Any) -> str:
    """How perplexity was measured, in words.

    Args:
        origin: what the text is.
        cut: its windows, (count, length).
    """
    return (
        f"{origin}; tokenised whole, the first {len(cut)} windows of {cut.shape[1]:,} tokens that do not overlap, "
        "no special tokens, mean over predicted tokens, fp32 log-softmax; standard error over windows"
    )


def _file(result: EvaluateResult, ours: _Opened, key: str, content: _Content) -> None:
    """Measure what one file asks for, and enter it under its key."""
    if isinstance(content, Questions):
        scored = score_questions(ours.model, ours.tokenizer, content, reporter=ours.reporter)
        result.accuracy[key], result.accuracy_stderr[key] = scored.value, scored.stderr
        result.protocol[key] = scored.protocol
    elif isinstance(content, Labelled):
        found = classify(
            ours.model, ours.tokenizer, content, max_length=maximum_length(ours.model), reporter=ours.reporter
        )
        result.accuracy[key], result.accuracy_stderr[key] = found.accuracy, found.accuracy_stderr
        result.accuracy_interval[key] = list(found.accuracy_interval)
        result.macro_f1[key], result.macro_f1_interval[key] = found.macro_f1, list(found.macro_f1_interval)
        result.calibration_error[key] = found.calibration_error
        result.calibration_error_interval[key] = list(found.calibration_error_interval)
        result.loss[key] = found.loss
        result.protocol[key] = found.protocol
    else:
        vectors = ours.embed(content.first + content.second, content.name)
        count = len(content.first)
        found_correlation = pairs_correlation(vectors[:count], vectors[count:], content.scores)
        _correlated(result, ours, key, found_correlation)
        result.protocol[key] = (
            f"{count} pairs, Spearman correlation of cosine similarity and score; {read_pooling(ours.folder).told}; "
            f"95 % percentile interval of {RESAMPLES} bootstrap resamples of the pairs"
        )


def _against(
    result: EvaluateResult, ours: _Opened, dense: _Opened, key: str, texts: Sequence[str], origin: str
) -> None:
    """Compare the similarities of two embedding models on the same texts."""
    check_encoder(dense.model, f"against {key}")
    found = similarity_correlation(ours.embed(texts, "embeddings"), dense.embed(texts, f"embeddings of {key}"))
    _correlated(result, ours, key, found)
    result.protocol[key] = (
        f"{origin}; {len(texts)} paragraphs of at least {_WORDS} words, evenly spread over the text; Spearman "
        f"correlation of the cosine similarities of all pairs with those of {key}; {read_pooling(ours.folder).told}; "
        f"95 % percentile interval of {RESAMPLES} bootstrap resamples of the texts"
    )


def _correlated(result: EvaluateResult, ours: _Opened, key: str, found: RankCorrelation) -> None:
    if found.value is None:
        ours.reporter.warn(f"{key}: all similarities are equal, there is no rank correlation")
    else:
        result.rank_correlation[key] = found.value
    if found.interval is not None:
        result.rank_correlation_interval[key] = list(found.interval)


def _paragraphs(text: Text) -> list[str]:
    """Up to `PARAGRAPHS` different paragraphs, evenly spread, so that all of the text has a say."""
    parts = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text.text))
    found = list(dict.fromkeys(part for part in parts if len(part.split()) >= _WORDS))
    if len(found) < 3:
        raise CalibrationError(
            f"{text.origin} has {len(found)} different paragraphs of at least {_WORDS} words, 3 are needed",
            hint="give a longer text, its paragraphs divided by blank lines",
        )
    count = min(len(found), PARAGRAPHS)
    return [found[index * len(found) // count] for index in range(count)]


def read_files(files: Sequence[str | Path]) -> dict[str, tuple[str | Path, _Content]]:
    """All files, before any work, under short names that differ."""
    found: dict[str, tuple[str | Path, _Content]] = {}
    for path in files:
        content = _read(path)
        key = content.name if content.name not in found else str(path)
        if key in found:
            raise UsageError(f"{path} is given twice")
        found[key] = path, content
    return found


def _read(path: str | Path) -> _Content:
    """A file of the kind that the columns of its first row say."""
    columns = first_columns(path)
    if columns >= SCORED_PAIRS:
        return read_scored_pairs(path)
    if columns >= LABELLED:
        return read_labelled(path)
    return read_questions(path)


def _suited(
    contents: Mapping[str, tuple[str | Path, _Content]], model: transformers.PreTrainedModel
) -> dict[str, tuple[str | Path, _Content]]:
    """The same contents, labels read again with the names of the model's classes; refuses a model of another kind."""
    found = {}
    for key, (path, content) in contents.items():
        if isinstance(content, Labelled):
            check_classifier(model, content.name)
            content = read_labelled(path, labels=model.config.id2label)
        elif isinstance(content, ScoredPairs):
            check_encoder(model, content.name)
        found[key] = path, content
    return found
