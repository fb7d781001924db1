"""The time of a study: what it took in all its runs, and whether its minutes allow one trial more"""

from __future__ import annotations

import math
import time

from secateur.errors import StudyError
from secateur.study.spec import StudySpec
from secateur.study.store import Store


class Clock:
    """Goes on where the last run of the study has stopped."""

    dense_seconds = 0.0
    """What measuring the dense model's quality takes."""
    timing_seconds = 0.0
    """What measuring the speed of a finalist takes, about."""

    def __init__(self, spec: StudySpec, store: Store) -> None:
        self._spec, self._store = spec, store
        self._started = time.monotonic()
        self._before = float(store.get("spent", {}).get("seconds", 0.0))

    def elapsed(self) -> float:
        """Seconds of all runs."""
        return self._before + time.monotonic() - self._started

    def keep(self) -> None:
        """Write them down."""
        self._store.put("spent", {**self._store.get("spent", {}), "seconds": self.elapsed()})

    def check(self, trials: int) -> None:
        """Refuse a budget in minutes in which nothing could be tried.

        Args:
            trials: how many have ended; a study that has some is not refused any more.

        Raises:
            StudyError: saying how much is needed.
        """
        if self._spec.minutes is None or trials:
            return
        baselines = float(self._store.get("spent", {}).get("baseline_seconds", 0.0))
        # A trial is pruned and measured, and a finalist is measured once more.
        needed = baselines + 3 * self.dense_seconds + self.timing_seconds
        if needed > 60 * self._spec.minutes:
            raise StudyError(
                f"a budget of {self._spec.minutes:g} minutes is too small: the baselines took {baselines / 60:.2g} "
                f"minutes, and with one trial and one finalist at least {needed / 60:.2g} are needed",
                hint=f"give budget: {{minutes: {math.ceil(needed / 60)}}} or more; what was measured is kept",
            )

    def left(self) -> bool:
        """Whether another trial, as long as the others on average, would leave time for the finalists."""
        if self._spec.minutes is None:
            return True
        took = [trial.seconds for trial in self._store.trials() if trial.seconds]
        one = sum(took) / len(took) if took else self.dense_seconds
        finals = self._spec.finalists * (self.dense_seconds + self.timing_seconds)
        return self.elapsed() + one + finals <= 60 * self._spec.minutes
