"""What a study file asks for, read and checked before anything is opened"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from secateur.errors import StudyError, UnknownNameError
from secateur.recipe import LOOKED_AT, Recipe
from secateur.study.checks import known, mapping, positive, several, text, whole
from secateur.study.space import KEYS, NONE, Space, read_space
from secateur.study.values import (
    QUALITY,
    Constraint,
    Direction,
    Reach,
    check_constraints,
    parse_constraint,
    read_objectives,
)
from secateur.training import Training

BUILTIN = {"paper": "paper.yaml"}
"""Studies that come with the library."""
SAMPLERS = ("grid", "tpe", "nsga2")
BASELINES = ("bfloat16", "q8_0", "q4_0")
"""What can be measured beside the dense model: other number formats, the last two as files of llama.cpp."""
SINGLE = ("targets", "ignore", "overrides", "refit", "error_correction", "allocation_options")
"""Fields of a recipe that mean something only where single weights go."""
FIXED = (*SINGLE, "round_to", "update", "depth_by", "device", "compute_dtype", "activation_memory")
"""Fields of a recipe that a study can fix beside those that it can vary."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """The texts of a study. Each is ``builtin``, a file or a dataset, as `secateur prune --calibration` takes it."""

    calibration: str = "builtin"
    """Text that methods see, and recovery learns from unless it names its own."""
    choice: str = "builtin"
    """Text that settings are compared on."""
    test: str = "builtin"
    """Text that the finalists are measured on, once. When it is the same as choice, each takes one half of it."""
    samples: int = 16
    """Calibration windows."""
    sequence_length: int | None = None
    """Tokens in a window (1024, never more than the model's)."""
    windows: int = 12
    """Windows of choice, and of test, when the text has as many."""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """When a trial is given up after pruning."""

    evaluate: int = 2
    """Windows of the choice text that are looked at first."""
    factor: float = 3.0
    """How many times worse it must be there than what it would have to beat."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one trial takes on a Ray cluster."""

    cpus: float = 1
    gpus: float = 0
    memory: str | None = None
    """Such as 4GB; None asks for none."""


@dataclass(frozen=True, kw_only=True)
class StudySpec:
    """A study: what is searched, by what it is judged, and how long it may take."""

    name: str
    model: str
    storage: Path
    out: Path
    spaces: tuple[Space, ...]
    raw_space: Any
    """The space as it was written."""
    objectives: Mapping[str, Direction]
    constraints: tuple[Constraint, ...] = ()
    data: Data = field(default_factory=Data)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    trials: int | None = None
    minutes: float | None = None
    sampler: Literal["grid", "tpe", "nsga2"] = "grid"
    seed: int = 0
    stop: Stop | None = None
    finalists: int = 5
    baselines: tuple[str, ...] = ()
    keep: Literal["finalists", "all"] = "finalists"
    resources: Resources = field(default_factory=Resources)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a storage file to belong to this study. The budget is not among it."""
        return {
            "name": self.name,
            "model": self.model,
            "data": dataclasses.asdict(self.data),
            "space": self.raw_space,
            "fixed": dict(self.fixed),
            "objectives": dict(self.objectives),
            "constraints": [one.text for one in self.constraints],
            "sampler": self.sampler,
            "seed": self.seed,
            "stop": None if self.stop is None else dataclasses.asdict(self.stop),
        }

    @property
    def wanted(self) -> set[str]:
        """Quantities that an objective or a constraint asks for."""
        return {*self.objectives, *(one.name for one in self.constraints)}

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every setting once, space after space."""
        seen: set[str] = set()
        for space in self.spaces:
            for settings in space.grid():
                if (key := str(sorted(settings.items()))) not in seen:
                    seen.add(key)
                    yield settings

    @property
    def skipped(self) -> int:
        """Combinations of the grid that are no trials: they cannot go together, or are the same as another."""
        return sum(space.combinations for space in self.spaces) - sum(1 for _ in self.grid())

    def recipe(self, settings: Mapping[str, Any], sequence_length: int | None = None) -> Recipe:
        """The recipe of `secateur prune` for one setting.

        Raises:
            SecateurError: when it cannot be run.
        """
        structure = settings["structure"]
        values: dict[str, Any] = {
            "calibration": self.data.calibration, "samples": self.data.samples, "sequence_length": sequence_length,
            "seed": self.seed,
        }  # fmt: skip
        values |= {key: settings[key] for key in ("sparsity", "pattern", "allocation", "dtype") if key in settings}
        if structure != NONE:
            values["structure"] = structure
        method = settings.get("method", "auto")
        if method != "auto":
            values["method"] = method
            prefix = f"{method}."
            values["method_options"] = {
                name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)
            }
        values |= {key: value for key, value in self.fixed.items() if _means_something(key, structure)}
        return Recipe.from_dict(values, where="study")

    def training(self, settings: Mapping[str, Any]) -> Training | None:
        """The settings of `secateur recover` for one setting; None without recovery."""
        for space in self.spaces:
            if settings["recovery"] in space.recoveries:
                fields = space.recoveries[settings["recovery"]]
                if fields is None:
                    return None
                data = {"data": self.data.calibration, "seed": self.seed, "device": self.fixed.get("device", "auto")}
                return Training.from_dict({**data, **fields})
        raise KeyError(settings["recovery"])

    @property
    def training_texts(self) -> list[str]:
        """Everything that a trial may learn from, besides the calibration text."""
        named = {str(fields["data"]) for space in self.spaces for fields in space.recoveries.values()
                 if fields and "data" in fields}  # fmt: skip
        return sorted(named - {self.data.calibration})


