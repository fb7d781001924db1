"""The models that trials are compared with: the dense one, and the dense one in other number formats"""

from __future__ import annotations

import shlex
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from secateur.checkpoint.folder import OutputFolder
from secateur.errors import SecateurError, UnsupportedModelError
from secateur.measure.energy import find_meter
from secateur.measure.llama_cpp import INSTALL, PACKAGE, LlamaCpp, is_installed
from secateur.measure.size import measure_size
from secateur.progress import Reporter
from secateur.recipe import Recipe
from secateur.study.command import command_line
from secateur.study.flops import measure_flops
from secateur.study.quality import Quality, Windows, dense_quality, quality
from secateur.study.setup import Setup
from secateur.study.speed import DECODE, MEMORY, NEW_TOKENS, TEXT_ENERGY, Speed, dense_speed, trial_speed
from secateur.study.store import Store
from secateur.study.storing import STORED, export_command
from secateur.study.values import meets, violations
from secateur.study_result import Trial
from secateur.verbs.bench_entries import QUANTISED, quantised
from secateur.verbs.export import export
from secateur.verbs.prune import prune

ROUNDS = 6


@dataclass(frozen=True)
class Dense:
    """What trials need to know of the dense model."""

    values: dict[str, float | None]
    first: float
    """Badness on the first part of the texts; see `secateur.study.quality.Quality`."""
    seconds: float
    """What measuring its quality took, when it was measured."""
    timing_seconds: float
    """What measuring speed in turn with another model takes, where finalists are timed; about."""
    right: str
    """Which labelled texts it has right."""


def measure_baselines(setup: Setup, store: Store, first: int, reporter: Reporter) -> Dense:
    """Measure those that the storage does not have yet; the dense model comes first."""
    spec = setup.spec
    kept = [Trial(**one) for one in store.get("baselines", [])]
    known = {trial.name for trial in kept}
    if "dense" not in known:
        started = time.monotonic()
        reporter.stage("dense model", 1)
        found = dense_quality(
            setup.source.folder, setup.sha256, setup.exam("choice"), first=first, device=setup.device,
            reporter=reporter,
        )  # fmt: skip
        speed = Speed() if setup.finalist_load is None else dense_speed(
            setup.finalist_load, setup.source.folder, setup.device, reporter
        )  # fmt: skip
        trial = _trial(-1, "dense", setup.made_by or spec.model, found, setup.source.folder, setup, speed)
        trial.meets = meets(violations(spec.constraints, trial.values, trial.values))
        _keep(store, trial, kept, started)
        spent = store.get("spent", {})
        store.put("spent", {**spent, "dense_quality_seconds": found.seconds, "dense_speed_seconds": speed.seconds})
        store.put("dense_first", found.first)
        store.put("dense_right", found.right)
    for number, name in enumerate(spec.baselines, start=2):
        if name in known:
            continue
        started = time.monotonic()
        reporter.stage(f"baseline {name}", 1)
        # Nothing goes, only the number format changes.
        if name in QUANTISED:
            made = _quantised(-number, name, setup, first, reporter)
        else:
            made = _stored(-number, name, setup, first, kept[0], reporter)
        if made is not None:
            made.meets = _meets(made, kept, setup)
            _keep(store, made, kept, started)
    dense_trial = next(one for one in kept if one.name == "dense")
    return Dense(
        dense_trial.values, float(store.get("dense_first")),
        float(store.get("spent", {}).get("dense_quality_seconds", 0.0)),
        2 * float(store.get("spent", {}).get("dense_speed_seconds", 0.0)), store.get("dense_right", ""),
    )  # fmt: skip


def _meets(trial: Trial, kept: Sequence[Trial], setup: Setup) -> bool | None:
    dense = next(one for one in kept if one.name == "dense").values
    return meets(violations(setup.spec.constraints, trial.values, dense))


def _stored(number: int, name: str, setup: Setup, first: int, dense: Trial, reporter: Reporter) -> Trial:
    """The dense model in a folder of another number format."""
    spec = setup.spec
    folder = spec.out / f"baseline-{name}"
    OutputFolder(folder, overwrite=True)
    if name in STORED:
        command = export_command(setup.model, folder.name, name)
        export(setup.model, folder, overwrite=True, reporter=reporter, **STORED[name])
    else:
        recipe = Recipe.from_dict({"method": "magnitude", "sparsity": 0.0, "dtype": name})
        command = command_line(setup.model, recipe, None, folder.name, reads_text=False)
        prune(setup.model, folder, recipe=recipe, evaluate=False, overwrite=True, reporter=reporter)
    measured = quality(folder, setup.exam("choice"), first=first, device=setup.device, reporter=reporter)
    speed = Speed() if setup.finalist_load is None else trial_speed(
        setup.finalist_load, setup.source.folder, folder, dense.values, setup.device, reporter
    )  # fmt: skip
    trial = _trial(number, name, command, measured, folder, setup, speed)
    if name in STORED:  # rounded numbers and their scales are no parameters; counted are those that they stand for
        names = ("parameters", "nonzero", "sparsity", "flops_per_token", "sparse_flops_per_token")
        trial.values |= {one: dense.values.get(one) for one in names}
        trial.missing |= {one: why for one, why in dense.missing.items() if one in names}
    if spec.keep != "all":
        shutil.rmtree(folder, ignore_errors=True)
    return trial


