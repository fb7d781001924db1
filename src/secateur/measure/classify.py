"""Quality of a text classifier: accuracy, macro F1 and calibration error, each with an interval, and the loss.

Intervals are 95 % percentile intervals of the bootstrap over examples: the share of the test set that luck decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from secateur.corpus.labelled import Labelled
from secateur.errors import CalibrationError, UnsupportedModelError
from secateur.measure.texts import padding_token, run_texts, tokenise
from secateur.progress import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESAMPLES = 1000
BINS = 15
Interval = tuple[float, float]

# Numbers that are resampled at once: 2^21 x 8 bytes = 17 MB for each array.
_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Classification:
    """How good a classifier is on one file; ``protocol`` says in words how it was measured.

    ``probabilities`` is (n, classes), ``predicted`` (n,), both in the order of the file.
    """

    accuracy: float
    accuracy_interval: Interval
    macro_f1: float
    macro_f1_interval: Interval
    calibration_error: float
    calibration_error_interval: Interval
    loss: float
    """Mean negative log-likelihood of the right class, in nats. Its difference between the data a model was trained on
    and data it has not seen is the generalisation gap."""
    count: int
    predicted: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    protocol: str

    @property
    def accuracy_stderr(self) -> float:
        """Binomial standard error."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.count)


def check_classifier(model: Any, name: str) -> None:
    """Refuse a model that does not choose one class for a text.

    Raises:
        UnsupportedModelError: with the reason; ``name`` is that of the file it was to be measured on.
    """
    kind = type(model).__name__
    hint = f"{name} has texts with labels: it needs a ...ForSequenceClassification model with two or more classes"
    if not any(cls.__name__.endswith("ForSequenceClassification") for cls in type(model).__mro__):
        raise UnsupportedModelError(f"{kind} is no text classifier", hint=hint)
    if model.config.problem_type not in (None, "single_label_classification") or model.config.num_labels < 2:
        problem = model.config.problem_type or "regression: it has one output"
        raise UnsupportedModelError(f"{kind} does not choose one class for a text ({problem})", hint=hint)


