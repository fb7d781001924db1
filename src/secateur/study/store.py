"""The storage of a study: an Optuna study in one SQLite file, which optuna-dashboard opens; one process writes it"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import sqlite3
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.checkpoint.locks import take_lock
from secateur.errors import MissingExtraError, RunError, StudyError
from secateur.seeds import derived_seed
from secateur.study.space import Space, Values
from secateur.study.spec import StudySpec
from secateur.study.trial import Outcome
from secateur.study.values import Direction
from secateur.study_result import Trial

BEST = 0.25
"""Share of the trials that importances tell from the others."""
MOST_TRIES = 3
"""A trial whose process dies is begun again at most twice."""
FAR = 1e100
"""Told to a sampler for a perplexity that is beyond the largest number."""
_STATES = {"WAITING": "waiting", "RUNNING": "running", "COMPLETE": "complete", "PRUNED": "stopped", "FAIL": "failed"}


def import_optuna() -> Any:
    """Optuna, which says nothing of its own accord.

    Raises:
        MissingExtraError: when it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise MissingExtraError("a study needs Optuna", hint="pip install 'secateur[study]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


class Store:
    """An open storage file; use `create` or `read`."""

    def __init__(self, path: Path, study: Any) -> None:
        self.path = path
        self._optuna = import_optuna()
        self._study = study
        self._lock: int | None = None

    @classmethod
    def create(cls, spec: StudySpec, identity: Mapping[str, Any]) -> Store:
        """Open the storage of a study for writing; made when there is none. It is locked until `close`.

        Raises:
            StudyError: when the file belongs to another study (saying what differs), is no storage, or is in use.
        """
        optuna = import_optuna()
        path = spec.storage
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = take_lock(path.with_name(path.name + ".lock"))
        except OSError as error:
            raise StudyError(f"storage {path} cannot be written: {error.strerror}", hint="name another") from None
        if lock is None:
            raise StudyError(f"another process runs the study in {path}", hint="wait for it, or look with study status")
        try:
            storage = _open(optuna, path)
            names = optuna.get_all_study_names(storage)
            if names and spec.name not in names:
                raise StudyError(
                    f"storage {path} belongs to study '{names[0]}', not '{spec.name}'", hint="name another storage file"
                )
            ways = list(spec.objectives.values())
            if not names:
                study = optuna.create_study(storage=storage, study_name=spec.name, directions=ways)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                    study.set_metric_names(list(spec.objectives))
                study.set_user_attr("secateur", json.loads(json.dumps(identity)))
            study = optuna.load_study(storage=storage, study_name=spec.name)
            _check_identity(path, study.user_attrs.get("secateur"), identity)
        except BaseException:
            os.close(lock)
            raise
        store = cls(path, study)
        store._lock = lock
        return store

    @classmethod
    def read(cls, path: Path) -> Store:
        """Open the storage of a study to look at it, also while it runs.

        Raises:
            StudyError: when there is no such file, or it holds no study of secateur.
        """
        optuna = import_optuna()
        if not path.is_file():
            raise StudyError(f"no storage {path}", hint="the study was not run yet: secateur study run")
        storage = _open(optuna, path)
        names = optuna.get_all_study_names(storage)
        for name in names:
            study = optuna.load_study(storage=storage, study_name=name)
            if "secateur" in study.user_attrs:
                return cls(path, study)
        raise StudyError(f"{path} holds no study of secateur", hint="give the file that `secateur study run` wrote")

    def close(self) -> None:
        """Let go of the lock and of the file."""
        self._study._storage.remove_session()
        self._study._storage._backend.engine.dispose() if hasattr(self._study._storage, "_backend") else None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def in_use(self) -> bool:
        """Whether a process is running this study."""
        try:
            lock = take_lock(self.path.with_name(self.path.name + ".lock"))
        except OSError:
            return False
        if lock is not None:
            os.close(lock)
        return lock is None

    def get(self, key: str, default: Any = None) -> Any:
        """Something that was put about the whole study."""
        return self._study.user_attrs.get(f"secateur:{key}" if key else "secateur", default)

    def put(self, key: str, value: Any) -> None:
        """Keep something about the whole study: plain data."""
        self._study.set_user_attr(f"secateur:{key}", value)

    @property
    def identity(self) -> dict[str, Any]:
        return dict(self._study.user_attrs["secateur"])

    def begin(self, settings: Mapping[str, Any], params: Mapping[str, Any], spans: Mapping[str, Values]) -> int:
        """A running trial of these settings, without asking a sampler. Returns its number.

        Args:
            params: name -> value, of those that the study varies.
            spans: name -> all values that the study may give it.
        """
        kinds = {name: _distribution(self._optuna, spans[name], whole=True) for name in params}
        trial = self._optuna.trial.create_trial(
            state=self._optuna.trial.TrialState.RUNNING, params=dict(params), distributions=kinds,
            user_attrs={"settings": dict(settings), "tries": 0},
        )  # fmt: skip
        self._study.add_trial(trial)
        return len(self._study.get_trials(deepcopy=False)) - 1

    def ask(self, space: Space, sampler: str, seed: int, budget: int | None) -> tuple[int, dict[str, Any]]:
        """A running trial whose settings a sampler chose: its number and its settings.

        What is chosen hangs on the seed, the number of the trial and what was told before, on nothing else.
        """
        count = len(self._study.get_trials(deepcopy=False))
        self._study.sampler = _sampler(self._optuna, sampler, derived_seed(seed, "sampler", count) % 2**31, budget)
        trial = self._study.ask()

        def choose(name: str, values: Values) -> Any:
            if len(values.choices) == 1:
                return values.choices[0]
            kind = _distribution(self._optuna, values, whole=False)
            if isinstance(kind, self._optuna.distributions.CategoricalDistribution):
                return trial.suggest_categorical(name, kind.choices)
            return round(trial.suggest_float(name, kind.low, kind.high, step=kind.step), 10)

        settings = space.draw(choose)
        trial.set_user_attr("settings", settings)
        trial.set_user_attr("tries", 0)
        return int(trial.number), settings

    def note(self, number: int, **entries: Any) -> None:
        """Keep something about a trial: plain data."""
        trial = self._trial(number)
        for key, value in entries.items():
            trial.set_user_attr(key, value)

    def tell(
        self,
        number: int,
        outcome: Outcome,
        objectives: Sequence[str],
        missed: Mapping[str, float | None],
        meets: bool | None,
    ) -> None:
        """End a trial. Constraints are told to the sampler as far as they are known."""
        trial = self._trial(number)
        for key, value in dataclasses.asdict(outcome).items():
            if key != "state":
                trial.set_user_attr(key, value)
        trial.set_user_attr("meets", meets)
        if outcome.state != "failed":
            for text, beyond in missed.items():
                if beyond is not None:
                    trial.set_constraint(text, beyond)
        states = self._optuna.trial.TrialState
        if outcome.state == "complete":
            ways = self._study.directions
            far = [FAR if way.name == "MINIMIZE" else -FAR for way in ways]
            told = [outcome.values.get(name) for name in objectives]
            values = [limit if value is None else float(value) for value, limit in zip(told, far, strict=True)]
            self._study.tell(number, values, state=states.COMPLETE)
        else:
            self._study.tell(number, state=states.PRUNED if outcome.state == "stopped" else states.FAIL)

    def repeat(self, number: int, of: int) -> None:
        """End a trial whose settings another one had: the sampler gets the same answer, and nobody counts it."""
        trial, other = self._trial(number), self._frozen(of)
        trial.set_user_attr("same_as", of)
        for key, value in other.constraints.items():
            trial.set_constraint(key, value)
        values = other.values if other.state.name == "COMPLETE" else None
        state = other.state if other.state.is_finished() else self._optuna.trial.TrialState.FAIL
        self._study.tell(number, values, state=state)

    @property
    def models(self) -> dict[int, str]:
        """Number of a trial -> folder of its model, of those that are kept."""
        return {int(number): folder for number, folder in self.get("models", {}).items()}

    def keep_model(self, number: int, folder: str | None) -> None:
        """Write down where the model of a trial is, or with None that it is gone."""
        models = self.models
        if folder is None:
            models.pop(number, None)
        else:
            models[number] = folder
        self.put("models", {str(key): value for key, value in models.items()})

    def _trial(self, number: int) -> Any:
        storage = self._study._storage
        identifier = storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)
        return self._optuna.trial.Trial(self._study, identifier)

    def _frozen(self, number: int) -> Any:
        return self._study.get_trials(deepcopy=False)[number]

    def trials(self) -> list[Trial]:
        """All that were begun, in order; repetitions are left out."""
        found = []
        models = self.models
        for frozen in self._study.get_trials(deepcopy=False):
            told = frozen.user_attrs
            if "same_as" in told or "settings" not in told:
                continue
            found.append(
                Trial(
                    number=frozen.number,
                    state=_STATES[frozen.state.name],  # type: ignore[arg-type]
                    settings=dict(told["settings"]),
                    command=told.get("command", ""),
                    values=dict(told.get("values", {})),
                    meets=told.get("meets"),
                    reason=told.get("reason", ""),
                    seconds=told.get("seconds"),
                    sparsity=dict(told.get("sparsity", {})),
                    tries=told.get("tries", 1),
                    out=models.get(frozen.number, ""),
                    warnings=list(told.get("warnings", [])),
                    missing=dict(told.get("missing", {})),
                    intervals=dict(told.get("intervals", {})),
                )
            )
        return found

    def told(self, number: int, key: str) -> Any:
        """What `note` or `tell` kept about a trial."""
        return self._frozen(number).user_attrs.get(key)

    def importances(self, objectives: Mapping[str, Direction]) -> dict[str, dict[str, float]]:
        """Objective -> setting -> share by which it tells the best quarter of the complete trials apart (PED-ANOVA).

        Raises:
            RunError: when Optuna cannot tell them; the message has its reason.
        """
        found: dict[str, dict[str, float]] = {}
        # Its own tenth is a handful of trials in a grid of some forty, and they may have one setting alone in common.
        evaluator = self._optuna.importance.PedAnovaImportanceEvaluator(target_quantile=BEST)
        for at, (name, way) in enumerate(objectives.items()):
            sign = 1 if way == "minimize" else -1  # what is small is good to PED-ANOVA
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # it says that small is good, which the sign sees to
                    shares = self._optuna.importance.get_param_importances(
                        self._study, evaluator=evaluator, target=lambda trial, at=at, sign=sign: sign * trial.values[at]
                    )
            except Exception as error:
                raise RunError(f"importances of {name}: {' '.join(str(error).split())}") from error
            found[name] = {key: float(value) for key, value in shares.items() if math.isfinite(value)}
        return found


