"""`secateur evaluate`: how good a model is, with the protocol that says how it was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from secateur.checkpoint.source import open_source
from secateur.corpus.load import load_text
from secateur.corpus.windows import windows
from secateur.errors import UsageError
from secateur.measure.choices import Questions, read_questions, score_questions
from secateur.measure.lm_eval import run_tasks
from secateur.measure.model import load_model
from secateur.measure.perplexity import perplexity
from secateur.progress import Reporter
from secateur.result import EvaluateResult
from secateur.verbs.calibration import load_tokenizer, window_length


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
    device: str = "auto",
    dtype: str = "auto",
    reporter: Reporter | None = None,
) -> EvaluateResult:
    """Perplexity of a text, and accuracy on files of questions and on public tasks.

    Args:
        model: a folder, hub id, ``.gguf`` file, ``demo``, or a model in memory (with its ``tokenizer``), which stays
            on its device and in its number format.
        data: text for perplexity, see `secateur.corpus.load.load_text`; None measures no perplexity.
        sequence_length: tokens in a window; None is 2048, or what the model can take.
        samples: exactly so many windows; None takes the whole text.
        max_samples: no more windows than that, fewer when the text has fewer.
        files: JSONL files of pairs (good, bad) or multiple choice (goal, sol1, sol2, label).
        tasks: tasks of lm-eval.

    Raises:
        UsageError: for arguments that make no sense, or data that is missing, too short or malformed.
        SourceError: when the model cannot be found or opened.
        UnsupportedModelError: when it has no next-token logits.
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
        raise UsageError("nothing to measure", hint="give data, files or tasks")
    questions = _read_all(files)
    text = None if data is None else load_text(data, "measure")  # before the model, which takes longer to open
    if isinstance(model, str | Path):
        name = str(model)
        source = open_source(model, reporter=reporter)
        tokenizer = tokenizer or load_tokenizer(source.folder)
        opened = load_model(source.folder, device=device, dtype=dtype)
    else:
        name = getattr(model.config, "name_or_path", "") or type(model).__name__
        opened = model
        if tokenizer is None:
            raise UsageError("a model in memory needs its tokenizer", hint="evaluate(model, tokenizer=...)")
        if (device, dtype) != ("auto", "auto"):
            raise UsageError(
                "a model in memory stays as it is", hint="move it with model.to(...), leave device and dtype"
            )
    result = EvaluateResult(name)
    result.protocol = {
        "class": type(opened).__name__,
        "dtype": str(opened.dtype).removeprefix("torch."),
        "device": str(opened.device),
    }
    if text is not None:
        length = window_length(sequence_length, opened)
        cut = windows(text.text, tokenizer, length, samples)[:max_samples]
        measured = perplexity(opened, cut, reporter=reporter)
        result.perplexity, result.perplexity_stderr = measured.perplexity, measured.perplexity_stderr
        result.nll_per_token, result.nll_stderr = measured.nll_per_token, measured.stderr
        result.tokens, result.tokens_per_second = measured.tokens, measured.tokens_per_second
        result.protocol["perplexity"] = (
            f"{text.origin}; tokenised whole, the first {len(cut)} windows of {length:,} tokens that do not overlap, "
            "no special tokens, mean over predicted tokens, fp32 log-softmax; standard error over windows"
        )
        if measured.perplexity is None:
            reporter.warn(f"the perplexity is too large for a number: {measured.nll_per_token:.1f} nats per token")
    for key, file in questions.items():
        scored = score_questions(opened, tokenizer, file, reporter=reporter)
        result.accuracy[key], result.accuracy_stderr[key] = scored.value, scored.stderr
        result.protocol[key] = scored.protocol
    if tasks:
        for score in run_tasks(opened, tokenizer, tasks, reporter=reporter):
            result.accuracy[score.task] = score.value
            if score.stderr is not None:
                result.accuracy_stderr[score.task] = score.stderr
            result.protocol[score.task] = score.protocol
    return result


def _read_all(files: Sequence[str | Path]) -> dict[str, Questions]:
    """All files of questions, before any work, under short names that differ."""
    found: dict[str, Questions] = {}
    for path in files:
        questions = read_questions(path)
        key = questions.name if questions.name not in found else str(path)
        if key in found:
            raise UsageError(f"{path} is given twice")
        found[key] = questions
    return found
