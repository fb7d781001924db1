"""One trial, in whatever process it runs: prune or convert, look whether it is hopeless, recover, measure"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from secateur.errors import Interrupted, SecateurError
from secateur.progress import Recorder, Reporter
from secateur.recipe import Recipe
from secateur.study.command import made_folder
from secateur.study.flops import measure_flops
from secateur.study.quality import difference, measuring
from secateur.study.share import link_copy, made_once, make
from secateur.study.speed import Load, trial_speed
from secateur.study.stopping import Bar, exp, hopeless
from secateur.study.storing import HF, STORED, unstored_folder
from secateur.training import Training
from secateur.verbs.export import export
from secateur.verbs.recover import recover


@dataclass(frozen=True)
class Task:
    """What one trial is to do. Plain data: it travels as JSON to other processes and machines."""

    number: int
    model: str
    dense: str
    """Folder of the dense model."""
    recipe: Mapping[str, Any]
    training: Mapping[str, Any] | None
    out: str
    """Folder of the model that is made."""
    choice: str
    """File of the texts that trials are compared on."""
    format: str = HF
    """How the model is stored, one of `FORMATS`."""
    conversion: Mapping[str, Any] | None = None
    """``to`` and options of `convert`, which looks at a part of the recipe; None where the model is pruned."""
    shared: str = ""
    """Folder of the pruned or converted model, where another trial may want the same; empty where none does."""
    device: str = "auto"
    bar: Mapping[str, Any] | None = None
    load: Load | None = None
    """What speed is measured on; None where it is not asked for."""
    known: Mapping[str, float | None] = field(default_factory=dict)
    """Values of the dense model."""
    dense_right: str = ""
    """Which of the labelled texts the dense model has right."""
    first: int = 2
    """Windows, or labelled texts, that are looked at first."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        return cls(**json.loads(text))


