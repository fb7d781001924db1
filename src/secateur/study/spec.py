"""What a study asks for: a model and data, what is searched, by what it is judged, and how long it may take"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from secateur.recipe import LOOKED_AT, Recipe
from secateur.study.conversion import FIELDS, Conversion
from secateur.study.recoveries import NONE
from secateur.study.space import CONVERT, WEIGHTS, Space
from secateur.study.values import Constraint, Direction, Task
from secateur.training import Training

SINGLE = ("targets", "ignore", "overrides", "bits", "group_size", "allocation_options", "reconstruct_options")
"""Fields of a recipe that mean something only where single weights go."""
FIXED = (*SINGLE, "round_to", "update", "depth_by", "device", "compute_dtype", "activation_memory")
"""Fields of a recipe that a study can fix beside those that it can vary."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """The texts of a study. Each is ``builtin``, a file or a dataset, as `secateur prune --calibration` takes it; with
    labels a JSONL file or a split of ``source``, or some rows of one: ``train[:2000]``.
    """

    calibration: str = "builtin"
    """What methods see, and what recovery and fine-tuning learn from unless they name their own."""
    choice: str = "builtin"
    """What settings are compared on."""
    test: str = "builtin"
    """What the finalists are measured on, once. When it is the same as choice, each takes one half of it."""
    source: str | None = None
    """With labels: a folder of JSONL files or a dataset, of which the others name splits."""
    samples: int = 16
    """Calibration windows."""
    sequence_length: int | None = None
    """Tokens in a calibration window, and of a text in a window to measure on (1024, or 128 with labels; never more
    than the model's)."""
    windows: int = 12
    """Windows of choice, and of test, when the text has as many."""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """When a trial is given up."""

    evaluate: int
    """Windows, or labelled texts, of choice that are looked at first."""
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
    task: Task = "language"
    fine_tune: Mapping[str, Any] | None = None
    """Settings of `recover` by which the model becomes the dense classifier; None for one that is a classifier."""
    data: Data = field(default_factory=Data)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    trials: int | None = None
    minutes: float | None = None
    sampler: Literal["grid", "tpe", "nsga2"] = "grid"
    seed: int = 0
    stop: Stop | None = None
    finalists: int = 5
    speed: Literal["finalists", "asked"] = "finalists"
    """Which speeds are measured that no objective or constraint asks for: those of baselines and finalists, or none."""
    baselines: tuple[str, ...] = ()
    keep: Literal["finalists", "all"] = "finalists"
    resources: Resources = field(default_factory=Resources)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a storage file to belong to this study. The budget is not among it."""
        data = dataclasses.asdict(self.data)
        if self.task == "language":
            data.pop("source")
        labels = {"task": self.task, "fine_tune": self.fine_tune} if self.task == "labels" else {}
        return {
            "name": self.name,
            "model": self.model,
            **labels,
            "data": data,
            "space": self.raw_space,
            "fixed": dict(self.fixed),
            "objectives": dict(self.objectives),
            "constraints": [one.text for one in self.constraints],
            "sampler": self.sampler,
            "seed": self.seed,
            "stop": None if self.stop is None else dataclasses.asdict(self.stop),
        }

    @property
    def calibration(self) -> str:
        """What `prune` and `recover` are given as text; labelled texts are put in a file of the study's own."""
        return self.data.calibration if self.task == "language" else str(self.texts_folder / "calibration.jsonl")

    @property
    def texts_folder(self) -> Path:
        """Where the labelled texts of this study are written, for trials and for the commands that are printed."""
        return self.out / "texts"

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
        """The recipe of `secateur prune` for one setting; of a conversion the part that `secateur convert` looks at.

        Raises:
            SecateurError: when it cannot be run.
        """
        values: dict[str, Any] = {
            "calibration": self.calibration, "samples": self.data.samples, "sequence_length": sequence_length,
            "seed": self.seed,
        }  # fmt: skip
        if (conversion := self.conversion(settings)) is not None:
            values |= {key: value for key, value in self.fixed.items() if looked_at(key, conversion)}
            return Recipe.from_dict({**values, "dtype": settings["dtype"]}, where="study")
        structure = settings["structure"]
        values |= {key: settings[key] for key in ("sparsity", *WEIGHTS, "dtype") if key in settings}
        if structure != NONE:
            values["structure"] = structure
        method = settings.get("method", "auto")
        if method != "auto":
            values["method"] = method
            prefix = f"{method}."
            values["method_options"] = {
                name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)
            }
        values |= {key: value for key, value in self.fixed.items() if means_something(key, structure)}
        if values.get("reconstruct", NONE) == NONE:
            values.pop("reconstruct_options", None)
        return Recipe.from_dict(values, where="study")

    def conversion(self, settings: Mapping[str, Any]) -> Conversion | None:
        """The conversion of one setting; None where it prunes."""
        name = str(settings.get(CONVERT))
        return next((space.conversions[name] for space in self.spaces if name in space.conversions), None)

    def training(self, settings: Mapping[str, Any]) -> Training | None:
        """The settings of `secateur recover` for one setting; None without recovery."""
        for space in self.spaces:
            if settings["recovery"] in space.recoveries:
                fields = space.recoveries[settings["recovery"]]
                return None if fields is None else self.lesson(fields)
        raise KeyError(settings["recovery"])

    def lesson(self, fields: Mapping[str, Any]) -> Training:
        """Settings of `recover` as this study has them where ``fields`` say nothing."""
        data = {"data": self.calibration, "seed": self.seed, "device": self.fixed.get("device", "auto")}
        return Training.from_dict({**data, **fields})

    @property
    def training_texts(self) -> list[str]:
        """Everything that a trial may learn from, besides the calibration text."""
        named = {str(fields["data"]) for space in self.spaces for fields in space.recoveries.values()
                 if fields and "data" in fields}  # fmt: skip
        return sorted(named - {self.calibration})


def means_something(key: str, structure: str) -> bool:
    """Whether a fixed field is looked at where this structure goes; those that can be varied come with the space."""
    names = {*structure.split(",")}
    if key in LOOKED_AT:
        return bool(names & {*LOOKED_AT[key]})
    return key in FIXED and {**dict.fromkeys(SINGLE, structure == NONE), "depth_by": "depth" in names}.get(key, True)


def looked_at(key: str, conversion: Conversion) -> bool:
    """Whether a conversion looks at a fixed field; blocks that share their weights do so as a whole."""
    return key in FIELDS and not (conversion["to"] == "shared" and key in ("targets", "ignore"))
