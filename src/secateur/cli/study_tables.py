"""What people read of a study: its trials, the best of them, and how to make it"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from secateur.cli.tables import megabytes, number, percent
from secateur.study_result import StudyResult, Trial

ALWAYS = ("perplexity", "accuracy", "sparsity", "bytes_disk")
SHOWN = 40
"""Trials in the table; of more, the best by the first objective."""


def studies(results: Sequence[StudyResult]) -> RenderableType:
    """One study after the other, under their names where there are several."""
    if len(results) == 1:
        return study(results[0])
    parts: list[RenderableType] = []
    for result in results:
        parts += [Text(f"Study {result.name}", style="bold"), study(result), Text()]
    return Group(*parts)


def study(result: StudyResult) -> RenderableType:
    """Baselines and trials, what hopeless and failed ones had, finalists, importances, and the recommendation."""
    columns = list(dict.fromkeys([*result.objectives, *ALWAYS]))
    columns = [name for name in columns if any(trial.values.get(name) is not None for trial in _all(result))]
    parts: list[RenderableType] = [_trials(result, columns), Text()]
    parts += [Text(f"trial {one.number} {one.state}: {one.reason}") for one in result.trials
              if one.state in ("stopped", "failed")][:SHOWN]  # fmt: skip
    if result.finalists:
        parts += [Text("On the test text, measured once:"), _finalists(result), Text()]
    for objective, shares in result.importances.items():
        told = ", ".join(f"{name} {percent(share, 0)}" for name, share in shares.items())
        parts.append(Text(f"What {objective} hangs on: {told}"))
    parts.append(Text(_progress(result)))
    by_number = {trial.number: trial for trial in result.trials}
    if len(result.best) > 1:
        parts += [Text(f"Best in {name}: trial {number}, {with_interval(name, by_number[number])}.")
                  for name, number in result.best.items()]  # fmt: skip
    if result.recommended is not None:
        best = next(trial for trial in result.trials if trial.number == result.recommended)
        parts += [Text(f"Recommended: trial {best.number}, {result.recommended_by}."), Text(best.command)]
        if best.out:
            parts.append(Text(f"Its model: {best.out}"))
    return Group(*parts)


def _all(result: StudyResult) -> list[Trial]:
    return [*result.baselines, *result.trials]


def _trials(result: StudyResult, columns: Sequence[str]) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    for title in ("", "setting", *(name.replace("_", " ") for name in columns), "state"):
        table.add_column(Text(title), justify="left" if title in ("setting", "state") else "right")
    for trial in result.baselines:
        _row(table, trial, trial.name, columns, "baseline")
    shown = result.trials
    if len(shown) > SHOWN:
        shown = sorted(_best_first(result)[:SHOWN], key=lambda trial: trial.number)
    for trial in shown:
        state: str = trial.state
        if trial.state == "complete":
            state = "misses a constraint" if trial.meets is False else "on the front" * (trial.number in result.front)
        _row(table, trial, trial.setting, columns, state)
    return table


def _best_first(result: StudyResult) -> list[Trial]:
    """The front first, then by the first objective; those without a value last."""
    name, way = next(iter(result.objectives.items()))
    sign = 1 if way == "minimize" else -1

    def place(trial: Trial) -> tuple[bool, float]:
        value = trial.values.get(name)
        return trial.number not in result.front, float("inf") if value is None else sign * value

    return sorted(result.trials, key=place)


def _row(table: Table, trial: Trial, title: str, columns: Sequence[str], state: str) -> None:
    cells = [value_of(name, trial.values.get(name)) for name in columns]
    table.add_row(Text(str(trial.number) if trial.number >= 0 else ""), Text(title), *map(Text, cells), Text(state))


def value_of(name: str, value: float | None) -> str:
    """One value with its unit."""
    if value is None:
        return "-"
    if name == "bytes_disk":
        return megabytes(int(value)) or "-"
    if name == "sparsity":
        return percent(value) or "-"
    if "accuracy" in name:
        return percent(value, 1) or "-"
    digits = 0 if abs(value) >= 10_000 else 2 if abs(value) >= 10 else 3
    return number(value, digits) or "-"


def with_interval(name: str, trial: Trial) -> str:
    """One value and its 95 % interval, where it has one."""
    told, ends = value_of(name, trial.values.get(name)), trial.intervals.get(name)
    return told + (f" [{value_of(name, ends[0])}, {value_of(name, ends[1])}]" if ends else "")


def _finalists(result: StudyResult) -> Table:
    quality = "accuracy" if any("accuracy" in trial.values for trial in result.finalists) else "perplexity"
    table = Table(show_edge=False, pad_edge=False)
    shown = [quality, "accuracy_difference"] if quality == "accuracy" else [quality]
    for title in ("", "setting", f"{quality} on test", *(["difference from dense"] if len(shown) > 1 else [])):
        table.add_column(title, justify="left" if title == "setting" else "right")
    for trial in result.baselines:
        if f"test_{quality}" in trial.values:
            table.add_row("", Text(trial.name), with_interval(f"test_{quality}", trial))
    for trial in result.finalists:
        row = [with_interval(name, trial) for name in shown]
        table.add_row(str(trial.number), Text(trial.setting), *row)
    return table


def _progress(result: StudyResult) -> str:
    counts = {state: sum(trial.state == state for trial in result.trials) for state in
              ("complete", "stopped", "failed", "running", "waiting")}  # fmt: skip
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "none yet"
    of = f" of {result.planned}" if result.planned else ""
    seconds = result.spent.get("seconds", 0.0)
    saved = result.spent.get("saved_seconds", 0.0)
    end = "finished" if result.finished else "not finished"
    return (
        f"{len(result.trials)}{of} trials: {told}; {end}; {seconds:,.0f} s, {saved:,.0f} s saved by sharing "
        f"({result.spent.get('shared_models', 0):.0f} models and {result.spent.get('shared_baselines', 0):.0f} "
        "dense measurements taken again)"
    )
