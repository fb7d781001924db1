"""What a measurement, a trial or a benchmark becomes in a report: values by name, and speeds beside the dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from secateur.bench_result import BenchResult, Quantities
from secateur.pages.fronts import is_quality
from secateur.report_result import ReportModel
from secateur.result import Measured
from secateur.study_result import Trial

SPEEDUPS = {
    "decode_tokens_per_second": "decode_speedup", "sentences_per_second": "sentences_speedup",
    "sentences_per_second_batch_32": "sentences_speedup_batch_32",
}  # fmt: skip
"""Value of a model -> what it is called as a multiple of the dense model's."""
MACHINE = ("bytes_resident", "joules_per_token", "joules_per_thousand_sentences")
"""What is measured beside the speed."""
PLACEMENT_NOISE = 0.03
"""Two processes with the very same file differ by so much; `secateur.measure.compare` says why."""


def measured_values(side: Measured, dense: Measured | None) -> dict[str, float]:
    """Those of one side of a result, with its speed as a multiple of the dense model's."""
    names = ("parameters", "nonzero", "sparsity", "bytes_disk", "perplexity", "nll_per_token", "bytes_resident",
             "decode_tokens_per_second")  # fmt: skip
    values = {name: float(getattr(side, name)) for name in names if getattr(side, name) is not None}
    values.update({f"accuracy, {name}": value for name, value in side.accuracy.items()})
    if side.parameters:
        values["zeros"] = 1 - side.nonzero / side.parameters
    relative_speed(values, {} if dense is None else {"decode_tokens_per_second": dense.decode_tokens_per_second})
    return values


def take_speed(trial: ReportModel, finalist: ReportModel) -> None:
    """What was measured of the running finalist only is true of the trial as well: it is the same model."""
    for name in (*(one for pair in SPEEDUPS.items() for one in pair), *MACHINE):
        if name in finalist.values and name not in trial.values:
            trial.values[name] = finalist.values[name]
            if name in finalist.intervals:
                trial.intervals[name] = finalist.intervals[name]
            if name in finalist.unshown:
                trial.unshown.append(name)


def relative_speed(values: dict[str, float], dense: Mapping[str, float | None]) -> None:
    """Add to the speeds what they are as multiples of the dense model's."""
    for name, title in SPEEDUPS.items():
        own, base = values.get(name), dense.get(name)
        if own is not None and base:
            values[title] = own / base


def dense_on_test(origin: str, dense: Trial) -> ReportModel | None:
    """The dense model as the finalists were measured, beside what does not hang on the text; None for older results."""
    start = "test_"
    values = {name: value for name, value in dense.values.items() if value is not None and not is_quality(name)}
    found = {name.removeprefix(start): values.pop(name) for name in list(values) if name.startswith(start)}
    if not found:
        return None
    ends = {name.removeprefix(start): span for name, span in dense.intervals.items() if name.startswith(start)}
    relative_speed(values, dense.values)
    title = f"{dense.name}, on the test text"
    return ReportModel(title, "dense", origin, {**found, **values}, dense.command, intervals=ends)


def intervals_of(trial: Trial, dense: Mapping[str, float | None]) -> dict[str, list[float]]:
    """Those of a trial, and of its speeds as multiples of the dense model's."""
    found = dict(trial.intervals)
    for name, title in SPEEDUPS.items():
        if name in found and (base := dense.get(name)):
            found[title] = [end / base for end in found[name]]
    return found


def differs(interval: Sequence[float]) -> bool:
    """Whether a speed is beyond noise: its interval, and the placement of two models in memory."""
    return interval[0] > 1 + PLACEMENT_NOISE or interval[1] < 1 - PLACEMENT_NOISE


def unshown_speed(bench: BenchResult, entry: Quantities, dense: Quantities | None) -> list[str]:
    """What a benchmark showed no difference in, between its own model and the dense one."""
    if entry is not bench or dense is None:
        return []
    ratio = bench.ratio.get(dense.label, {})
    speed = ratio.get("decode_tokens_per_second")
    return ["decode_speedup"] if speed is not None and not speed.differs else []


def called(trial: Trial) -> str:
    """Number and settings of a trial, or the name of a baseline."""
    if trial.number < 0:
        return trial.name or f"baseline {trial.number}"
    return f"{trial.number}: {trial.setting}"
