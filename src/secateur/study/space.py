"""The space of a study: lists and ranges of settings, and how one setting is drawn so that it can be a trial"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import StudyError, UnknownNameError
from secateur.patterns import check_sparsity, parse_pattern
from secateur.plugins import available, describe, statistics_of
from secateur.recipe import RECONSTRUCTED, STRUCTURES, Recipe
from secateur.study.conversion import Conversion, read_conversions
from secateur.study.recoveries import NONE, read_recoveries
from secateur.study.storing import read_formats

WEIGHTS = ("pattern", "allocation", "refit", "error_correction", "reconstruct")
"""What has a meaning only where single weights go."""
CONVERT = "convert"
BESIDE = (CONVERT, "dtype", "recovery")
"""What a space of conversions can vary."""
KEYS = ("method", "sparsity", *WEIGHTS, "structure", "method_options", "format", *BESIDE)
"""What a space can vary."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_SPARSITIES = (0.5,)


@dataclass(frozen=True)
class Values:
    """The values that one setting may take: some of a list, or all numbers of a range."""

    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None

    @property
    def is_range(self) -> bool:
        return not self.choices

    @property
    def listed(self) -> tuple[Any, ...]:
        """All of them.

        Raises:
            StudyError: for a range without a step.
        """
        if self.choices:
            return self.choices
        if self.step is None:
            raise StudyError(
                f"a grid has no end of values between {self.low:g} and {self.high:g}",
                hint="give the range a step, or use sampler: tpe",
            )
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return tuple(round(self.low + index * self.step, 10) for index in range(count))

    @property
    def span(self) -> tuple[float, float]:
        """The least and the largest."""
        return (min(self.choices), max(self.choices)) if self.choices else (self.low, self.high)


Choose = Callable[[str, Values], Any]
"""Takes the name of a setting and its values, and says which it is."""