@dataclass
class Outcome:
    """What became of a trial. Plain data."""

    state: Literal["complete", "stopped", "failed"]
    values: dict[str, float | None] = field(default_factory=dict)
    sparsity: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)
    proxy: float | None = None
    """Perplexity on the first windows, or the share of wrong texts in the first."""
    shared_seconds: float = 0.0
    """What was saved by taking a pruned or converted model that was there."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        return cls(**json.loads(text))


def run_trial(task: Task, reporter: Reporter | None = None) -> Outcome:
    """Make and measure one model. Whatever fails becomes part of the outcome; only Ctrl-C is raised.

    Raises:
        Interrupted, KeyboardInterrupt: when it was stopped; it can be run again.
    """
    started = time.monotonic()
    recorder = Recorder(reporter)
    outcome = Outcome("complete")
    try:
        _run(task, outcome, recorder)
    except Interrupted:
        raise
    except SecateurError as error:
        outcome.state, outcome.reason = "failed", error.message + (f"; {error.hint}" if error.hint else "")
    except Exception as error:  # noqa: BLE001 - one trial must not stop the others; the error is recorded
        outcome.state, outcome.reason = "failed", f"{type(error).__name__}: {error}"
    if outcome.state != "complete":
        remove_models(task)
    outcome.seconds = time.monotonic() - started
    outcome.values["seconds"] = outcome.seconds
    outcome.warnings = recorder.warnings
    return outcome


def remove_models(task: Task) -> None:
    """Remove what a trial has made of its own."""
    whole = unstored_folder(task.out, task.format)
    for name in dict.fromkeys((task.out, whole, f"{whole}-pruned", f"{whole}-converted")):
        for folder in (Path(name), Path(f"{name}.partial")):
            shutil.rmtree(folder, ignore_errors=True)


def make_model(task: Task, outcome: Outcome, recorder: Recorder) -> None:
    """Make the model of a trial again, as it was made before; nothing is measured."""
    made, _ = _make(task, outcome, recorder)
    _finish(task, made, outcome, recorder)


def _run(task: Task, outcome: Outcome, recorder: Recorder) -> None:
    made, of_use = _make(task, outcome, recorder)
    _count(task, made, outcome)
    bar = None if task.bar is None else Bar(**task.bar)
    opened = functools.partial(
        measuring, texts=Path(task.choice), first=task.first, device=task.device, reporter=recorder
    )
    # More text brings a language model back from far away. A classifier says little before it is recovered: what is
    # twice as bad as chance does not exist. And some conversions are of no use at all before they are trained.
    # What they are after it is no bar for those that are looked at before.
    late = task.training is None or not of_use or (bar is not None and bar.labels)
    folder = _finish(task, made, outcome, recorder) if late else made
    measured = opened(folder)
    if bar is not None:
        badness = measured.first()
        outcome.values[_proxy(task)] = _number(exp(badness))
        outcome.proxy = outcome.values[_proxy(task)] if of_use or task.training is None else None
        if reason := hopeless(bar, badness, outcome.values):
            outcome.state, outcome.reason = "stopped", reason
            return
    if not late:
        del measured  # the model makes room for its recovery
        folder = _finish(task, made, outcome, recorder)
        measured = opened(folder)
    found = measured.all()
    outcome.values |= found.values
    outcome.intervals |= found.intervals
    if task.dense_right:
        outcome.values["accuracy_difference"], span = difference(found.right, task.dense_right)
        outcome.intervals["accuracy_difference"] = span
    if bar is None:
        outcome.proxy = outcome.values[_proxy(task)] = _number(exp(found.first))
    del measured
    if task.load is not None:
        speed = trial_speed(task.load, Path(task.dense), folder, task.known, task.device, recorder)
        outcome.values |= speed.values
        outcome.intervals |= speed.intervals
        outcome.missing |= speed.missing


def _count(task: Task, folder: Path, outcome: Outcome) -> None:
    """Operations for a token, and parameters that take part in it. Most recoveries change none of them."""
    counted, outcome.missing = measure_flops(folder, {} if task.recipe["structure"] else outcome.sparsity)
    outcome.values |= counted


def _proxy(task: Task) -> str:
    return "proxy_error" if task.choice.endswith(".jsonl") else "proxy_perplexity"


def _make(task: Task, outcome: Outcome, recorder: Recorder) -> tuple[Path, bool]:
    """The pruned or converted model, shared or this trial's own; what was counted goes into the outcome.

    Returns:
        Its folder, and whether it is of any use before it is trained.
    """
    recipe = Recipe.from_dict(task.recipe)
    if task.shared:
        shared = made_once(Path(task.shared), task.model, recipe, task.conversion, recorder)
        folder, result = shared.folder, shared.result
        outcome.shared_seconds = shared.seconds if shared.reused else 0.0
    else:
        folder = Path(made_folder(unstored_folder(task.out, task.format), task.training, task.conversion))
        result = make(folder, task.model, recipe, task.conversion, recorder)
    after = result["after"]
    outcome.values |= {name: after[name] for name in ("parameters", "nonzero")}
    if task.format not in STORED:  # else they are those of another file, known once that is written
        outcome.values["bytes_disk"] = after["bytes_disk"]
    # A conversion puts other numbers where the weights were: what counts is how many of those are zero.
    outcome.values["sparsity"] = after["sparsity"] if task.conversion is not None else result["sparsity"]
    if task.conversion is None:
        outcome.sparsity = {matrix["name"]: matrix["sparsity"] for matrix in result["matrices"]}
    return folder, not result.get("needs_training", False)


def _finish(task: Task, made: Path, outcome: Outcome, recorder: Recorder) -> Path:
    """The model of the trial in its own folder, recovered and stored in few bits when that is asked for."""
    out = Path(unstored_folder(task.out, task.format))
    if task.training is not None:
        settings = Training.from_dict(task.training)
        dense = task.conversion is not None
        done = recover(made, out, settings=settings, dense=dense, evaluate=False, overwrite=True, reporter=recorder)
        if done.after.parameters != outcome.values["parameters"]:  # adapters came
            outcome.values |= {"parameters": done.after.parameters, "nonzero": done.after.nonzero}
            outcome.values |= {} if task.format in STORED else {"bytes_disk": done.after.bytes_disk}
            _count(task, out, outcome)
        if not task.shared:
            shutil.rmtree(made, ignore_errors=True)
    elif made != out:
        shutil.rmtree(out, ignore_errors=True)
        link_copy(made, out)
    if task.format in STORED:
        made_small = export(out, task.out, overwrite=True, reporter=recorder, **STORED[task.format])
        outcome.values["bytes_disk"] = made_small.bytes_disk
        shutil.rmtree(out, ignore_errors=True)
    return Path(task.out)


def _number(value: float) -> float | None:
    """None for what JSON cannot hold: the perplexity of a model that is destroyed."""
    return value if value < float("inf") else None
