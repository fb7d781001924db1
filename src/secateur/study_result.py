"""Typed result of a study, which `secateur study` prints and `secateur report` draws. Plain data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from secateur.result import SCHEMA_VERSION, Plain

State = Literal["waiting", "running", "complete", "stopped", "failed"]


@dataclass
class Trial(Plain):
    """One setting of a study that was tried, or one model it is compared with."""

    number: int
    """From 0; baselines count down from -1."""
    state: State
    settings: dict[str, Any]
    """Name in the space -> value: method, sparsity, pattern, structure ..., or convert: the conversion in words."""
    command: str
    """The command line that makes this model."""
    values: dict[str, float | None] = field(default_factory=dict)
    """Objectives, and everything else that was measured: perplexity, nll_per_token, bytes_disk, parameters, nonzero,
    sparsity, flops_per_token, sparse_flops_per_token, decode_tokens_per_second, seconds; of networks cut into experts
    active_parameters (which one token goes through); of classifiers accuracy, accuracy_difference (from the dense
    model's, text by text), macro_f1, loss, sentences_per_second, sentences_per_second_batch_32,
    joules_per_thousand_sentences."""
    meets: bool | None = None
    """Whether every constraint is met; None while that is not known."""
    reason: str = ""
    """Why it was stopped, or the error with which it failed."""
    seconds: float | None = None
    name: str = ""
    """Of a baseline: dense, int8, 4-bit."""
    sparsity: dict[str, float] = field(default_factory=dict)
    """Prunable matrix -> share of its weights that are zero."""
    tries: int = 1
    """How often it was begun: more than once when a process that worked on it died."""
    out: str = ""
    """Folder of its model, while that is kept."""
    warnings: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Name of a value that is None -> why it was not measured."""
    intervals: dict[str, list[float]] = field(default_factory=dict)
    """Name of a value -> ends of its 95 % interval, of those that have one."""

    @property
    def setting(self) -> str:
        """What distinguishes it, in a few words."""
        left_out = ("none", "auto", "unstructured", "uniform", "hf", "", None)
        plain = ("method", "pattern", "structure", "convert", "dtype", "format", "recovery", "sparsity")
        words = [
            str(value) if name in plain else f"{name.replace('_', ' ')} {value}"
            for name, value in self.settings.items() if value not in left_out
        ]  # fmt: skip
        return " ".join(words) or "as it is"


@dataclass
class StudyResult(Plain):
    """What a study has found so far."""

    name: str
    model: str
    objectives: dict[str, Literal["minimize", "maximize"]]
    constraints: list[str]
    data: dict[str, str]
    """What calibration, choice and test are measured on."""
    finished: bool
    planned: int | None = None
    """Trials there will be; None where only the time is set."""
    baselines: list[Trial] = field(default_factory=list)
    """Measured like the trials, but not chosen by the study: dense first."""
    trials: list[Trial] = field(default_factory=list)
    front: list[int] = field(default_factory=list)
    """Numbers of the complete trials that meet the constraints and that no other betters in every objective."""
    finalists: list[Trial] = field(default_factory=list)
    """Those measured on the test text, once, at the end; ``values`` are of that text."""
    best: dict[str, int] = field(default_factory=dict)
    """Objective -> number of the complete trial that is best in it, of those that meet the constraints."""
    recommended: int | None = None
    """Number of the trial a user should take."""
    recommended_by: str = ""
    """How it was chosen."""
    importances: dict[str, dict[str, float]] = field(default_factory=dict)
    """Objective -> setting -> share by which it tells the best quarter of the trials from the others."""
    spent: dict[str, float] = field(default_factory=dict)
    """seconds in all, and of them trial_seconds, baseline_seconds and finalist_seconds; saved_seconds by sharing, at
    what the shared work took when it was done; shared_models and shared_baselines, how often."""
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION


@dataclass
class StudyResults(Plain):
    """What a study file of several models has found: a study for each."""

    studies: list[StudyResult]
    schema_version: int = SCHEMA_VERSION
