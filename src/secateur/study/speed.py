"""Speed of a trial, taken in turn with the dense model's: decoding of text, or sentences read, with intervals"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.engine.device import resolve_device
from secateur.errors import SecateurError
from secateur.measure.compare import Worker, interval_of_ratios, measure_pair
from secateur.measure.energy import find_meter
from secateur.measure.sentences import ROUNDS, Reading, measure_sentences
from secateur.progress import Reporter

NEW_TOKENS = 32
SENTENCES = 32
"""Texts that are read in every round."""
BATCHES = {"sentences_per_second": 1, "sentences_per_second_batch_32": 32}
DECODE = "decode_tokens_per_second"
ENERGY = "joules_per_thousand_sentences"

Load = Mapping[str, Any]
"""What a model is given: ``prompt``, token ids that it continues; or ``sentences``, token ids of each, and the token
``padding``."""


@dataclass
class Speed:
    """What was found."""

    values: dict[str, float | None] = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    """What finding it took."""


def dense_speed(load: Load, folder: Path, device: str, reporter: Reporter) -> Speed:
    """Speed of a model alone: the median of some rounds after one that warms up."""
    return _told(load, lambda: _alone(load, folder, str(resolve_device(device)), reporter))


def trial_speed(
    load: Load, dense: Path, folder: Path, known: Mapping[str, float | None], device: str, reporter: Reporter
) -> Speed:
    """Speed in turn with the dense model, told as the ratio times what the dense model had when it was alone.

    Args:
        known: values of the dense model.
    """
    return _told(load, lambda: _in_turn(load, dense, folder, known, str(resolve_device(device)), reporter))


def _told(load: Load, measure: Any) -> Speed:
    """What was measured, or the reason for each value that could not be."""
    started = time.monotonic()
    try:
        found: Speed = measure()
    except SecateurError as error:
        names = [DECODE] if "prompt" in load else [*BATCHES, ENERGY]
        return Speed(dict.fromkeys(names), {}, dict.fromkeys(names, error.message))
    found.seconds = time.monotonic() - started
    return found


def _alone(load: Load, folder: Path, device: str, reporter: Reporter) -> Speed:
    if "prompt" in load:
        with Worker(folder, device=device) as worker:
            request = {"prompt_tokens": list(load["prompt"]), "new_tokens": NEW_TOKENS}
            worker.ask("decode", **request)
            answers = [worker.ask("decode", **request) for _ in range(ROUNDS)]
        return Speed({DECODE: statistics.median(answer["tokens"] / answer["seconds"] for answer in answers)})
    (own,), why = _read(load, [folder], device, reporter)
    found = Speed({name: statistics.median(own[batch].per_second) for name, batch in BATCHES.items()})
    _energy(found, own, why)
    return found


def _in_turn(
    load: Load, dense: Path, folder: Path, known: Mapping[str, float | None], device: str, reporter: Reporter
) -> Speed:
    found = Speed()
    if "prompt" in load:
        pair = measure_pair(
            dense, folder, prompt_tokens=load["prompt"], new_tokens=NEW_TOKENS, device=device, reporter=reporter
        )
        assert pair.decode_ratio is not None
        base = known.get(DECODE) or pair.before.decode_tokens_per_second or 0.0
        found.values |= {DECODE: base * pair.decode_ratio.median, "decode_ratio": pair.decode_ratio.median}
        found.intervals[DECODE] = [base * pair.decode_ratio.low, base * pair.decode_ratio.high]
        return found
    (before, after), why = _read(load, [dense, folder], device, reporter)
    for name, batch in BATCHES.items():
        ratio = interval_of_ratios(before[batch].per_second, after[batch].per_second)
        base = known.get(name) or statistics.median(before[batch].per_second)
        found.values[name] = base * ratio.median
        found.intervals[name] = [base * ratio.low, base * ratio.high]
    _energy(found, after, why)
    return found


def _read(load: Load, folders: list[Path], device: str, reporter: Reporter) -> tuple[list[dict[int, Reading]], str]:
    """What each folder did, and why there is no energy."""
    meter, why = find_meter(device)
    found = measure_sentences(
        folders, load["sentences"], padding=load["padding"], batches=list(BATCHES.values()), device=device,
        meter=meter, reporter=reporter,
    )  # fmt: skip
    return found, why


def _energy(found: Speed, own: Mapping[int, Reading], why: str) -> None:
    """Energy where many sentences are read at once, or the reason why it is not known."""
    joules = own[max(own)].joules_per_thousand
    found.values[ENERGY] = statistics.median(joules) if joules else None
    if not joules:
        found.missing[ENERGY] = why
