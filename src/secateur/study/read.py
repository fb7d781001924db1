"""Reads a study file and refuses, before anything is opened, what makes no sense"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.corpus.examples import divided
from secateur.errors import StudyError, UnknownNameError
from secateur.recipe import Recipe
from secateur.study.checks import full_path, known, mapping, positive, several, text, whole
from secateur.study.conversion import unfit_for
from secateur.study.recoveries import NONE, read_training
from secateur.study.space import CONVERT, KEYS, Space, read_space
from secateur.study.spec import FIXED, Data, Resources, Stop, StudySpec, looked_at, means_something
from secateur.study.storing import TORCHAO
from secateur.study.values import (
    QUALITY,
    TASKS,
    Constraint,
    Reach,
    Task,
    check_constraints,
    parse_constraint,
    read_objectives,
)

BUILTIN = {"paper": "paper.yaml", "classifier": "classifier.yaml"}
"""Studies that come with the library."""
SAMPLERS = ("grid", "tpe", "nsga2")
LLAMA_CPP = ("q8_0", "q4_0")
BASELINES = ("bfloat16", TORCHAO, *LLAMA_CPP)
"""What can be measured beside the dense model: other number formats, the last two as files of llama.cpp."""
ACCURACY = Reach(0.0, 1.0, "a share of the texts")
LOOKED_AT: dict[Task, int] = {"language": 2, "labels": 128}
"""Windows or labelled texts after which a trial can be given up, unless the study says otherwise."""
_KEYS = ("name", "model", "task", "fine_tune", "storage", "out", "data", "space", "fixed", "objectives", "constraints",
         "budget", "sampler", "seed", "stop", "finalists", "speed", "baselines", "keep", "resources")  # fmt: skip


def is_file_of_study(name: str | Path) -> bool:
    """Whether a name is that of a study file, or of a study that comes with the library, and not of a storage."""
    return str(name) in BUILTIN or Path(name).suffix in (".yaml", ".yml")


def storages_of(study: str | Path) -> list[Path]:
    """The storages of a study file, of several models those that were begun; or the storage that was given.

    Raises:
        SecateurError: for a study file that cannot be read or makes no sense.
    """
    if not is_file_of_study(study):
        return [Path(study).expanduser()]
    storages = [spec.storage for spec in load_studies(study)]
    return [path for path in storages if path.is_file()] or storages[:1]


def load_study(file: str | Path, *, source: str | Path | None = None) -> StudySpec:
    """Read and check a study file of one model; see `load_studies`.

    Raises:
        StudyError: as there, and for a file that names several models.
    """
    found = load_studies(file, source=source)
    if len(found) > 1:
        raise StudyError(
            f"{file} names {len(found)} models, each of which is a study of its own",
            hint="take one of secateur.study.load_studies",
        )
    return found[0]


def load_studies(file: str | Path, *, source: str | Path | None = None) -> list[StudySpec]:
    """Read and check a study file, or one that comes with the library by its name: a study for each of its models.

    Args:
        source: where labelled texts are, instead of what the file says: a folder or a dataset.

    Raises:
        StudyError: when it cannot be read, or asks for what makes no sense.
        UnknownNameError: for an unknown key or name; the nearest is suggested.
    """
    if str(file) in BUILTIN:
        path = Path(__file__).with_name(BUILTIN[str(file)])
        folder, where = Path.cwd(), str(path)
    else:
        path = Path(file).expanduser()
        if not path.is_file() and path.suffix not in (".yaml", ".yml"):
            raise UnknownNameError("study", str(file), [*BUILTIN, "a .yaml file"])
        folder, where = path.resolve().parent, str(file)
    data = _parsed(path)
    if source is not None:
        if data.get("task") != "labels":
            raise StudyError(f"{file} has no labelled texts to look for in {source}", hint="leave --data out")
        place = Path(source).expanduser()
        texts = {
            **mapping(data.get("data"), f"{where}: data"),
            "source": str(place.resolve() if place.exists() else source),
        }
        data = {**data, "data": texts}
    return read_studies(data, folder, where)


def read_studies(data: Mapping[str, Any], folder: Path, where: str) -> list[StudySpec]:
    """Studies out of plain data: one, or one for each of several models, called after it; see `read_study`."""
    models = data.get("model")
    if not isinstance(models, list):
        return [read_study(data, folder, where)]
    for key in ("storage", "out"):
        if key in data:
            raise StudyError(f"{where}: {key} is given for several models", hint="leave it out: each has its own")
    ends = [Path(str(one)).name for one in models]
    if not ends or len(set(ends)) < len(ends):
        raise StudyError(f"{where}: model is {models!r}", hint="give models whose names differ")
    name = data.get("name", Path(where).stem)
    return [
        read_study({**data, "model": one, "name": f"{name}-{end}"}, folder, where)
        for one, end in zip(models, ends, strict=True)
    ]


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
    spaces = _spaces(values["space"], fixed, folder, where)
    sampler = values.get("sampler", "grid")
    if sampler not in SAMPLERS:
        raise UnknownNameError("sampler", str(sampler), SAMPLERS)
    if sampler != "grid" and len(spaces) > 1:
        raise StudyError(f"{where}: sampler {sampler} takes one space, not {len(spaces)}", hint="use sampler: grid")
    task: Task = values.get("task", "language")
    if task not in TASKS:
        raise UnknownNameError("task", str(task), TASKS)
    objectives = read_objectives(values.get("objectives"), task)
    constraints = tuple(
        parse_constraint(one, task) for one in several(values.get("constraints", []), f"{where}: constraints")
    )
    budget = known(mapping(values.get("budget"), f"{where}: budget"), ("trials", "minutes"), f"{where}: budget")
    trials = whole(budget["trials"], f"{where}: budget: trials", 1) if "trials" in budget else None
    minutes = positive(budget["minutes"], f"{where}: budget: minutes") if "minutes" in budget else None
    if sampler != "grid" and trials is None and minutes is None:
        raise StudyError(f"{where}: sampler {sampler} never ends by itself", hint="give budget: {trials: 40}")
    keep = values.get("keep", "finalists")
    if keep not in ("finalists", "all"):
        raise UnknownNameError("value of keep", str(keep), ("finalists", "all"))
    speed = values.get("speed", "finalists")
    if speed not in ("finalists", "asked"):
        raise UnknownNameError("value of speed", str(speed), ("finalists", "asked"))
    baselines = tuple(map(str, several(values.get("baselines", []), f"{where}: baselines")))
    for one in baselines:
        if one not in BASELINES:
            raise UnknownNameError("baseline", one, BASELINES)
        if task == "labels" and one in LLAMA_CPP:
            raise StudyError(
                f"{where}: baseline {one}: llama.cpp runs no text classifier that transformers would run alike",
                hint=f"with task: labels take bfloat16 and {TORCHAO}",
            )
    spec = StudySpec(
        name=name, model=full_path(text(values["model"], f"{where}: model"), folder),
        storage=folder / text(values.get("storage", f"{name}.db"), f"{where}: storage"),
        out=folder / text(values.get("out", name), f"{where}: out"), spaces=spaces, raw_space=values["space"],
        objectives=objectives, constraints=constraints, data=_data(values.get("data"), task, folder, where),
        fixed=fixed, task=task, fine_tune=_fine_tune(values.get("fine_tune"), task, where),
        trials=trials, minutes=minutes, sampler=sampler, seed=whole(values.get("seed", 0), f"{where}: seed", 0),
        stop=_stop(values, task, objectives, constraints, where), baselines=baselines, keep=keep,
        finalists=whole(values.get("finalists", 5), f"{where}: finalists", 1), speed=speed,
        resources=_resources(values.get("resources"), where),
    )  # fmt: skip
    _check(spec, where)
    return spec


def _check(spec: StudySpec, where: str) -> None:
    """Refuse what can be refused without opening anything."""
    low = min(space.sparsities[0] for space in spec.spaces)
    high = max(space.sparsities[1] for space in spec.spaces)
    check_constraints(
        spec.constraints,
        {"sparsity": Reach(low, high, "by the sparsities of the space"), "accuracy": ACCURACY},
        {},
    )
    if spec.out == spec.storage or spec.storage.is_dir():
        raise StudyError(f"{where}: storage {spec.storage} is a folder", hint="give a file, such as study.db")
    if spec.task == "language" and spec.stop is not None and spec.stop.evaluate > spec.data.windows:
        raise StudyError(
            f"{where}: stop looks at {spec.stop.evaluate} windows first, and data has {spec.data.windows} in all",
            hint="give stop: evaluate a smaller number",
        )
    structures = {name for space in spec.spaces for name in space.structures}
    conversions = {name: one for space in spec.spaces for name, one in space.conversions.items()}
    for key in spec.fixed:
        meant = [means_something(key, structure) for structure in structures]
        meant += [looked_at(key, conversion) for conversion in conversions.values()]
        if key not in KEYS and not any(meant):
            named = [f"structure {', '.join(sorted(structures))}"] * bool(structures)
            named += [f"convert {', '.join(conversions)}"] * bool(conversions)
            raise StudyError(f"{where}: fixed {key} has no meaning with {' or '.join(named)}",
                             hint="leave it out")  # fmt: skip
    if "reconstruct_options" in spec.fixed and not any({*space.reconstructs} - {NONE} for space in spec.spaces):
        raise StudyError(f"{where}: fixed reconstruct-options need reconstruct: block or half-block",
                         hint="leave them out, or add reconstruct to the space")  # fmt: skip
    fused = next((name for name, conversion in conversions.items() if conversion["to"] == "fused"), None)
    if fused is not None and spec.fine_tune is not None:
        raise StudyError(f"{where}: convert {fused}: nothing descends from the classifier that fine-tune makes first",
                         hint="fine-tune it before, and take the result as the model of the study")  # fmt: skip
    for space in spec.spaces:
        for fields in space.recoveries.values():
            if spec.task == "labels" and fields is not None:
                _check_lesson(fields, f"{where}: recovery")
            _check_fit(spec, space, fields, where)
        if spec.sampler == "grid":
            _ = space.combinations  # a range without a step is refused
        for settings in space.grid() if spec.sampler == "grid" else _corners(space):
            spec.recipe(settings)  # a Recipe refuses what cannot be run


def _check_fit(spec: StudySpec, space: Space, fields: Mapping[str, Any] | None, where: str) -> None:
    """Refuse a recovery that cannot train what a conversion of its space makes."""
    mode = "" if fields is None else str(fields.get("mode", "full"))
    for name, conversion in space.conversions.items():
        if why := unfit_for(mode, conversion, all_matrices=not {"targets", "ignore"} & {*spec.fixed}):
            raise StudyError(f"{where}: recovery with mode {mode} does not suit convert {name}: {why}",
                             hint="use mode full, or give the two spaces of their own")  # fmt: skip


def _check_lesson(fields: Mapping[str, Any], where: str) -> None:
    """Refuse settings of `recover` that do not train a classifier."""
    loss, mode = fields.get("loss", "auto"), fields.get("mode", "full")
    if loss not in ("auto", "labels", "kd"):
        raise StudyError(f"{where}: loss {loss} does not suit labelled texts", hint="use labels or kd, or leave it out")
    if mode in ("blocks", "adapter-moe"):
        raise StudyError(f"{where}: mode {mode} learns no labels", hint="use full, lora or norms-and-biases")


def _corners(space: Space) -> Iterator[dict[str, Any]]:
    """Settings that together have every value of every list, and the ends of the ranges."""
    for name in (CONVERT, "structure", "method", "unit_method", "pattern", "sparsity"):
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


def _spaces(data: Any, fixed: dict[str, Any], folder: Path, where: str) -> tuple[Space, ...]:
    for key in fixed:
        if key not in (*KEYS, *FIXED):
            raise UnknownNameError("key of fixed", key, (*KEYS, *FIXED))
    apart = ("recovery", "method_options", CONVERT)
    given = {key: value for key, value in fixed.items() if key in KEYS and key not in apart}
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
        given = {**one, **{key: fixed[key] for key in KEYS if key in fixed}}
        spaces.append(read_space(given, f"{where}: {title}", folder))
    return tuple(spaces)


def _data(value: Any, task: Task, folder: Path, where: str) -> Data:
    names = [entry.name for entry in dataclasses.fields(Data)]
    given = known(mapping(value, f"{where}: data"), names, f"{where}: data")
    found: dict[str, Any] = {}
    for key in ("windows",) if task == "labels" else ("source",):
        if given.get(key) is not None:
            raise StudyError(f"{where}: data: {key} has no meaning with task {task}", hint="leave it out")
    for key, one in given.items():
        if key in ("calibration", "choice", "test", "source"):
            if one is None and key == "source":
                continue
            name, part = divided(text(one, f"{where}: data: {key}")) if task == "labels" else (text(one, key), "")
            found[key] = (name if given.get("source") and key != "source" else full_path(name, folder)) + part
        elif one is not None or key != "sequence_length":
            found[key] = whole(one, f"{where}: data: {key}", 2 if key == "sequence_length" else 1)
    if task == "labels" and (missing := [key for key in ("calibration", "choice", "test") if key not in found]):
        raise StudyError(
            f"{where}: data: {missing[0]} is missing: with task labels each is a JSONL file of `text`, `label`",
            hint="for example {source: FOLDER, calibration: 'train[:2000]', choice: 'train[2000:3000]', test: dev}",
        )
    return Data(**found)


def _fine_tune(value: Any, task: Task, where: str) -> Mapping[str, Any] | None:
    if value is None:
        return None
    if task != "labels":
        raise StudyError(f"{where}: fine-tune is for labelled texts", hint="add task: labels, or leave it out")
    if "data" in (fields := read_training(mapping(value, f"{where}: fine-tune"), f"{where}: fine-tune")):
        raise StudyError(f"{where}: fine-tune: data is the calibration data of the study", hint="leave it out")
    _check_lesson(fields, f"{where}: fine-tune")
    return fields


def _stop(
    values: Mapping[str, Any], task: Task, objectives: Mapping[str, str], constraints: Sequence[Constraint], where: str
) -> Stop | None:
    if values.get("stop") is None:
        return None
    given = known(mapping(values["stop"], f"{where}: stop"), ("evaluate", "factor"), f"{where}: stop")
    if not (any(name in QUALITY for name in objectives) or any(one.keeps_quality for one in constraints)):
        raise StudyError(
            f"{where}: stop needs {'accuracy' if task == 'labels' else 'perplexity'} among the objectives or "
            "constraints",
            hint="leave stop out: nothing that is asked for can be foreseen from a small part of the texts",
        )
    found: dict[str, Any] = {"evaluate": LOOKED_AT[task]}
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
