"""The answer: whether pruning pays, which setting to take, and whether quantising alone would do as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from secateur.report_result import MADE, Comparison, ReportModel, ReportResult
from secateur.study_result import StudyResult

_GAINS = (
    ("bytes_disk", "the bytes", "minimize"),
    ("decode_speedup", "the decoding speed", "maximize"),
    ("sentences_speedup", "the speed one sentence at a time", "maximize"),
    ("sentences_speedup_batch_32", "the speed at batch 32", "maximize"),
    ("flops_per_token", "the operations", "minimize"),
    ("joules_per_token", "the energy", "minimize"),
    ("joules_per_thousand_sentences", "the energy", "minimize"),
)


def answer(result: ReportResult, chosen: Sequence[int]) -> None:
    """Write the three sentences, the recommended model and its command into a result with its fronts.

    Args:
        chosen: models that studies recommend; the first one is taken.
    """
    if chosen:
        number: int | None = chosen[0]
        comparison = next(c for c in result.comparisons if number in c.models)
        how = "it is what its study chose"
    else:
        measured = [c for c in result.comparisons if c.quality]
        comparison = max(measured or result.comparisons, key=lambda c: (len(c.fronts), len(c.models)))
        number, how = _choice(comparison, result.models)
    result.recommended = number
    result.command = "" if number is None else result.models[number].command
    result.answer = [
        _pays(result, comparison, number),
        _take(result, comparison, number, how),
        _quantised(result, comparison, number),
    ]


def fastest(found: Sequence[tuple[StudyResult, str, int]], models: Sequence[ReportModel]) -> list[str]:
    """A sentence for each study that asked for speed: what was the fastest of the trials that meet its constraints.

    Args:
        found: the study, a value that is a multiple of the dense model's speed, and the number of the model.
    """
    told: dict[str, list[str]] = {}
    for study, name, number in found:
        model = models[number]
        title = next(title for key, title, _ in _GAINS if key == name)
        met = f" with {' and '.join(study.constraints)}" if study.constraints else ""
        unpruned = [
            other for other in models
            if other.origin == model.origin and other.kind == "quantised" and other.meets is not False
        ]  # fmt: skip
        beside = [
            f"{other.name} without pruning {_times(other, name).removesuffix(',')}"
            for other in unpruned
            if name in other.values
        ]
        told.setdefault(f"Fastest trial of {study.name}{met}", []).append(
            f"{model.name} with {_times(model, name)} {title} of the dense model"
            + (f" ({', '.join(beside)})" if beside else "")
        )
    return [f"{start}: {'; '.join(parts)}." for start, parts in told.items()]


def unmet(study: StudyResult) -> str:
    """A sentence for a study none of whose trials meets its constraints, with what does without pruning; else empty."""
    done = [trial for trial in study.trials if trial.state == "complete"]
    if not (study.constraints and done) or any(trial.meets is not False for trial in done):
        return ""
    others = [trial.name for trial in study.baselines if trial.name != "dense" and trial.meets]
    beside = f"; without pruning {' and '.join(others)} {'does' if len(others) == 1 else 'do'}" if others else ""
    return f"No trial of {study.name} meets {' and '.join(study.constraints)}, of {len(done)} that were tried{beside}."


def _times(model: ReportModel, name: str) -> str:
    """A multiple of the dense model's value, with its interval, and whether it is beyond noise."""
    ends = model.intervals.get(name)
    span = f" [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else ""
    return f"{model.values[name]:.2f} times{span}" + (", no difference shown," if name in model.unshown else "")


def _choice(comparison: Comparison, models: Sequence[ReportModel]) -> tuple[int | None, str]:
    """A model on a front, made of the dense one: the knee of the first front that has one, else the best in quality."""
    for front in comparison.fronts:
        if front.knee is not None and models[front.knee].kind in MADE:
            return front.knee, f"it is the knee of the front of {_axis(front.axis)}"
    on = [n for front in comparison.fronts for n in front.front if models[n].kind in MADE]
    if not on:
        return None, ""
    sign = 1 if comparison.better == "minimize" else -1
    best = min(on, key=lambda n: sign * models[n].values[comparison.quality])
    axes = [_axis(front.axis) for front in comparison.fronts if best in front.front]
    those = f"of the {_candidates(comparison, models)} models that no other betters in {' or '.join(axes)}"
    return best, f"{those}, its quality is the best"


def _axis(name: str) -> str:
    return next(title for key, title, _ in _GAINS if key == name).removeprefix("the ")


def _dense(comparison: Comparison, models: Sequence[ReportModel]) -> ReportModel | None:
    return next((models[n] for n in comparison.models if models[n].kind == "dense"), None)


def _candidates(comparison: Comparison, models: Sequence[ReportModel], both: str = "and") -> str:
    """What was done to the models that could be taken: pruned, converted, or one of the two."""
    kinds = {models[n].kind for n in comparison.models}
    return f" {both} ".join(kind for kind in MADE if kind in kinds) or "pruned"


