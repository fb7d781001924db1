"""Speed, memory and energy of a trial, taken in turn with the dense model's: decoding of text, or sentences read"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.engine.device import resolve_device
from secateur.errors import SecateurError
from secateur.measure.compare import Worker, interval_of_ratios, measure_pair, metered
from secateur.measure.energy import find_meter
from secateur.measure.sentences import ROUNDS, Reading, measure_sentences
from secateur.progress import Reporter
from secateur.study.values import ENERGY

NEW_TOKENS = 32
SENTENCES = 32
"""Texts that are read in every round."""
BATCHES = {"sentences_per_second": 1, "sentences_per_second_batch_32": 32}
DECODE, MEMORY = "decode_tokens_per_second", "bytes_resident"
TEXT_ENERGY, LABEL_ENERGY = ENERGY["language"], ENERGY["labels"]

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
        names = [DECODE, MEMORY, TEXT_ENERGY] if "prompt" in load else [*BATCHES, LABEL_ENERGY]
        return Speed(dict.fromkeys(names), {}, dict.fromkeys(names, error.message))
    found.seconds = time.monotonic() - started
    return found


def _alone(load: Load, folder: Path, device: str, reporter: Reporter) -> Speed:
    if "prompt" in load:
        meter, why = find_meter(device)
        with Worker(folder, device=device) as worker:
            request = {"prompt_tokens": list(load["prompt"]), "new_tokens": NEW_TOKENS}
            worker.ask("decode", **request)
            memory = worker.ask("resident")
            answers, joules = zip(*(metered(worker, request, meter) for _ in range(ROUNDS)), strict=True)
        found = Speed({DECODE: statistics.median(answer["tokens"] / answer["seconds"] for answer in answers)})
        found.values[MEMORY] = memory["bytes_resident"] - memory["bytes_resident_before"]
        _energy(found, TEXT_ENERGY, [one for one in joules if one is not None], why)
        return found
    (own,), why = _read(load, [folder], device, reporter)
    found = Speed({name: statistics.median(own[batch].per_second) for name, batch in BATCHES.items()})
    _energy(found, LABEL_ENERGY, own[max(own)].joules_per_thousand, why)
    return found


def _in_turn(
    load: Load, dense: Path, folder: Path, known: Mapping[str, float | None], device: str, reporter: Reporter
) -> Speed:
    found = Speed()
    if "prompt" in load:
        meter, why = find_meter(device)
        pair = measure_pair(
            dense, folder, prompt_tokens=load["prompt"], new_tokens=NEW_TOKENS, device=device, meter=meter,
            reporter=reporter,
        )  # fmt: skip
        assert pair.decode_ratio is not None
        base = known.get(DECODE) or pair.before.decode_tokens_per_second or 0.0
        found.values |= {DECODE: base * pair.decode_ratio.median, "decode_ratio": pair.decode_ratio.median}
        found.intervals[DECODE] = [base * pair.decode_ratio.low, base * pair.decode_ratio.high]
        found.values[MEMORY] = pair.after.bytes_resident
        _energy(found, TEXT_ENERGY, pair.after.joules_per_token, why)
        return found
    (before, after), why = _read(load, [dense, folder], device, reporter)
    for name, batch in BATCHES.items():
        ratio = interval_of_ratios(before[batch].per_second, after[batch].per_second)
        base = known.get(name) or statistics.median(before[batch].per_second)
        found.values[name] = base * ratio.median
        found.intervals[name] = [base * ratio.low, base * ratio.high]
    _energy(found, LABEL_ENERGY, after[max(after)].joules_per_thousand, why)
    return found


def _read(load: Load, folders: list[Path], device: str, reporter: Reporter) -> tuple[list[dict[int, Reading]], str]:
    """What each folder did, and why there is no energy."""
    meter, why = find_meter(device)
    found = measure_sentences(
        folders, load["sentences"], padding=load["padding"], batches=list(BATCHES.values()), device=device,
        meter=meter, reporter=reporter,
    )  # fmt: skip
    return found, why


def _energy(found: Speed, name: str, joules: Sequence[float], why: str) -> None:
    """Energy of all rounds, or the reason why it is not known."""
    found.values[name] = statistics.median(joules) if joules else None
    if not joules:
        found.missing[name] = why
