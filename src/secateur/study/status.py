"""What a study has found so far, out of its storage: the same while it runs, when it is stopped and when it is done"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.errors import RunError, StudyError
from secateur.result import write_json
from secateur.study.front import best_of, finalists_of, front_of, how_recommended, knee_of, points_of
from secateur.study.read import is_file_of_study, load_study
from secateur.study.store import Store
from secateur.study_result import StudyResult, Trial

FEWEST = 8
"""Complete trials below which importances say nothing."""


def study_status(study: str | Path) -> StudyResult:
    """What a study has found so far; also writes it beside the storage, as ``NAME.json``.

    Args:
        study: the study file, or its storage.

    Raises:
        StudyError: when there is no such storage, or it holds no study of secateur.
    """
    path = Path(study).expanduser()
    if is_file_of_study(study):
        path = load_study(study).storage
    store = Store.read(path)
    try:
        result = result_of(store)
        if not result.finished and not store.in_use and any(trial.state == "running" for trial in result.trials):
            result.warnings.append("nobody runs this study now: what says running was interrupted, and is tried again")
        write_result(store.path, result)
    finally:
        store.close()
    return result


def result_file(storage: Path) -> Path:
    """Where the result of a study is kept: beside its storage."""
    return storage.with_suffix(".json")


def write_result(storage: Path, result: StudyResult) -> None:
    """Write ``NAME.json`` whole or not at all, whoever else writes it at the same time."""
    path = result_file(storage)
    mine = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        write_json(mine, result.to_dict())
        mine.replace(path)
    except OSError as error:
        raise StudyError(f"{path} cannot be written: {error.strerror}") from None


def result_of(store: Store, *, importances: bool = True) -> StudyResult:
    """Everything that the storage says, and what follows from it; importances are left out when not asked for."""
    identity = store.identity
    trials = store.trials()
    points = points_of(trials, identity["objectives"])
    front = front_of(points)
    warnings = list(store.get("warnings", []))
    complete = [trial for trial in trials if trial.state == "complete"]
    if complete and not front:
        warnings.append("no complete trial meets the constraints, so there is no front and nothing to recommend")
    shares: dict[str, dict[str, float]] = {}
    if importances and len(complete) >= FEWEST:
        try:
            shares = store.importances(identity["objectives"])
        except RunError as error:
            warnings.append(f"there are no importances: {error.message}")
    elif importances and store.get("finished", False):
        warnings.append(f"importances of settings need {FEWEST} complete trials, there are {len(complete)}")
    baselines = [Trial(**one) for one in store.get("baselines", [])]
    failed = sum(trial.state == "failed" for trial in trials)
    if failed:
        warnings.append(f"{failed} of {len(trials)} trials failed; each says why")
    return StudyResult(
        name=identity["name"],
        model=identity["model"],
        objectives=identity["objectives"],
        constraints=identity["constraints"],
        data=store.get("origins", {}),
        finished=bool(store.get("finished", False)),
        planned=store.get("planned"),
        baselines=baselines,
        trials=trials,
        front=front,
        finalists=[Trial(**one) for one in store.get("finalists", [])],
        best=best_of(points, identity["objectives"]),
        recommended=knee_of(points, front),
        recommended_by=how_recommended(identity["objectives"]) if front else "",
        importances=shares,
        spent=_spent(store, trials, baselines),
        machine=store.get("machine", {}),
        versions=store.get("versions", {}),
        warnings=warnings,
    )


def _spent(store: Store, trials: list[Trial], baselines: list[Trial]) -> dict[str, float]:
    shared = [store.told(trial.number, "shared_seconds") or 0.0 for trial in trials]
    stored: Mapping[str, Any] = store.get("spent", {})
    spent = {
        "seconds": 0.0,
        "baseline_seconds": 0.0,
        "finalist_seconds": 0.0,
        **stored,
        "trial_seconds": sum(trial.seconds or 0.0 for trial in trials),
        "shared_models": float(sum(seconds > 0 for seconds in shared)),
    }
    # Apart, every trial would measure the dense model for itself.
    dense = float(stored.get("dense_quality_seconds", 0.0))
    complete = sum(trial.state == "complete" for trial in trials)
    spent["shared_baselines"] = float(max(0, complete - 1) if baselines else 0)
    spent["saved_seconds"] = sum(shared) + dense * spent["shared_baselines"]
    return spent


def finalists_now(store: Store, count: int) -> list[int]:
    """Numbers of the trials that would be finalists if the study ended now."""
    points = points_of(store.trials(), store.identity["objectives"])
    return finalists_of(points, front_of(points), count)