def _open(optuna: Any, path: Path) -> Any:
    _check_file(path)
    try:
        return optuna.storages.RDBStorage(
            f"sqlite:///{path.resolve()}", engine_kwargs={"connect_args": {"timeout": 60}}
        )
    except Exception as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise StudyError(f"{path} is no storage of a study: {reason}", hint="name another storage file") from error


def _check_file(path: Path) -> None:
    """See that a file is Optuna's before Optuna adds its tables to it."""
    if not path.is_file() or not path.stat().st_size:
        return
    hint = "name another storage file"
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            tables = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
    except sqlite3.Error as error:
        raise StudyError(f"{path} is no storage of a study: {error}", hint=hint) from None
    if not {"studies", "version_info"} <= tables:
        raise StudyError(f"{path} is no storage of a study: it is another program's database", hint=hint)


def _check_identity(path: Path, stored: Any, identity: Mapping[str, Any]) -> None:
    if not isinstance(stored, Mapping):
        raise StudyError(f"storage {path} holds a study that is not secateur's", hint="name another storage file")
    asked = json.loads(json.dumps(identity))
    differing = [key for key in asked if stored.get(key) != asked[key]]
    if differing:
        details = "; ".join(f"{key}: {_short(stored.get(key))} there, {_short(asked[key])} asked" for key in differing)
        raise StudyError(
            f"storage {path} belongs to another study: {', '.join(differing)} differ ({details})",
            hint="name another storage file, or put the study file back as it was",
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _distribution(optuna: Any, values: Values, *, whole: bool) -> Any:
    """How Optuna sees the values of one setting: as numbers in order where they are numbers, else as names.

    Args:
        whole: no sampler will draw from it, so that it need not have gaps.
    """
    kinds = optuna.distributions
    listed = values.choices
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in listed)
    if values.is_range:
        return kinds.FloatDistribution(values.low, values.high, step=None if whole else values.step)
    if numbers and len(listed) > 1:
        ordered = sorted(map(float, listed))
        if whole:
            return kinds.FloatDistribution(ordered[0], ordered[-1])
        steps = {round(b - a, 9) for a, b in itertools.pairwise(ordered)}
        if len(steps) == 1 and all(isinstance(value, float) for value in listed):
            return kinds.FloatDistribution(ordered[0], ordered[-1], step=steps.pop())
    return kinds.CategoricalDistribution(listed)


def _sampler(optuna: Any, name: str, seed: int, budget: int | None) -> Any:
    """A sampler that suits the budget: a small study must not end before it has left its random start."""
    start = 10 if budget is None else max(3, min(10, budget // 3))
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=start)
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(4, start))
