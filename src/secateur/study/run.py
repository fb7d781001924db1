"""Runs a study: baselines, trials until the budget is spent, finalists on the test text; whatever was done is kept"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur.budgets import parse_size
from secateur.errors import Interrupted, StudyError
from secateur.progress import Recorder, Reporter
from secateur.study.base import with_base, write_texts
from secateur.study.baselines import measure_baselines
from secateur.study.clock import Clock
from secateur.study.command import command_line
from secateur.study.finals import measure_finalists
from secateur.study.read import LOOKED_AT, load_study
from secateur.study.setup import Setup, set_up, windows_folder
from secateur.study.share import evict, made_name
from secateur.study.space import Values
from secateur.study.spec import StudySpec
from secateur.study.status import finalists_now, result_of, write_result
from secateur.study.stopping import Bar, limits_of
from secateur.study.store import MOST_TRIES, Store, import_optuna
from secateur.study.storing import HF
from secateur.study.trial import Outcome, Task, remove_models
from secateur.study.values import COSTLY, QUALITY, check_constraints, meets, violations
from secateur.study.workers import Cluster, Died, Inline, Pool, Processes, import_ray
from secateur.study_result import StudyResult, Trial
from secateur.verbs.provenance import machine, versions

REPEATS = 20
"""A sampler that suggests nothing new so often in a row has tried everything."""


def run_study(
    study: str | Path | StudySpec, *, workers: int = 1, ray: str | None = None, reporter: Reporter | None = None
) -> StudyResult:
    """Search the settings of a study, or go on with what was begun; the storage keeps all that was done.

    Args:
        study: a study file, the name of one that comes with the library, or a study that was read.
        workers: processes on this machine that run trials, each with its share of the cores.
        ray: address of a Ray cluster that runs them instead.

    Raises:
        SecateurError: bad input, before any work; or a budget too small for the baselines.
        Interrupted: on Ctrl-C; the same call goes on.
    """
    spec = study if isinstance(study, StudySpec) else load_study(study)
    import_optuna()
    if workers < 1:
        raise StudyError(f"workers is {workers}", hint="it must be at least 1")
    if ray is not None and workers > 1:
        raise StudyError(
            "both workers and ray are given", hint="a Ray cluster knows how many trials it can run at once"
        )
    if ray is not None:
        import_ray()
    recorder = Recorder(reporter)
    setup = set_up(spec, recorder)
    store = Store.create(spec, setup.identity)
    try:
        return _Run(setup, store, recorder).all(workers, ray)
    finally:
        store.close()


class _Run:
    """One run of a study, new or resumed."""

    def __init__(self, setup: Setup, store: Store, reporter: Recorder) -> None:
        self.setup, self.spec, self.store, self.reporter = setup, setup.spec, store, reporter
        self._clock = Clock(setup.spec, store)
        self._tasks: dict[int, Task] = {}
        self._recent: list[str] = []
        self._dense: dict[str, float | None] = {}
        self._dense_first = 0.0
        self._dense_right = ""
        self._grid: Iterator[dict[str, Any]] | None = None
        self._later: list[dict[str, Any]] = []
        self._spans: dict[str, Values] = {}
        self._exhausted = False

    def all(self, workers: int, ray: str | None) -> StudyResult:
        """Everything that is still to be done."""
        if self.store.get("finished", False):
            return self._over()
        write_texts(self.setup)
        self._describe()
        pool = self._pool(workers, ray) if self.store.get("chosen") is None else None
        try:
            self._make_base()
            dense = measure_baselines(self.setup, self.store, self._first, self.reporter)
            self._dense, self._dense_first, self._dense_right = dense.values, dense.first, dense.right
            self._clock.dense_seconds, self._clock.timing_seconds = dense.seconds, dense.timing_seconds
            self._clock.keep()
            check_constraints(self.spec.constraints, self.setup.reach, self._dense)
            self._check_measured()
            self._clock.check(self._counted())
            if pool is not None:
                self.store.put("machine", {**self.store.get("machine"), "threads": pool.threads,
                                           "trials_at_once": pool.capacity})  # fmt: skip
                self._search(pool)
                pool.close()
            measure_finalists(self.setup, self.store, self._task_of, self._first, self.reporter)
        except (KeyboardInterrupt, Interrupted):
            if pool is not None:
                pool.close()
            for number in self._tasks:  # stopped, not failed: this was no try
                self.store.note(number, tries=self._tries(number) - 1)
            done = sum(trial.state in ("complete", "stopped", "failed") for trial in self.store.trials())
            self._write()
            raise Interrupted(
                f"stopped; finished trials are kept in {self.spec.storage.name}, {done} so far",
                hint="go on with the same command",
            ) from None
        except BaseException:
            if pool is not None:
                pool.close()
            raise
        self.store.put("finished", True)
        shutil.rmtree(windows_folder(self.spec), ignore_errors=True)
        return self._write()

    def _make_base(self) -> None:
        """The classifier that all trials start from, where the model is to become one; its time is the baselines'."""
        started = time.monotonic()
        self.setup = with_base(self.setup, self.reporter)
        spent = self.store.get("spent", {})
        before = float(spent.get("baseline_seconds", 0.0))
        self.store.put("spent", {**spent, "baseline_seconds": before + time.monotonic() - started})

    def _over(self) -> StudyResult:
        """A finished study stays as it is: its test text was used."""
        planned, now = self.store.get("planned"), self._planned()
        if now is not None and planned is not None and now > planned:
            raise StudyError(
                f"study {self.spec.name} is finished: its test text was used once, after {planned} trials",
                hint="give another name, storage and test text for a larger search",
            )
        self.reporter.note(f"study {self.spec.name} is finished; nothing is left to do")
        return self._write()

    def _describe(self) -> None:
        self.store.put("planned", self._planned())
        self.store.put("origins", self.setup.texts.origins)
        self.store.put("machine", machine())
        self.store.put("versions", versions())
        if self.spec.sampler == "grid" and (skipped := self.spec.skipped):
            self.reporter.note(
                f"{skipped} combinations of the grid are no trials: they cannot go together, or say the same"
            )
        if self.spec.sampler == "grid" and self.spec.trials is not None:
            total = sum(1 for _ in self.spec.grid())
            if self.spec.trials < total:
                self.reporter.warn(f"the grid has {total} settings: the first {self.spec.trials} are tried")

    def _planned(self) -> int | None:
        if self.spec.sampler != "grid":
            return self.spec.trials
        total = sum(1 for _ in self.spec.grid())
        return min(total, self.spec.trials or total)

    @property
    def _first(self) -> int:
        return self.spec.stop.evaluate if self.spec.stop is not None else LOOKED_AT[self.spec.task]

    def _check_measured(self) -> None:
        """Refuse objectives and constraints that even the dense model has no value of.

        Raises:
            StudyError: with the reason.
        """
        dense = Trial(**self.store.get("baselines")[0])
        for name in sorted(self.spec.wanted - {"seconds"}):
            if dense.values.get(name) is None:
                why = dense.missing.get(name, "it is too large for a number")
                raise StudyError(f"{name} of the dense model is not known: {why}", hint="leave it out of the study")

    # Trials

    def _pool(self, workers: int, ray: str | None) -> Pool:
        if ray is not None:
            asked = self.spec.resources
            memory = None if asked.memory is None else parse_size(asked.memory)
            return Cluster(ray, cpus=asked.cpus, gpus=asked.gpus, memory=memory)
        if workers > 1 and self.setup.trial_load is not None:
            self.reporter.warn("speed is measured while other workers compute: take one worker for exact figures")
        return Processes(workers) if workers > 1 else Inline(self.reporter)

    def _counted(self) -> int:
        """Trials that ended or run."""
        return sum(trial.state in ("complete", "stopped", "failed") for trial in self.store.trials())

    def _search(self, pool: Pool) -> None:
        interrupted = [trial.number for trial in self.store.trials() if trial.state == "running"]
        if interrupted:
            self.reporter.note(f"trials {', '.join(map(str, interrupted))} were interrupted and are tried again")
        while True:
            while len(self._tasks) < pool.capacity:
                number = interrupted.pop(0) if interrupted else self._next()
                if number is None:
                    break
                self._submit(pool, number)
            if not self._tasks:
                if interrupted or not (self._exhausted or self._spent()):
                    continue
                return
            for number, answer in pool.wait():
                if isinstance(answer, Died):
                    self._died(pool, number, answer)
                else:
                    self._ended(number, answer)

    def _spent(self) -> bool:
        """Whether the budget is used up."""
        running = len(self._tasks)
        if self.spec.trials is not None and self._counted() + running >= self.spec.trials:
            return True
        return not self._clock.left()

    def _next(self) -> int | None:
        """Begin the next trial; None when there is none, or the budget is used up."""
        if self._exhausted or self._spent():
            return None
        if self.spec.sampler == "grid":
            return self._next_of_grid()
        for _ in range(REPEATS):
            done = {str(sorted(trial.settings.items())): trial.number for trial in self.store.trials()}
            number, settings = self.store.ask(self.spec.spaces[0], self.spec.sampler, self.spec.seed, self.spec.trials)
            earlier = done.get(str(sorted(settings.items())))
            if earlier is None:
                return number
            self.store.repeat(number, earlier)
        self._exhausted = True
        self.reporter.note("the sampler suggests nothing new: the space is tried out")
        return None

    def _next_of_grid(self) -> int | None:
        if self._grid is None:
            done = [trial.settings for trial in self.store.trials()]
            first = itertools.islice(self.spec.grid(), self.spec.trials)  # whatever order workers take them in
            self._grid = (settings for settings in first if settings not in done)
            self._spans = _spans(self.spec)
        settings = self._drawn(self._grid)
        if settings is None:
            self._exhausted = True
            return None
        params = {name: value for name, value in settings.items() if name in self._spans}
        return self.store.begin(settings, params, self._spans)

    def _drawn(self, grid: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
        """The next of the grid whose model no running trial makes, as it would wait for it; None at the end."""
        making = [_made_by(self._trial(number).settings) for number in self._tasks]
        for place, settings in enumerate(self._later):
            if _made_by(settings) not in making:
                return self._later.pop(place)
        for settings in grid:
            if _made_by(settings) not in making:
                return settings
            self._later.append(settings)
        return self._later.pop(0) if self._later else None

    def _submit(self, pool: Pool, number: int) -> None:
        trial = self._trial(number)
        tries = self._tries(number)
        task = self._task_of(trial, threads=pool.threads)
        recipe, reads_text = self.setup.recipe(trial.settings)
        command = command_line(
            self.setup.model, recipe, self.spec.training(trial.settings), Path(task.out).name,
            conversion=task.conversion, reads_text=reads_text, format=task.format,
        )  # fmt: skip
        if tries >= MOST_TRIES:
            how = self.store.told(number, "died") or "the process that ran it was killed"
            self._tell(number, Outcome("failed", reason=f"begun {tries} times, and each time {how}"))
            return
        self.store.note(number, tries=tries + 1, command=command)
        self._tasks[number] = task
        pool.submit(task)

    def _task_of(self, trial: Trial, *, threads: int | None = None, bar: bool = True) -> Task:
        """What one trial is to do."""
        setup, spec = self.setup, self.spec
        recipe, _ = setup.recipe(trial.settings)
        training, conversion = spec.training(trial.settings), spec.conversion(trial.settings)
        several = any(max(len(space.recoveries), len(space.formats)) > 1 for space in spec.spaces)
        name = ""
        if several and threads is not None:
            name = str(windows_folder(spec) / made_name(setup.sha256, recipe, setup.content(trial.settings), threads))
        return Task(
            number=trial.number, model=setup.model, dense=str(setup.source.folder), recipe=recipe.to_dict(),
            training=None if training is None else training.to_dict(), out=str(spec.out / f"trial-{trial.number:04d}"),
            choice=str(setup.exam("choice")), conversion=conversion, shared=name,
            format=trial.settings.get("format", HF), device=setup.device,
            bar=dataclasses.asdict(self._bar(trial)) if bar and spec.stop is not None else None,
            load=setup.trial_load, known=self._dense, dense_right=self._dense_right, first=self._first,
        )  # fmt: skip

    def _bar(self, trial: Trial) -> Bar:
        """What a trial is held against: the constraints, and the complete trials with the same recovery."""
        assert self.spec.stop is not None
        others = {name: way for name, way in self.spec.objectives.items() if name not in QUALITY}
        rivals = []
        for other in self.store.trials():
            proxy = self.store.told(other.number, "proxy")
            if other.state == "complete" and proxy and _finished_as(other) == _finished_as(trial):
                known = {name: other.values.get(name) for name in others if name not in COSTLY}
                rivals.append({"number": other.number, "proxy": proxy, "others": known})
        return Bar(
            windows=self.spec.stop.evaluate, factor=self.spec.stop.factor,
            limits=limits_of(self.spec.constraints, self._dense, self._dense_first), rivals=rivals, objectives=others,
            rivalry=any(name in QUALITY for name in self.spec.objectives), labels=self.spec.task == "labels",
        )  # fmt: skip

    def _ended(self, number: int, outcome: Outcome) -> None:
        task = self._tasks.pop(number)
        self._tell(number, outcome)
        if task.shared:
            name = Path(task.shared).name
            self._recent = [*(one for one in self._recent if one != name), name]
            evict(Path(task.shared).parent, [Path(one.shared).name for one in self._tasks.values()], self._recent)
        self._tidy(task, outcome)

    def _tell(self, number: int, outcome: Outcome) -> None:
        missed = violations(self.spec.constraints, outcome.values, self._dense)
        met = meets(missed) if outcome.state != "failed" else None
        if outcome.state == "complete":
            met = bool(met)  # a limit on what could not be measured is not met
        self.store.tell(number, outcome, list(self.spec.objectives), missed, met)
        self._write(whole=False)
        trial = self._trial(number)
        self.reporter.note(f"trial {number}: {told(trial, self.spec.objectives)}")
        for warning in outcome.warnings:
            self.reporter.inner.warn(f"trial {number}: {warning}")

    def _tidy(self, task: Task, outcome: Outcome) -> None:
        """Keep the models of those that would be finalists now, or all; the storage says which are there."""
        if outcome.state == "complete":
            self.store.keep_model(task.number, task.out)
        if self.spec.keep == "all":
            return
        kept = finalists_now(self.store, self.spec.finalists)
        for trial in self.store.trials():
            if trial.out and trial.number not in kept:
                remove_models(dataclasses.replace(task, number=trial.number, out=trial.out))
                self.store.keep_model(trial.number, None)

    def _died(self, pool: Pool, number: int, answer: Died) -> None:
        task = self._tasks.pop(number)
        self.store.note(number, died=answer.how)
        remove_models(task)
        self.reporter.warn(f"trial {number}: {answer.how}")
        self._submit(pool, number)  # which gives it up when that happened too often

    def _trial(self, number: int) -> Trial:
        return next(trial for trial in self.store.trials() if trial.number == number)

    def _tries(self, number: int) -> int:
        return int(self.store.told(number, "tries") or 0)

    def _write(self, *, whole: bool = True) -> StudyResult:
        """Write what there is; ``whole`` with importances, which take longer the more trials there are."""
        self._clock.keep()
        # Those of earlier runs of a resumed study stay.
        self.store.put("warnings", list(dict.fromkeys([*self.store.get("warnings", []), *self.reporter.warnings])))
        result = result_of(self.store, importances=whole)
        write_result(self.spec.storage, result)
        return result


def _spans(spec: StudySpec) -> dict[str, Values]:
    """Setting of a grid -> all values that it takes anywhere in it; those that take only one are no parameters."""
    found: dict[str, list[Any]] = {}
    for settings in spec.grid():
        for name, value in settings.items():
            values = found.setdefault(name, [])
            if value not in values:
                values.append(value)
    return {name: Values(tuple(values)) for name, values in found.items() if len(values) > 1}


def told(trial: Trial, objectives: Mapping[str, Any]) -> str:
    """One trial in a line."""
    settings = ", ".join(f"{name} {value}" for name, value in trial.settings.items() if value not in ("none", "auto"))
    if trial.state != "complete":
        return f"{settings}: {trial.state}: {trial.reason}"
    values = ", ".join(
        f"{name} {value:,.6g}" if (value := trial.values.get(name)) is not None else f"{name} unknown"
        for name in objectives
    )
    return f"{settings}: {values}" + (" (misses a constraint)" if trial.meets is False else "")


def _finished_as(trial: Trial) -> tuple[Any, Any]:
    """What becomes of a model after it was pruned: what is looked at first is comparable where this is the same."""
    return trial.settings["recovery"], trial.settings.get("format", HF)


def _made_by(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of a trial's settings decides which pruned or converted model it takes."""
    return {name: value for name, value in settings.items() if name not in ("recovery", "format")}