def classify(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: Labelled,
    *,
    max_length: int | None = None,
    batch: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> Classification:
    """Classify all texts and compare with their labels.

    Args:
        max_length: the most tokens of a text, where config and tokenizer do not say it; longer texts are cut.
        batch: texts that run together; None chooses by length and device.
        resamples: of the bootstrap.

    Raises:
        UnsupportedModelError: for a model that is no single-label text classifier.
        CalibrationError: for a text without tokens, or a label that the model does not have.
        RunError: when the model gives NaN.
    """
    reporter = reporter or Reporter()
    check_classifier(model, data.name)
    classes = int(model.config.num_labels)
    if max(data.labels) >= classes:
        line = data.lines[int(np.argmax(data.labels))]
        raise CalibrationError(f"{data.name}, line {line}: label {max(data.labels)}, the model has {classes} classes")
    tokens = tokenise(model, tokenizer, data.texts, limit=max_length, name=data.name)
    if tokens.cut:
        reporter.note(f"{data.name}: {tokens.told}")
    before = getattr(model.config.get_text_config(), "pad_token_id", None)
    with padding_token(model, tokenizer) as padding:
        logits = run_texts(
            model, tokens, padding, lambda output, _: output.logits, name=data.name, batch=batch, reporter=reporter
        )
    log_probabilities = logits.double().log_softmax(dim=-1).numpy()
    labels = np.asarray(data.labels, dtype=np.int64)
    probabilities = np.exp(log_probabilities)
    predicted = probabilities.argmax(axis=1).astype(np.int64)
    low, high = _intervals(labels, predicted, probabilities.max(axis=1), classes, resamples, seed)
    words = f"texts padded with token {padding}"
    if padding is None:
        words = "one text at a time: there is no token to pad with"
    elif padding != before:
        words += ", which the config did not name and which the model was told for the measurement"
    return Classification(
        accuracy=float((predicted == labels).mean()),
        accuracy_interval=(low[0], high[0]),
        macro_f1=macro_f1(labels, predicted),
        macro_f1_interval=(low[1], high[1]),
        calibration_error=calibration_error(probabilities, labels),
        calibration_error_interval=(low[2], high[2]),
        loss=float(-log_probabilities[np.arange(len(labels)), labels].mean()),
        count=len(labels),
        predicted=predicted,
        probabilities=probabilities,
        protocol=(
            f"{len(labels)} texts, {classes} classes; {tokens.told}; {words}; macro F1 over the classes that occur in "
            f"labels or predictions; calibration error over {BINS} equal bins of the top probability; 95 % percentile "
            f"intervals of {resamples} bootstrap resamples of the texts, seed {seed}"
        ),
    )


def macro_f1(labels: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    """Mean F1 of the classes that occur in ``labels`` or ``predicted``, both (n,) and counted from 0.

    F1 of a class is 2 TP / (2 TP + FP + FN): the harmonic mean of precision and recall. A class that occurs on neither
    side has no F1 and is left out of the mean, as in scikit-learn.
    """
    classes = int(max(labels.max(), predicted.max())) + 1
    counts = (np.bincount(rows, minlength=classes) for rows in (labels[labels == predicted], labels, predicted))
    return float(_mean_f1(*counts))


def _mean_f1(right: NDArray[Any], labelled: NDArray[Any], predicted: NDArray[Any]) -> NDArray[np.float64]:
    """From counts (..., classes) to macro F1 (...)."""
    total = labelled + predicted
    scores = np.divide(2.0 * right, total, out=np.zeros(total.shape), where=total > 0)
    mean: NDArray[np.float64] = scores.sum(axis=-1) / (total > 0).sum(axis=-1)
    return mean


def calibration_error(probabilities: NDArray[np.float64], labels: NDArray[np.int64], bins: int = BINS) -> float:
    """Expected calibration error: how far the top probability is from the share that is right, on average.

    Sum over bins B of |B| / n · |accuracy(B) - mean top probability(B)|, with bins ((m-1)/bins, m/bins] of the top
    probability (Guo et al., "On calibration of modern neural networks", ICML 2017, equation 3).

    Args:
        probabilities: (n, classes), rows that sum to 1.
        labels: (n,), counted from 0.
    """
    top = probabilities.max(axis=1)
    difference = (probabilities.argmax(axis=1) == labels) - top
    return float(np.abs(np.bincount(_bin_of(top, bins), difference, minlength=bins)).sum() / len(labels))


def _bin_of(top: NDArray[np.float64], bins: int) -> NDArray[np.int64]:
    """The bin of each probability; a bin holds its upper edge, and 0 is in the first."""
    edges = np.arange(bins + 1) / bins
    # A probability may be larger than 1 by rounding.
    return np.clip(np.searchsorted(edges, top, side="left") - 1, 0, bins - 1).astype(np.int64)


def _intervals(
    labels: NDArray[np.int64],
    predicted: NDArray[np.int64],
    top: NDArray[np.float64],
    classes: int,
    resamples: int,
    seed: int,
) -> tuple[list[float], list[float]]:
    """Lower and upper ends for accuracy, macro F1 and calibration error."""
    generator = np.random.default_rng(seed)
    count = len(labels)
    right = labels == predicted
    difference = right - top
    bin_of = _bin_of(top, BINS)
    parts = []
    for start in range(0, resamples, size := max(1, _AT_ONCE // max(count, classes))):
        rows = min(size, resamples - start)
        chosen = generator.integers(count, size=(rows, count))
        row = np.arange(rows)[:, None]

        def tally(
            cells: NDArray[np.int64], width: int, weights: NDArray[Any] | None = None, row: NDArray[Any] = row
        ) -> NDArray[Any]:
            """Counts (or sums of weights) of cells, for each resample: (rows, width)."""
            flat = None if weights is None else weights.ravel()
            return np.bincount((row * width + cells).ravel(), flat, row.size * width).reshape(row.size, width)

        f1 = _mean_f1(
            tally(labels[chosen], classes, right[chosen].astype(np.float64)),
            tally(labels[chosen], classes),
            tally(predicted[chosen], classes),
        )
        error = np.abs(tally(bin_of[chosen], BINS, difference[chosen])).sum(axis=1) / count
        parts.append(np.stack([right[chosen].mean(axis=1), f1, error], axis=1))
    low, high = np.percentile(np.concatenate(parts), [2.5, 97.5], axis=0)
    return low.tolist(), high.tolist()