_KEYS = ("name", "model", "storage", "out", "data", "space", "fixed", "objectives", "constraints", "budget", "sampler",
         "seed", "stop", "finalists", "baselines", "keep", "resources")  # fmt: skip


def load_study(file: str | Path) -> StudySpec:
    """Read and check a study file, or one that comes with the library by its name.

    Raises:
        StudyError: when it cannot be read, or asks for what makes no sense.
        UnknownNameError: for an unknown key or name; the nearest is suggested.
    """
    if str(file) in BUILTIN:
        path = Path(__file__).with_name(BUILTIN[str(file)])
        return read_study(_parsed(path), Path.cwd(), str(path))
    path = Path(file).expanduser()
    if not path.is_file() and path.suffix not in (".yaml", ".yml"):
        raise UnknownNameError("study", str(file), [*BUILTIN, "a .yaml file"])
    return read_study(_parsed(path), path.resolve().parent, str(file))


def _parsed(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(f"no study file {path}", hint="check the path") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StudyError(f"{path} is not a readable YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(data, Mapping):
        raise StudyError(f"{path} holds no keys and values", hint="for example: model: demo")
    return data


def read_study(data: Mapping[str, Any], folder: Path, where: str) -> StudySpec:
    """A study out of plain data.

    Args:
        folder: what relative paths start from.

    Raises:
        StudyError: when it asks for what makes no sense, or when no trial can meet its constraints.
        UnknownNameError: for an unknown key or name; the nearest is suggested.
    """
    values = known(data, _KEYS, where)
    name = text(values.get("name", Path(where).stem), f"{where}: name")
    if not name.strip() or Path(name).name != name:
        raise StudyError(f"{where}: name is '{name}'", hint="give a name that can be a file name, such as sweep")
    if "model" not in values or "space" not in values:
        raise StudyError(f"{where}: {'model' if 'model' not in values else 'space'} is missing",
                         hint="a study needs model, space and objectives")  # fmt: skip
    fixed = {key.replace("-", "_"): value for key, value in mapping(values.get("fixed"), f"{where}: fixed").items()}
    spaces = _spaces(values["space"], fixed, where)
    sampler = values.get("sampler", "grid")
    if sampler not in SAMPLERS:
        raise UnknownNameError("sampler", str(sampler), SAMPLERS)
    if sampler != "grid" and len(spaces) > 1:
        raise StudyError(f"{where}: sampler {sampler} takes one space, not {len(spaces)}", hint="use sampler: grid")
    objectives = read_objectives(values.get("objectives"))
    constraints = tuple(map(parse_constraint, several(values.get("constraints", []), f"{where}: constraints")))
    budget = known(mapping(values.get("budget"), f"{where}: budget"), ("trials", "minutes"), f"{where}: budget")
    trials = whole(budget["trials"], f"{where}: budget: trials", 1) if "trials" in budget else None
    minutes = positive(budget["minutes"], f"{where}: budget: minutes") if "minutes" in budget else None
    if sampler != "grid" and trials is None and minutes is None:
        raise StudyError(f"{where}: sampler {sampler} never ends by itself", hint="give budget: {trials: 40}")
    keep = values.get("keep", "finalists")
    if keep not in ("finalists", "all"):
        raise UnknownNameError("value of keep", str(keep), ("finalists", "all"))
    baselines = tuple(map(str, several(values.get("baselines", []), f"{where}: baselines")))
    for one in baselines:
        if one not in BASELINES:
            raise UnknownNameError("baseline", one, BASELINES)
    spec = StudySpec(
        name=name, model=_place(text(values["model"], f"{where}: model"), folder),
        storage=folder / text(values.get("storage", f"{name}.db"), f"{where}: storage"),
        out=folder / text(values.get("out", name), f"{where}: out"), spaces=spaces, raw_space=values["space"],
        objectives=objectives, constraints=constraints, data=_data(values.get("data"), folder, where), fixed=fixed,
        trials=trials, minutes=minutes, sampler=sampler, seed=whole(values.get("seed", 0), f"{where}: seed", 0),
        stop=_stop(values, objectives, constraints, where), baselines=baselines, keep=keep,
        finalists=whole(values.get("finalists", 5), f"{where}: finalists", 1),
        resources=_resources(values.get("resources"), where),
    )  # fmt: skip
    _check(spec, where)
    return spec


def _check(spec: StudySpec, where: str) -> None:
    """Refuse what can be refused without opening anything."""
    low = min(space.sparsities[0] for space in spec.spaces)
    high = max(space.sparsities[1] for space in spec.spaces)
    check_constraints(spec.constraints, {"sparsity": Reach(low, high, "by the sparsities of the space")}, {})
    if spec.out == spec.storage or spec.storage.is_dir():
        raise StudyError(f"{where}: storage {spec.storage} is a folder", hint="give a file, such as study.db")
    if spec.stop is not None and spec.stop.evaluate > spec.data.windows:
        raise StudyError(
            f"{where}: stop looks at {spec.stop.evaluate} windows first, and data has {spec.data.windows} in all",
            hint="give stop: evaluate a smaller number",
        )
    structures = {name for space in spec.spaces for name in space.structures}
    for key in spec.fixed:
        if key not in KEYS and not any(_means_something(key, structure) for structure in structures):
            raise StudyError(f"{where}: fixed {key} has no meaning with structure {', '.join(sorted(structures))}",
                             hint="leave it out")  # fmt: skip
    for space in spec.spaces:
        if spec.sampler == "grid":
            _ = space.combinations  # a range without a step is refused
        for settings in space.grid() if spec.sampler == "grid" else _corners(space):
            spec.recipe(settings)  # a Recipe refuses what cannot be run


def _means_something(key: str, structure: str) -> bool:
    """Whether a fixed field is looked at where this structure goes; those that can be varied come with the space."""
    names = {*structure.split(",")}
    if key in LOOKED_AT:
        return bool(names & {*LOOKED_AT[key]})
    return key in FIXED and {**dict.fromkeys(SINGLE, structure == NONE), "depth_by": "depth" in names}.get(key, True)


def _corners(space: Space) -> Iterator[dict[str, Any]]:
    """Settings that together have every value of every list, and the ends of the ranges."""
    for name in ("structure", "method", "unit_method", "pattern", "sparsity"):
        for at in range(64):
            hit = [False]

            def choose(key: str, values: Any, name: str = name, at: int = at, hit: list[bool] = hit) -> Any:
                ends = values.choices or values.span
                if key == name and at < len(ends):
                    hit[0] = True
                    return ends[at]
                return ends[0]

            settings = space.draw(choose)
            if not hit[0]:
                break
            yield settings


def _spaces(data: Any, fixed: dict[str, Any], where: str) -> tuple[Space, ...]:
    for key in fixed:
        if key not in (*KEYS, *FIXED):
            raise UnknownNameError("key of fixed", key, (*KEYS, *FIXED))
    given = {key: value for key, value in fixed.items() if key in KEYS and key not in ("recovery", "method_options")}
    if given.get("structure") == NONE:
        given.pop("structure")
    Recipe.from_dict(given, where=f"{where}: fixed")
    several = data if isinstance(data, list) else [data]
    if not several:
        raise StudyError(f"{where}: space is empty", hint="for example: space: {sparsity: [0.3, 0.5, 0.7]}")
    spaces = []
    for number, one in enumerate(several):
        title = "space" if len(several) == 1 else f"space {number + 1}"
        if not isinstance(one, Mapping):
            raise StudyError(f"{where}: {title} is {one!r}", hint="for example: space: {sparsity: [0.3, 0.5, 0.7]}")
        named = {str(key).replace("-", "_") for key in one}
        for key in fixed:
            if key in named:
                raise StudyError(f"{where}: {key} is fixed and in {title}", hint="leave it out of one of the two")
        if not named and not any(key in KEYS for key in fixed):
            raise StudyError(f"{where}: {title} is empty", hint="for example: space: {sparsity: [0.3, 0.5, 0.7]}")
        spaces.append(read_space({**one, **{key: fixed[key] for key in KEYS if key in fixed}}, f"{where}: {title}"))
    return tuple(spaces)


def _data(value: Any, folder: Path, where: str) -> Data:
    names = [entry.name for entry in dataclasses.fields(Data)]
    given = known(mapping(value, f"{where}: data"), names, f"{where}: data")
    found: dict[str, Any] = {}
    for key, one in given.items():
        if key in ("calibration", "choice", "test"):
            found[key] = _place(text(one, f"{where}: data: {key}"), folder)
        elif one is not None or key != "sequence_length":
            found[key] = whole(one, f"{where}: data: {key}", 2 if key == "sequence_length" else 1)
    return Data(**found)


def _stop(
    values: Mapping[str, Any], objectives: Mapping[str, str], constraints: Sequence[Constraint], where: str
) -> Stop | None:
    if values.get("stop") is None:
        return None
    given = known(mapping(values["stop"], f"{where}: stop"), ("evaluate", "factor"), f"{where}: stop")
    if not any(name in QUALITY for name in [*objectives, *(one.name for one in constraints if one.at_most)]):
        raise StudyError(
            f"{where}: stop needs perplexity among the objectives or constraints",
            hint="leave stop out: nothing that is asked for can be foreseen from a few windows",
        )
    found: dict[str, Any] = {}
    if "evaluate" in given:
        found["evaluate"] = whole(given["evaluate"], f"{where}: stop: evaluate", 1)
    if "factor" in given:
        found["factor"] = positive(given["factor"], f"{where}: stop: factor")
        if found["factor"] < 1:
            raise StudyError(f"{where}: stop: factor is {found['factor']:g}", hint="it must be at least 1")
    return Stop(**found)


def _resources(value: Any, where: str) -> Resources:
    given = known(mapping(value, f"{where}: resources"), ("cpus", "gpus", "memory"), f"{where}: resources")
    for key in ("cpus", "gpus"):
        if key in given and (isinstance(given[key], bool) or not isinstance(given[key], int | float) or given[key] < 0):
            raise StudyError(f"{where}: resources: {key} is {given[key]!r}", hint="it must be a number, at least 0")
    from secateur.budgets import parse_size

    if given.get("memory") is not None and not parse_size(str(given["memory"])):
        raise StudyError(f"{where}: resources: memory is {given['memory']!r}", hint="give a size such as 4GB")
    return Resources(**given)


def _place(text: str, folder: Path) -> str:
    """A file or folder beside the study file as a full path; any other name as it is."""
    if text in ("builtin", "demo", "demo-encoder"):
        return text
    try:
        path = folder / Path(text).expanduser()
        return str(path.resolve()) if path.exists() else text
    except OSError:
        return text