def _quantised(number: int, name: str, setup: Setup, first: int, reporter: Reporter) -> Trial | None:
    """The dense model as a file of llama.cpp, with the perplexity of the numbers it holds; None when there is none."""
    spec = setup.spec
    with tempfile.TemporaryDirectory(prefix="secateur-") as scratch:
        entry, why = quantised(spec.model, setup.source, name, Path(scratch), reporter)
        if entry is None or entry.file is None:
            reporter.warn(f"baseline {name} is left out: {why}")
            return None
        model = entry.float32_model(setup.device)
        found = Windows(model, setup.cut["choice"], first, reporter).all()
        del model
        values: dict[str, float | None] = {
            **found.values,
            "bytes_disk": entry.file.stat().st_size,
            **measure_flops(setup.source.folder, {})[0],
        }
        missing: dict[str, str] = {}
        if setup.finalist_load is not None:
            try:
                values |= _run_in_llama_cpp(entry.file, setup, missing)
            except SecateurError as error:
                missing |= dict.fromkeys((DECODE, MEMORY, TEXT_ENERGY), error.message)
    command = f"secateur export {shlex.quote(spec.model)} -o baseline-{name}.gguf --quantize {name}"
    return Trial(number, "complete", {}, command, values, name=name, missing=missing)


def _run_in_llama_cpp(file: Path, setup: Setup, missing: dict[str, str]) -> dict[str, float]:
    """Speed, memory and, where the processor has a meter, energy."""
    if not is_installed():
        raise UnsupportedModelError(f"{PACKAGE} is not installed", hint=INSTALL)
    prompt = setup.load["prompt"]
    meter, why = find_meter()
    speeds: list[float] = []
    joules: list[float] = []
    with LlamaCpp(file, context=len(prompt) + NEW_TOKENS + 16, threads=torch.get_num_threads(), exact=False) as worker:
        request = {"tokens": prompt, "new_tokens": NEW_TOKENS, "runs": 1}
        worker.ask("speed", **request)
        memory = worker.ask("resident")
        for _ in range(ROUNDS):
            if meter is not None:
                meter.start()
            speeds.append(float(worker.ask("speed", **request)["decode_tokens_per_second"]))
            if meter is not None:
                joules.append(meter.joules() / (len(prompt) + NEW_TOKENS))
    found = {DECODE: statistics.median(speeds), MEMORY: memory["bytes_resident"] - memory["bytes_resident_before"]}
    if joules:
        return {**found, TEXT_ENERGY: statistics.median(joules)}
    missing[TEXT_ENERGY] = why
    return found


def _keep(store: Store, trial: Trial, kept: list[Trial], started: float) -> None:
    trial.seconds = time.monotonic() - started
    kept.append(trial)
    store.put("baselines", [one.to_dict() for one in kept])
    spent = store.get("spent", {})
    before = float(spent.get("baseline_seconds", 0.0))
    store.put("spent", {**spent, "baseline_seconds": before + trial.seconds})


def _trial(number: int, name: str, command: str, found: Quality, folder: Path, setup: Setup, speed: Speed) -> Trial:
    """One baseline with everything that is measured of a trial."""
    size = measure_size(folder, keys=setup.prunable)
    total = sum(setup.prunable.values())
    values: dict[str, float | None] = {
        **found.values,
        "bytes_disk": size.bytes_disk,
        "parameters": size.parameters,
        "nonzero": size.nonzero,
        "sparsity": size.zeros_of_keys / total if total else 0.0,
    }
    counted, missing = measure_flops(setup.source.folder, {})  # the same in every number format
    trial = Trial(number, "complete", {}, command, values | counted, name=name, missing=missing)
    trial.intervals |= {key: list(ends) for key, ends in found.intervals.items()}
    trial.values |= speed.values
    trial.intervals |= speed.intervals
    trial.missing |= speed.missing
    return trial
