"""Any number of models measured in turn, each in a process of its own: A B C A B C; all see the same machine."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import psutil

from secateur.errors import RunError
from secateur.measure.compare import Worker
from secateur.measure.energy import Meter
from secateur.progress import Reporter

BATCH = 8


@dataclass(frozen=True)
class Contender:
    """A model as one runtime opens it."""

    title: str
    open: Callable[[], Worker]
    runtime: Literal["transformers", "llama.cpp"]
    bytes_needed: int
    """Of memory, once it is loaded."""
    decodes: bool = True


@dataclass(frozen=True)
class Load:
    """What every model is asked to do in every round."""

    tokens: Sequence[int]
    """The prompt, or the text of a model that does not decode."""
    new_tokens: int
    batch: int = BATCH


@dataclass
class Measurement:
    """What was found of one contender."""

    bytes_resident: int | None = None
    """What the loaded model adds to the memory of its process, after it has run."""
    rounds: dict[str, list[float]] = field(default_factory=dict)
    """Quantity, as `secateur.bench_result.Quantities` calls it -> its value in every round."""
    missing: dict[str, str] = field(default_factory=dict)
    """Quantity -> why it was not measured."""

    def median(self, quantity: str) -> float | None:
        """Over the rounds; None when it was not measured."""
        values = self.rounds.get(quantity)
        return statistics.median(values) if values else None


def measure_in_turn(
    contenders: Sequence[Contender], load: Load, *, rounds: int, meter: Meter | None = None,
    reporter: Reporter | None = None,
) -> list[Measurement]:  # fmt: skip
    """Memory and speed of all contenders, in their order.

    Every round runs each of them once, one straight after the other; a run that warms up is not counted. When memory
    is too small for all at once, each is loaded anew for its turn. A contender that fails is told and left out of
    the rounds; what was not measured has its reason.
    """
    reporter = reporter or Reporter()
    found = [Measurement() for _ in contenders]
    alive = list(range(len(contenders)))
    together = 1.2 * sum(one.bytes_needed for one in contenders) + 2e9 < psutil.virtual_memory().available
    reporter.stage("measuring memory and speed", len(contenders) + rounds)
    with contextlib.ExitStack() as stack:
        workers: dict[int, Worker] = {}
        for index, one in enumerate(contenders):
            with contextlib.ExitStack() as own:
                try:
                    worker = own.enter_context(one.open())
                    _once(one, worker, load, None)
                    memory = worker.ask("resident")
                    found[index].bytes_resident = memory["bytes_resident"] - memory["bytes_resident_before"]
                except RunError as error:
                    _failed(found[index], one, error, reporter)
                    alive.remove(index)
                else:
                    if together:
                        workers[index] = worker
                        stack.push(own.pop_all())
            reporter.advance(one.title)
        for _ in range(rounds):
            for index in list(alive):
                one = contenders[index]
                try:
                    if together:
                        values = _once(one, workers[index], load, meter)
                    else:
                        with one.open() as worker:
                            _once(one, worker, load, None)
                            values = _once(one, worker, load, meter)
                except RunError as error:
                    _failed(found[index], one, error, reporter)
                    alive.remove(index)
                    continue
                for quantity, value in values.items():
                    found[index].rounds.setdefault(quantity, []).append(value)
            reporter.advance()
    for one, measured in zip(contenders, found, strict=True):
        measured.missing |= _reasons(one, measured)
        if one.runtime == "llama.cpp" and meter is not None and not meter.sees_processor:
            measured.missing["joules_per_token"] = "it runs on the processor, which has no meter that can be read"
    return found


def _failed(measured: Measurement, one: Contender, error: RunError, reporter: Reporter) -> None:
    """Nothing of it is kept: its rounds would have no partners."""
    reporter.warn(f"speed of {one.title} was not measured: {error.message}")
    measured.rounds.clear()
    measured.missing["speed"] = error.message


def _once(one: Contender, worker: Worker, load: Load, meter: Meter | None) -> dict[str, float]:
    """One round of one contender."""
    values: dict[str, float] = {}
    if one.runtime == "llama.cpp" and meter is not None and not meter.sees_processor:
        meter = None  # it runs on the processor
    if meter is not None:
        meter.start()
    if one.runtime == "llama.cpp":
        answer = worker.ask("speed", tokens=list(load.tokens), new_tokens=load.new_tokens, runs=1)
        values["prefill_tokens_per_second"] = answer["prefill_tokens_per_second"]
        values["decode_tokens_per_second"] = answer["decode_tokens_per_second"]
        values["seconds_to_first_token"] = len(load.tokens) / answer["prefill_tokens_per_second"]
        counted = len(load.tokens) + load.new_tokens
    elif one.decodes:
        answer = worker.ask("decode", prompt_tokens=list(load.tokens), new_tokens=load.new_tokens)
        values["seconds_to_first_token"] = answer["prefill_seconds"]
        values["prefill_tokens_per_second"] = len(load.tokens) / answer["prefill_seconds"]
        values["decode_tokens_per_second"] = answer["tokens"] / answer["seconds"]
        counted = len(load.tokens) + load.new_tokens
    else:
        answer = worker.ask("encode", tokens=list(load.tokens))
        values["prefill_tokens_per_second"] = answer["tokens"] / answer["seconds"]
        counted = len(load.tokens)
    if meter is not None:
        values["joules_per_token"] = meter.joules() / counted
    if one.runtime == "transformers" and one.decodes:
        few = list(load.tokens)[: max(1, len(load.tokens) // load.batch)]
        answer = worker.ask("decode", prompt_tokens=few, new_tokens=max(2, load.new_tokens // 2), rows=load.batch)
        values["decode_tokens_per_second_batch_8"] = answer["tokens"] / answer["seconds"]
    return values


def _reasons(one: Contender, measured: Measurement) -> dict[str, Any]:
    """Why what is missing is missing."""
    if not measured.rounds:
        return {}
    reasons = {}
    if one.runtime == "llama.cpp":
        reasons["decode_tokens_per_second_batch_8"] = "one row at a time in this binding of llama.cpp"
    elif not one.decodes:
        for name in ("decode_tokens_per_second", "decode_tokens_per_second_batch_8", "seconds_to_first_token"):
            reasons[name] = "it does not decode token by token"
    return reasons
