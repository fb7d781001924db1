"""From the inputs to one result: every model with its values, by source and by how its quality was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.allocation_file import AllocationFile
from secateur.bench_result import BenchResult, Quantities
from secateur.errors import UsageError
from secateur.pages.allocations import of_file, of_result, tell
from secateur.pages.answer import answer, fastest, unmet
from secateur.pages.blocks import block_map, told_gone
from secateur.pages.commands import command_of, settings_of
from secateur.pages.fronts import draw_fronts, is_quality, quality_of
from secateur.pages.inputs import Input, kept_models
from secateur.pages.values import (
    SPEEDUPS,
    called,
    dense_on_test,
    differs,
    intervals_of,
    measured_values,
    relative_speed,
    take_speed,
    unshown_speed,
)
from secateur.report_result import MADE, BlockMap, Comparison, Kind, ReportModel, ReportResult
from secateur.result import ConvertResult, PruneResult, RecoverResult
from secateur.study_result import StudyResult, Trial

MAPS = 6
"""Models whose matrices are drawn."""
_COPIED = (
    "parameters", "nonzero", "bytes_disk", "bytes_resident", "flops_per_token", "sparse_flops_per_token",
    "prefill_tokens_per_second", "decode_tokens_per_second", "decode_tokens_per_second_batch_8",
    "seconds_to_first_token", "joules_per_token", "grams_co2_per_token", "perplexity",
    "bits_per_byte", "efficiency",
)  # fmt: skip
DENSE_FORMATS = ("float32", "torch.float32")


@dataclass
class _Source:
    """The dense model that some inputs started from, and what they call it."""

    title: str
    sha256: str
    names: set[str]
    by_protocol: dict[str, list[int]] = field(default_factory=dict)

    def is_that_of(self, sha256: str, names: set[str]) -> bool:
        if sha256 and self.sha256:
            return sha256 == self.sha256
        return bool(names & self.names)

    def move(self, number: int, protocol: str) -> None:
        """Put a model among those whose quality was measured in that way."""
        for told, members in list(self.by_protocol.items()):
            if number in members:
                members.remove(number)
            if not members:
                del self.by_protocol[told]
        self.by_protocol.setdefault(protocol, []).append(number)


class Collector:
    """Takes inputs one by one; `finish` gives the result without what needs a model."""

    def __init__(self, inputs: Sequence[Input]) -> None:
        self.result = ReportResult([], None, "", [each.name for each in inputs])
        self._sources: list[_Source] = []
        self._chosen: list[int] = []  # what studies recommend
        self._fastest: list[tuple[StudyResult, str, int]] = []
        self._unmet: list[str] = []
        self._sparsity: dict[int, Mapping[str, float]] = {}
        self._folders = {each.folder.resolve(): each for each in inputs if each.folder is not None}
        self._of_folder: dict[Path, int] = {}
        self.kept: list[tuple[str, Path, Mapping[str, Any]]] = []
        """Models that studies kept and nobody gave: name on the page, folder, and what it was made from."""
        order: dict[type, int] = {StudyResult: 1, BenchResult: 2}  # folders first; a benchmark needs to know the rest
        for each in sorted(inputs, key=lambda one: order.get(type(one.result), 0)):
            if isinstance(each.result, StudyResult):
                self._study(each.name, each.result)
            elif isinstance(each.result, BenchResult):
                self._bench(each.name, each.result)
            elif isinstance(each.result, AllocationFile):
                self.result.allocations.append(of_file(each.name, each.path, each.result))
            else:
                self._folder(each, each.result)

    def finish(self) -> ReportResult:
        """Fronts, maps and the answer.

        Raises:
            UsageError: when no input has a model with a measurement, and not all of them are allocations.
        """
        result = self.result
        if result.allocations and not result.models:
            result.answer = tell(result.allocations)
            result.command = result.allocations[0].command if len(result.allocations) == 1 else ""
            return result
        if not any(model.values for model in result.models):
            raise UsageError(
                "nothing to report: no input has a model that was measured", hint="a study needs one complete trial"
            )
        for source in self._sources:
            for protocol, numbers in source.by_protocol.items():
                quality, better = quality_of([result.models[number] for number in numbers])
                comparison = Comparison(source.title, protocol, quality, better, numbers)
                draw_fronts(comparison, result.models)
                result.comparisons.append(comparison)
        if len(self._sources) > 1:
            titles = ", ".join(source.title for source in self._sources)
            result.warnings.append(f"the inputs started from {len(self._sources)} models ({titles}): no front has two")
        if any(sum(" test: " not in told for told in source.by_protocol) > 1 for source in self._sources):
            result.warnings.append("quality was measured in more than one way: only equal ways are drawn on one front")
        answer(result, self._chosen)
        result.answer += fastest(self._fastest, result.models) + self._unmet
        self._draw_maps()
        return result

    def _draw_maps(self) -> None:
        """Of folders, of what is recommended, of finalists and of the ends and knees of fronts, `MAPS` at most."""
        result = self.result
        wanted = [*self._of_folder.values(), *([] if result.recommended is None else [result.recommended])]
        wanted += [n for c in result.comparisons for f in c.fronts for n in (f.knee, *f.front) if n is not None]
        numbers = [number for number in dict.fromkeys(wanted) if self._sparsity.get(number)]
        drawn = {each.model for each in result.maps}
        for number in numbers:
            if len(result.maps) < MAPS and result.models[number].name not in drawn:
                result.maps.append(block_map(result.models[number].name, self._sparsity[number]))
        result.undrawn = max(0, len(numbers) - len(result.maps))

    def _source(self, title: str, sha256: str, names: set[str]) -> _Source:
        for source in self._sources:
            if source.is_that_of(sha256, names):
                source.names |= names
                source.sha256 = source.sha256 or sha256
                return source
        self._sources.append(_Source(title, sha256, names))
        return self._sources[-1]

    def _add(self, source: _Source, protocol: str, model: ReportModel) -> int:
        """Enter a model; one with the same values and the same kind stands there once (the dense one, usually)."""
        members = source.by_protocol.setdefault(protocol, [])
        for number in members:
            other = self.result.models[number]
            if model.kind == other.kind == "dense" and _agree(model.values, other.values):
                other.values = {**model.values, **other.values}
                return number
        taken = {other.name for other in self.result.models}
        name, count = model.name, 2
        while model.name in taken:
            model.name, count = f"{name} ({count})", count + 1
        self.result.models.append(model)
        members.append(len(self.result.models) - 1)
        return members[-1]

    def _folder(self, each: Input, found: PruneResult | RecoverResult | ConvertResult) -> None:
        told = found.source
        title = str(told.get("name") or told.get("model") or "the dense model")
        source = self._source(title, str(told.get("sha256") or ""), _names(str(told.get("model") or "")))
        quality = found.protocol.get("quality")
        protocol = str(quality.get("perplexity") or quality) if isinstance(quality, dict) and quality else ""
        recovered = isinstance(found, RecoverResult)
        dense = found.teacher if isinstance(found, RecoverResult) else found.before
        if dense is not None:
            self._add(
                source, protocol, ReportModel(f"{title} (dense)", "dense", each.name, measured_values(dense, dense))
            )
        trained = found.student.get("conversion") if isinstance(found, RecoverResult) else None
        converted = isinstance(found, ConvertResult) or bool(trained)
        model = ReportModel(
            each.name, "converted" if converted else "pruned", each.name,
            measured_values(found.after, dense), command_of(found, each.name), settings_of(found),
        )  # fmt: skip
        model.values["seconds"] = found.seconds
        if "perplexity" not in model.values and not found.after.accuracy:
            model.missing["perplexity"] = "it was not measured when the model was made"
        number = self._add(source, protocol, model)
        assert each.folder is not None
        self._of_folder[each.folder.resolve()] = number
        if isinstance(found, PruneResult):
            self._sparsity[number] = {matrix.name: matrix.sparsity for matrix in found.matrices}
            self.result.maps.append(_map(model.name, found))
            asked = of_result(model.name, found)
            self.result.allocations += [asked] if asked is not None else []
        self._tell(each.name, found.verdict, found.warnings, found.versions, {})
        if not found.verified:
            why = "was not verified" if recovered or not found.verification else "did not pass its verification"
            self.result.warnings.append(f"{each.name}: the model {why}")

    def _study(self, name: str, study: StudyResult) -> None:
        source = self._source(study.model, "", _names(study.model))
        protocol = f"study {study.name}: {study.data.get('choice') or 'the text of its choice'}"
        dense = study.baselines[0].values if study.baselines else {}
        numbers = {}
        for kind, trials in (("baseline", study.baselines), ("trial", study.trials)):
            for trial in trials:
                if trial.state == "complete":
                    model = self._trial(name, trial, dense, baseline=kind == "baseline")
                    numbers[trial.number] = self._add(source, protocol, model)
                    self._sparsity[numbers[trial.number]] = trial.sparsity
                elif trial.state in ("failed", "stopped"):
                    self.result.failures.append(
                        {"origin": name, "trial": called(trial), "state": trial.state, "reason": trial.reason}
                    )
        tested = f"study {study.name}, test: {study.data.get('test') or 'its test text'}"
        if study.finalists and study.baselines and (beside := dense_on_test(name, study.baselines[0])) is not None:
            self._add(source, tested, beside)
        for trial in study.finalists:
            model = self._trial(name, trial, dense, baseline=trial.number < 0)
            if trial.number in numbers:  # measured anew were the quality, and the speed where no trial had it
                known = self.result.models[numbers[trial.number]]
                model.values = {**{k: v for k, v in known.values.items() if not is_quality(k)}, **model.values}
                take_speed(known, model)
            model.name += ", on the test text"
            self._add(source, tested, model)
        for kept in kept_models(study):
            number = numbers.get(kept.number)
            if number is None or kept.folder.resolve() in self._folders:
                continue
            named = self.result.models[number].name
            if "accuracy" not in dense:  # a classifier continues no text
                self.kept.append((named, kept.folder, kept.source))
            if isinstance(kept.made, PruneResult) and self._sparsity[number]:
                self.result.maps.append(_map(named, kept.made))
        self._fastest += [
            (study, title, numbers[study.best[name]])
            for name, title in SPEEDUPS.items()
            if study.best.get(name) in numbers
        ]
        self._unmet += [said] if (said := unmet(study)) else []
        if study.recommended in numbers:
            self._chosen.append(numbers[study.recommended])
        elif study.recommended is not None:
            self.result.warnings.append(f"{name} recommends trial {study.recommended}, which is not complete in it")
        if study.importances:
            self.result.importances[name] = study.importances
        if not study.finished:
            done = sum(trial.state == "complete" for trial in study.trials)
            self.result.warnings.append(f"{name} is not finished: {done} trials are complete so far")
        self._tell(name, [], study.warnings, study.versions, study.machine)

    def _trial(self, origin: str, trial: Trial, dense: Mapping[str, float | None], *, baseline: bool) -> ReportModel:
        kind: Kind = "converted" if "convert" in trial.settings else "pruned"
        if baseline:
            kind = "dense" if trial.name == "dense" else "quantised"
        values = {name: value for name, value in trial.values.items() if value is not None}
        relative_speed(values, dense)
        if trial.seconds is not None:
            values.setdefault("seconds", trial.seconds)
        intervals = intervals_of(trial, dense)
        unshown = [name for name in SPEEDUPS.values() if name in intervals and not differs(intervals[name])]
        return ReportModel(
            called(trial), kind, origin, values, trial.command, dict(trial.settings), trial.meets,
            dict(trial.missing), unshown, intervals,
        )  # fmt: skip

    def _bench(self, name: str, bench: BenchResult) -> None:
        entries: list[Quantities] = [bench, *bench.against]
        source = self._bench_source(entries)
        dense = next((e for e in entries if _names(e.name) & source.names and e.format in DENSE_FORMATS), None)
        protocol = str(bench.protocol.get("perplexity") or f"the text of {name}")
        for entry in entries:
            place = _place(entry.name)
            kind: Kind = "other"
            if place in self._of_folder:
                kind = self.result.models[self._of_folder[place]].kind
            elif _names(entry.name) & source.names:
                kind = "dense" if entry is dense else "quantised"
            elif dense is not None and entry.packed and entry.parameters == dense.parameters:
                kind = "quantised" if entry.format.startswith("dense ") else "pruned"
            values = {key: float(getattr(entry, key)) for key in _COPIED if getattr(entry, key) is not None}
            if entry.parameters and entry.nonzero is not None:
                values["zeros"] = 1 - entry.nonzero / entry.parameters
            relative_speed(
                values, {} if dense is None else {"decode_tokens_per_second": dense.decode_tokens_per_second}
            )
            unshown = unshown_speed(bench, entry, dense)
            known = self._known(entry, kind, place, source)
            if known is not None:  # the same model: what the folder does not know is added to it
                own = self.result.models[known]
                unmeasured = not quality_of([own])[0]
                own.values = {**{k: v for k, v in values.items() if not is_quality(k)}, **own.values}
                own.missing = {**entry.missing, **own.missing}
                own.unshown = unshown
                if unmeasured and "perplexity" in values:  # what nobody had measured is measured here
                    own.values |= {k: v for k, v in values.items() if is_quality(k)}
                    own.missing.pop("perplexity", None)
                    source.move(known, protocol)
                    continue
            if known is None or "perplexity" in values:
                title = f"{Path(entry.name).name or entry.name}, {entry.format}, {entry.runtime}"
                self._add(
                    source,
                    protocol,
                    ReportModel(title, kind, name, values, missing=dict(entry.missing), unshown=unshown),
                )
        self._tell(name, bench.verdict, [], bench.versions, bench.machine)

    def _bench_source(self, entries: Sequence[Quantities]) -> _Source:
        """The source of the first entry that is known, as a folder that is given too or as a source; else a new one."""
        for entry in entries:
            place = _place(entry.name)
            number = None if place is None else self._of_folder.get(place)
            for source in self._sources:
                inside = number is not None and any(number in members for members in source.by_protocol.values())
                if inside or _names(entry.name) & source.names:
                    return source
        last = entries[-1] if len(entries) > 1 else entries[0]  # usually bench PRUNED --against DENSE
        return self._source(last.name, "", _names(last.name))

    def _known(self, entry: Quantities, kind: Kind, place: Path | None, source: _Source) -> int | None:
        if entry.runtime != "transformers":
            return None
        if kind in MADE and place is not None:
            return self._of_folder.get(place)
        if kind == "dense":
            numbers = (number for members in source.by_protocol.values() for number in members)
            return next((number for number in numbers if self.result.models[number].kind == "dense"), None)
        return None

    def _tell(
        self, name: str, verdict: list[str], warnings: Iterable[str], versions: dict[str, str], machine: dict[str, Any]
    ) -> None:
        if verdict:
            self.result.verdicts[name] = verdict
        self.result.warnings += [f"{name}: {text}" for text in warnings]
        if machine:
            self.result.machines[name] = machine
        for library, version in versions.items():
            if self.result.versions.setdefault(library, version) != version:
                self.result.warnings.append(
                    f"{name} was made with {library} {version}, others with {self.result.versions[library]}"
                )


def _map(name: str, made: PruneResult) -> BlockMap:
    losses = {matrix.name: matrix.loss for matrix in made.matrices if matrix.loss is not None}
    drawn = block_map(name, {matrix.name: matrix.sparsity for matrix in made.matrices}, losses)
    drawn.gone = told_gone(made)
    return drawn


def _place(model: str) -> Path | None:
    """Where a model would lie if its name is a path; None for a name that cannot be one."""
    try:
        place = Path(model).expanduser().resolve()
        place.exists()  # refuses what is too long
        return place
    except (ValueError, OSError, RuntimeError):
        return None


def _names(model: str) -> set[str]:
    """What a model may be called elsewhere: as it is, and as a path."""
    place = _place(model) if model else None
    if place is not None and ("/" in model or place.exists()):
        return {model, str(place)}
    return {model} if model else set()


def _agree(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether two measurements of the dense model can be one: speeds differ from run to run and do not count."""
    keys = ("perplexity", "accuracy", "bytes_disk", "parameters")
    return all(one[key] == other[key] for key in keys if key in one and key in other)