@dataclass(frozen=True)
class Space:
    """Settings that may be combined. What cannot go together is never drawn together."""

    methods: tuple[str, ...] = ()
    sparsity: Values = Values(DEFAULT_SPARSITIES)
    patterns: tuple[str, ...] = ("unstructured",)
    allocations: tuple[str, ...] = ("uniform",)
    structures: tuple[str, ...] = (NONE,)
    options: Mapping[str, Mapping[str, Values]] = field(default_factory=dict)
    """Method -> its option -> values."""
    recoveries: Mapping[str, Mapping[str, Any] | None] = field(default_factory=lambda: {NONE: None})
    """Label -> fields of `Training`; None for no recovery."""
    dtypes: tuple[str, ...] = ("auto",)
    refits: tuple[bool, ...] = ()
    """Empty leaves it to the method; the same for the next two, which are off then."""
    corrections: tuple[str, ...] = ()
    """Shares of the error correction, as `Recipe` takes them."""
    reconstructs: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    """How models are stored; empty for ordinary folders."""
    conversions: Mapping[str, Conversion] = field(default_factory=dict)
    """By name; where there are any, nothing is pruned, and there are no structures."""

    def methods_for(self, structure: str) -> tuple[str, ...]:
        """The methods of this space that choose what this structure removes; auto where none was named."""
        known = _methods(structure)
        return tuple(name for name in self.methods if name in known) or (("auto",) if known else ())

    def draw(self, choose: Choose) -> dict[str, Any]:
        """One setting: name -> value, of those that mean something together."""
        if self.conversions:
            lists = zip(BESIDE, (self.conversions, self.dtypes, self.recoveries), strict=True)
            return {name: choose(name, Values(tuple(values))) for name, values in lists}
        structure = choose("structure", Values(self.structures))
        settings: dict[str, Any] = {"structure": structure}
        methods = self.methods_for(structure)
        if methods:
            # Weights and units have methods of their own, so these are two parameters to a sampler.
            name = "method" if structure == NONE else "unit_method"
            settings["method"] = method = choose(name, Values(methods))
            for option, values in self.options.get(method, {}).items():
                settings[f"{method}.{option}"] = choose(f"{method}.{option}", values)
        if structure == NONE:
            if self.refits:
                settings["refit"] = choose("refit", Values(self.refits))
            if self.corrections and has_gram(settings["method"], settings.get("refit")):
                settings["error_correction"] = choose("error_correction", Values(self.corrections))
        pattern = "unstructured"
        if structure == NONE:
            settings["pattern"] = pattern = choose("pattern", Values(self.patterns))
        if pattern == "unstructured":
            settings["sparsity"] = choose("sparsity", self.sparsity)
        if structure == NONE:
            settings["allocation"] = choose("allocation", Values(self.allocations))
            if self.reconstructs:
                settings["reconstruct"] = choose("reconstruct", Values(self.reconstructs))
        settings["dtype"] = choose("dtype", Values(self.dtypes))
        # Last, so that a grid tries all recoveries of one pruned model in a row, and can prune it once.
        settings["recovery"] = choose("recovery", Values(tuple(self.recoveries)))
        if self.formats:
            settings["format"] = choose("format", Values(self.formats))
        return settings

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every setting that can be drawn, in the order of the lists."""
        script: list[int] = []
        while True:
            widths: list[int] = []

            def choose(name: str, values: Values, widths: list[int] = widths, script: list[int] = script) -> Any:
                listed = values.listed
                at = script[len(widths)] if len(widths) < len(script) else 0
                widths.append(len(listed))
                return listed[at]

            yield self.draw(choose)
            script += [0] * (len(widths) - len(script))
            while script and script[-1] + 1 >= widths[len(script) - 1]:
                script.pop()
            if not script:
                return
            script[-1] += 1

    @property
    def combinations(self) -> int:
        """How many there would be if everything went with everything."""
        lists: list[tuple[Any, ...]] = [
            self.methods or ("auto",), self.sparsity.listed, self.patterns, self.allocations, self.structures,
            tuple(self.recoveries), self.dtypes, self.refits or (None,), self.corrections or (None,),
            self.reconstructs or (None,), self.formats or (None,),
        ]  # fmt: skip
        if self.conversions:
            lists = [tuple(self.conversions), self.dtypes, tuple(self.recoveries)]
        lists += [values.listed for options in self.options.values() for values in options.values()]
        return math.prod(map(len, lists))

    @property
    def sparsities(self) -> tuple[float, float]:
        """The least and the largest sparsity that can be drawn; anything where zeros stay as they are."""
        if self.conversions:
            return 0.0, 1.0
        implied = [parse_pattern(name).sparsity for name in self.patterns] if NONE in self.structures else []
        ends = [value for value in implied if value is not None]
        if None in implied or set(self.structures) != {NONE}:
            ends += self.sparsity.span
        return min(ends), max(ends)


def has_gram(method: str, refit: bool | None) -> bool:
    """Whether a method of single weights, refitted or not, gathers the Gram matrix that an error correction needs."""
    return bool(refit) or statistics_of(Recipe(method=method).method) == "gram"


@functools.cache
def _methods(structure: str) -> dict[str, str]:
    """What chooses for a structure, by name; nothing where only whole blocks go."""
    names = set(structure.split(","))
    if names == {"depth"}:
        return {}
    if structure == NONE:
        return available("methods") | available("combinations")
    return available("expert_criteria" if "experts" in names else "criteria")


def read_space(data: Mapping[str, Any], where: str, folder: Path = Path()) -> Space:
    """A space out of a study file; ``data`` has lists, ranges or single values by name.

    Args:
        folder: what relative paths start from.

    Raises:
        UnknownNameError: for an unknown key or name; the nearest is suggested.
        StudyError: for a value that makes no sense, or that can never be part of a trial.
    """
    values = {str(key).replace("-", "_"): value for key, value in data.items()}
    for key in values:
        if key not in KEYS:
            raise UnknownNameError(f"key of {where}", key, KEYS)
    if CONVERT in values:
        return _converting(values, where, folder)
    structures = tuple(map(_structure, _listed(values.get("structure", NONE), f"{where}: structure")))
    methods = tuple(map(str, _listed(values.get("method", []), f"{where}: method")))
    every = {name: None for structure in ("none", "ffn", "experts") for name in _methods(structure)}
    for name in methods:
        if name not in every:
            raise UnknownNameError("method", name, every)
        if not any(name in _methods(structure) for structure in structures):
            raise StudyError(
                f"{where}: method {name} can never be a trial with structure {' or '.join(structures)}",
                hint="leave it out; `secateur methods` lists what each is for",
            )
    patterns = tuple(_pattern(one, where) for one in _listed(values.get("pattern", "unstructured"), where))
    allocations = tuple(map(str, _listed(values.get("allocation", "uniform"), f"{where}: allocation")))
    for name in allocations:
        if name not in available("allocation"):
            raise UnknownNameError("allocation", name, available("allocation"))
    if NONE not in structures:
        for key in WEIGHTS:
            if key in values:
                raise StudyError(f"{where}: {key} has no meaning with structure {', '.join(structures)}",
                                 hint="leave it out, or add none to the structures")  # fmt: skip
    dtypes = _dtypes(values, where)
    if "sparsity" in values and set(structures) == {NONE} and "unstructured" not in patterns:
        raise StudyError(f"{where}: sparsity has no meaning with pattern {', '.join(patterns)}", hint="leave it out")
    space = Space(
        methods, _sparsity(values.get("sparsity", list(DEFAULT_SPARSITIES)), where), patterns, allocations, structures,
        _options(values.get("method_options") or {}, methods, where),
        read_recoveries(values.get("recovery", NONE), where), dtypes, _refits(values.get("refit", []), where),
        _corrections(values.get("error_correction", []), where),
        tuple(map(_reconstruct, _listed(values.get("reconstruct", []), f"{where}: reconstruct"))),
        read_formats(_listed(values.get("format", []), f"{where}: format"), structures, where),
    )  # fmt: skip
    _check_corrections(space, where)
    for name, many in (
        ("structure", structures), ("method", methods), ("pattern", patterns), ("refit", space.refits),
        ("error-correction", space.corrections), ("reconstruct", space.reconstructs),
    ):  # fmt: skip
        if len(set(many)) < len(many):
            raise StudyError(f"{where}: {name} names one twice: {', '.join(map(str, many))}")
    return space


def _converting(values: Mapping[str, Any], where: str, folder: Path) -> Space:
    """A space of conversions, in which nothing is pruned."""
    for key in values:
        if key not in BESIDE:
            raise StudyError(
                f"{where}: {key} has no meaning beside convert", hint="give conversions an entry of the space's list"
            )
    return Space(
        structures=(), conversions=read_conversions(values[CONVERT], f"{where}: convert", folder),
        recoveries=read_recoveries(values.get("recovery", NONE), where), dtypes=_dtypes(values, where),
    )  # fmt: skip


def _dtypes(values: Mapping[str, Any], where: str) -> tuple[str, ...]:
    found = tuple(map(str, _listed(values.get("dtype", "auto"), f"{where}: dtype")))
    for name in found:
        if name not in DTYPES:
            raise UnknownNameError("dtype", name, DTYPES)
    if len(set(found)) < len(found):
        raise StudyError(f"{where}: dtype names one twice: {', '.join(found)}")
    return found


def _listed(value: Any, where: str) -> list[Any]:
    listed = value if isinstance(value, list) else [value]
    for one in listed:
        if isinstance(one, dict | list):
            raise StudyError(f"{where} is {one!r}", hint="give a value, or a list of values")
    return [NONE if one is None else one for one in listed]


def _structure(value: Any) -> str:
    name = ",".join(part.strip() for part in str(value).split(","))
    for part in name.split(","):
        if part not in STRUCTURES and name != NONE:
            raise UnknownNameError("structure", part, (*STRUCTURES, NONE))
    return name


def _refits(value: Any, where: str) -> tuple[bool, ...]:
    found = tuple(_listed(value, f"{where}: refit"))
    for one in found:
        if not isinstance(one, bool):
            raise StudyError(f"{where}: refit is {one!r}", hint="give true or false, or leave it out")
    return found


def _corrections(value: Any, where: str) -> tuple[str, ...]:
    found = []
    for one in _listed(value, f"{where}: error-correction"):
        off = one is False or one == NONE  # YAML 1.1 reads off as false
        if isinstance(one, bool) and not off:
            raise StudyError(f"{where}: error-correction is {one!r}", hint="give off, auto, or a share from 0 to 1")
        asked = "off" if off else str(one)
        Recipe(error_correction=asked)  # refuses what is no share
        found.append(asked)
    return tuple(found)


def _reconstruct(value: Any) -> str:
    if value not in RECONSTRUCTED:
        raise UnknownNameError("way to reconstruct", str(value), RECONSTRUCTED)
    return str(value)


def _check_corrections(space: Space, where: str) -> None:
    """Refuse an error correction that some method of the space cannot have, unless there is off for it."""
    if not space.corrections or "off" in space.corrections or NONE not in space.structures:
        return
    for method in space.methods_for(NONE):
        if not all(has_gram(method, refit) for refit in space.refits or (None,)):
            raise StudyError(
                f"{where}: error-correction needs the Gram matrix of the inputs, which {method} does not gather",
                hint="add off to its values, or refit: true, or leave the method out",
            )


def _pattern(value: Any, where: str) -> str:
    if isinstance(value, int):  # YAML 1.1 reads 2:4 as the base-60 number 124
        raise StudyError(f"{where}: pattern is the number {value}", hint='write N:M in quotes: "2:4"')
    return str(parse_pattern(str(value)))


def _sparsity(value: Any, where: str) -> Values:
    found = read_values(value, f"{where}: sparsity")
    for one in found.choices or found.span:
        if isinstance(one, bool) or not isinstance(one, int | float):
            raise StudyError(f"{where}: sparsity is {one!r}", hint="it must be a number in [0, 1)")
        check_sparsity(one, f"{where}: sparsity")
    return Values(tuple(map(float, found.choices)), found.low, found.high, found.step)


def read_values(value: Any, where: str) -> Values:
    """A list, a single value, or a range ``{low: 0.1, high: 0.8, step: 0.1}``.

    Raises:
        StudyError: for an empty list, or a range that is none.
    """
    if not isinstance(value, Mapping):
        listed = tuple(_listed(value, where))
        if not listed:
            raise StudyError(f"{where} is an empty list", hint="give at least one value")
        if len(set(map(repr, listed))) < len(listed):
            raise StudyError(f"{where} names one twice: {', '.join(map(str, listed))}")
        return Values(listed)
    for key in value:
        if key not in ("low", "high", "step"):
            raise UnknownNameError(f"key of a range ({where})", str(key), ("low", "high", "step"))
    ends = [value.get("low"), value.get("high"), value.get("step", 1)]
    if any(isinstance(end, bool) or not isinstance(end, int | float) for end in ends):
        raise StudyError(f"{where} is no range: {dict(value)}", hint="for example {low: 0.1, high: 0.8, step: 0.1}")
    low, high, step = map(float, ends)
    if not low < high or step <= 0:
        raise StudyError(f"{where}: from {low:g} to {high:g} is no range", hint="low must be less than high, step > 0")
    return Values((), low, high, step if "step" in value else None)


def _options(data: Any, methods: tuple[str, ...], where: str) -> dict[str, dict[str, Values]]:
    """Options by method; a method that the space does not name is refused."""
    if not isinstance(data, Mapping) or not all(isinstance(value, Mapping) for value in data.values()):
        raise StudyError(
            f"{where}: method-options is {data!r}",
            hint="for example method-options: {sparsegpt: {damping: [0.01, 0.1]}}",
        )
    found: dict[str, dict[str, Values]] = {}
    for method, options in data.items():
        if method not in methods:
            raise StudyError(
                f"{where}: method-options of {method}, which is none of its methods", hint="add it to method"
            )
        known: set[str] = set()
        asked = Recipe(method=method).method if method in available("combinations") else method
        for kind in ("methods", "criteria", "expert_criteria"):
            if asked in available(kind):
                known |= {option.name for option in describe(kind, asked, "method").options}
        for raw, values in options.items():
            name = str(raw).replace("-", "_")
            if name not in known:
                raise UnknownNameError(f"option of method {method}", str(raw), known or ["(none)"])
            found.setdefault(method, {})[name] = read_values(values, f"{where}: option {name} of {method}")
    return found
