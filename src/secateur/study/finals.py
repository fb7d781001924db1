"""The end of a study: finalists are chosen, and each is measured on the test text once, and timed"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from secateur.progress import Recorder
from secateur.study.quality import Quality, dense_quality, difference, quality
from secateur.study.setup import Setup
from secateur.study.speed import trial_speed
from secateur.study.status import finalists_now
from secateur.study.store import Store
from secateur.study.trial import Outcome, Task, make_model, remove_models
from secateur.study_result import Trial


def measure_finalists(setup: Setup, store: Store, task_of: Callable[..., Task], first: int, reporter: Recorder) -> None:
    """Measure the finalists, and the dense model beside them, on the test text.

    Which they are is written down before the first of them sees it, and each figure as soon as it is there: a run that
    is resumed chooses nothing anew and measures nobody twice.
    """
    started = time.monotonic()
    chosen = store.get("chosen")
    if chosen is None:
        chosen = finalists_now(store, setup.spec.finalists)
        store.put("chosen", chosen)
    test = setup.exam("test")
    baselines = [Trial(**one) for one in store.get("baselines")]
    done = [Trial(**one) for one in store.get("finalists", [])]
    trials = {trial.number: trial for trial in store.trials()}
    dense = baselines[0]
    if chosen and not any(name.startswith("test_") for name in dense.values):
        reporter.note("the dense model is measured on the test text")
        found = dense_quality(
            setup.source.folder, setup.sha256, test, first=first, device=setup.device, reporter=reporter
        )
        dense.values |= {f"test_{name}": value for name, value in found.values.items()}
        dense.intervals |= {f"test_{name}": list(ends) for name, ends in found.intervals.items()}
        store.put("dense_right_test", found.right)
        store.put("baselines", [one.to_dict() for one in baselines])
    reporter.stage("finalists on the test text", len(chosen))
    for number in chosen:
        if number in {trial.number for trial in done}:
            continue
        trial = trials[number]
        folder = Path(trial.out or setup.spec.out / f"trial-{number:04d}")
        task = task_of(trial, bar=False)
        if not (folder / "config.json").is_file():
            reporter.note(f"trial {number}: its model was removed, and is made again")
            make_model(task, Outcome("complete"), Recorder())
            store.keep_model(number, task.out)
        # Timed first: when that is interrupted, the test text has not been looked at.
        timed = _timed(trial, folder, setup, dense)
        found = quality(folder, test, first=first, device=setup.device)
        done.append(_tested(timed, found, store.get("dense_right_test", ""), str(folder)))
        store.put("finalists", [one.to_dict() for one in done])
        reporter.advance(f"trial {number}")
    if setup.spec.keep != "all":
        for trial in store.trials():
            if trial.out and trial.number not in chosen:
                remove_models(dataclasses.replace(task_of(trial, bar=False), out=trial.out))
                store.keep_model(trial.number, None)
    spent = store.get("spent", {})
    before = float(spent.get("finalist_seconds", 0.0))
    store.put("spent", {**spent, "finalist_seconds": before + time.monotonic() - started})


def _timed(trial: Trial, folder: Path, setup: Setup, dense: Trial) -> Trial:
    """A trial with its speed, where finalists are timed and trials were not."""
    if setup.finalist_load is None or setup.trial_load is not None:
        return trial
    speed = trial_speed(setup.finalist_load, setup.source.folder, folder, dense.values, setup.device, Recorder())
    return dataclasses.replace(
        trial, values={**trial.values, **speed.values}, intervals={**trial.intervals, **speed.intervals},
        missing={**trial.missing, **speed.missing},
    )  # fmt: skip


def _tested(trial: Trial, found: Quality, dense_right: str, out: str) -> Trial:
    """A trial with its quality on the test text in the place of that on the choice text."""
    values, intervals = {**trial.values, **found.values}, {**trial.intervals, **found.intervals}
    if dense_right:
        values["accuracy_difference"], intervals["accuracy_difference"] = difference(found.right, dense_right)
    return dataclasses.replace(trial, values=values, intervals=intervals, out=out)