def _doing(comparison: Comparison, models: Sequence[ReportModel], number: int | None) -> str:
    """What was done to the model that is taken; without one, to all that could be."""
    told = models[number].kind if number is not None else _candidates(comparison, models, "or")
    return told.replace("pruned", "pruning").replace("converted", "converting")


def _pays(result: ReportResult, comparison: Comparison, number: int | None) -> str:
    models, source = result.models, comparison.source
    dense = _dense(comparison, models)
    doing = _doing(comparison, models, number)
    if not comparison.quality:
        return f"Whether {doing} {source} pays is not known: no input measured quality."
    if number is None:
        return (
            f"{doing.capitalize()} {source} does not pay here: no {_candidates(comparison, models, 'or')} model is "
            "better than the others in anything that was measured beside quality."
        )
    gains = _gains(models[number], dense)
    if dense is None:
        return f"Whether {doing} {source} pays is not known: no input has the dense model measured in the same way."
    better = [text for text, good in gains if good]
    if not better:
        why = "what is recommended costs quality and gains nothing measured"
        return f"{doing.capitalize()} {source} does not pay here: {why}."
    return f"{doing.capitalize()} {source} pays if the quality is enough: {', '.join(better)} of the dense model."


def _gains(model: ReportModel, dense: ReportModel | None) -> list[tuple[str, bool]]:
    """What it has of each quantity relative to the dense model, and whether that is better beyond 3 % and noise."""
    found = []
    for name, title, better in _GAINS:
        own, base = model.values.get(name), None if dense is None else dense.values.get(name)
        if "speedup" in name:
            base = 1.0
        if own is not None and base:
            ratio = own / base
            gained = ratio < 0.97 if better == "minimize" else ratio > 1.03
            found.append((f"{ratio:.2f} times {title}", gained and name not in model.unshown))
    return found


def _take(result: ReportResult, comparison: Comparison, number: int | None, how: str) -> str:
    dense = _dense(comparison, result.models)
    if number is None:
        if not comparison.quality:
            return "So no setting is recommended: measure with secateur evaluate, or prune without --no-evaluate."
        return "So keep the dense model, or quantise it." if dense is not None else "So no setting is recommended."
    model = result.models[number]
    told = _quality(model, comparison)
    beside = f" against {_quality(dense, comparison)} of the dense model" if dense is not None else ""
    gained = dense is None or any(good for _, good in _gains(model, dense))
    take = "Take" if gained else "If a pruned model is wanted all the same, take"
    return f"{take} {model.name}: {comparison.quality} {told}{beside}; {how}."


def _quality(model: ReportModel | None, comparison: Comparison) -> str:
    value = None if model is None else model.values.get(comparison.quality)
    return "(not measured)" if value is None else f"{value:.2%}" if comparison.better == "maximize" else f"{value:,.2f}"


def _quantised(result: ReportResult, comparison: Comparison, number: int | None) -> str:
    """Whether a quantised dense model has better quality at no more bytes, and how fast such models are."""
    models = result.models
    known = [
        models[n] for n in comparison.models
        if models[n].kind == "quantised" and comparison.quality in models[n].values and "bytes_disk" in models[n].values
    ]  # fmt: skip
    if not known:
        return (
            "What quantising alone would give is not known: no input has such a baseline measured in the same way "
            "(secateur bench and secateur study measure them)."
        )
    sign = 1 if comparison.better == "minimize" else -1

    def told(model: ReportModel) -> str:
        size = model.values["bytes_disk"] / 1e6
        return f"{model.name} has {comparison.quality} {_quality(model, comparison)} at {size:,.1f} MB"

    smallest = min(known, key=lambda m: (m.values["bytes_disk"], sign * m.values[comparison.quality]))
    own = {} if number is None else models[number].values
    if "bytes_disk" not in own or comparison.quality not in own:
        return f"Quantising alone: {told(smallest)}{_fastest_quantised(known, own)}."
    fitting = [m for m in known if m.values["bytes_disk"] <= own["bytes_disk"]]
    if not fitting:
        size = own["bytes_disk"] / 1e6
        beside = _fastest_quantised(known, own)
        return f"Quantising alone does not come down to its {size:,.1f} MB: {told(smallest)}{beside}."
    best = min(fitting, key=lambda m: sign * m.values[comparison.quality])
    wins = sign * best.values[comparison.quality] < sign * own[comparison.quality]
    word, beside = "better" if wins else "no better", _fastest_quantised(known, own)
    return f"Quantising alone is {word} at no more bytes: {told(best)}{beside}."


def _fastest_quantised(quantised: Sequence[ReportModel], own: Mapping[str, float]) -> str:
    """The fastest of them beside what is recommended: another runtime may count for more than fewer weights."""
    timed = [model for model in quantised if "decode_speedup" in model.values]
    if not timed:
        return ""
    best = max(timed, key=lambda model: model.values["decode_speedup"])
    beside = f", what is recommended {own['decode_speedup']:.1f}" if "decode_speedup" in own else ""
    return f"; {best.name} decodes {best.values['decode_speedup']:.1f} times as fast as the dense model{beside}"
