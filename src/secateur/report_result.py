"""Typed result of `secateur report`: what the page shows. Plain data only; units are in the names (SI)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from secateur.result import SCHEMA_VERSION, AllocatedMatrix, Plain

Kind = Literal["dense", "quantised", "pruned", "converted", "other"]
MADE: tuple[Kind, ...] = ("pruned", "converted")
"""What can be taken in the place of the dense model; the rest is there to be compared with."""


@dataclass
class ReportModel(Plain):
    """One model of the page: a folder, a trial of a study, a baseline."""

    name: str
    kind: Kind
    """dense is the source; quantised the source in another number format; converted has other layers, as `secateur
    convert` makes them; other a model of another source."""
    origin: str
    """The input that it comes from."""
    values: dict[str, float] = field(default_factory=dict)
    """perplexity, accuracy ..., bytes_disk, parameters, nonzero, sparsity, decode_speedup (relative to the dense model
    of the same input) ...; what was not measured is absent."""
    command: str = ""
    """The command line that makes it."""
    settings: dict[str, Any] = field(default_factory=dict)
    meets: bool | None = None
    """Whether it meets the constraints of its study; None without any."""
    missing: dict[str, str] = field(default_factory=dict)
    """Name of a value -> why it was not measured."""
    unshown: list[str] = field(default_factory=list)
    """Values whose difference from the dense model was within the noise of the run that measured them."""
    intervals: dict[str, list[float]] = field(default_factory=dict)
    """Name of a value -> ends of its 95 % interval, of those that have one."""


@dataclass
class Front(Plain):
    """Quality against one other quantity. Numbers are those of ``ReportResult.models``."""

    axis: str
    better: Literal["minimize", "maximize"]
    """Of the axis."""
    points: list[int]
    front: list[int]
    """Those that no other point betters in both, best quality first."""
    knee: int | None = None
    """The point of the front farthest from the line between its ends; None with fewer than three points."""


@dataclass
class Comparison(Plain):
    """Models of one source whose quality was measured in the same way: only these are drawn together."""

    source: str
    protocol: str
    quality: str
    """Name of the value that is the quality, empty when none was measured."""
    better: Literal["minimize", "maximize"]
    models: list[int]
    fronts: list[Front] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Axis -> why there is no front for it."""


@dataclass
class BlockMap(Plain):
    """Matrices of one model by block and kind."""

    model: str
    blocks: list[str]
    kinds: list[str]
    sparsity: list[list[float | None]]
    """One row for each kind, one column for each block; None where a block has no such matrix."""
    loss: list[float | None] = field(default_factory=list)
    """For each block the squared output error that pruning estimated, summed over its matrices; empty when unknown."""
    gone: list[str] = field(default_factory=list)
    """What went as a whole, which has no cell any more, and what is left: in words."""


@dataclass
class AllocationMap(Plain):
    """Sparsity that was asked of every matrix, where not of all the same."""

    name: str
    """Name of the rule, or of the file."""
    sparsity: float
    """Of all its matrices together."""
    matrices: int
    least: AllocatedMatrix
    most: AllocatedMatrix
    map: BlockMap
    """What was asked, by block and kind of matrix. Its model is the pruned one, or what the file says it is for."""
    rule: str = ""
    """Rule that a file was made by; empty when it does not say."""
    pruned: bool = False
    """Whether a model among the inputs was pruned with it; otherwise it is a file by itself."""
    command: str = ""
    """The command line that prunes with the file; empty without one."""


@dataclass
class GroupLoss(Plain):
    """Loss of some tokens, nats per token, in both models; errors are standard errors of the mean."""

    label: str
    tokens: int
    dense: float
    pruned: float
    difference: float
    """pruned - dense, token by token."""
    dense_stderr: float | None = None
    pruned_stderr: float | None = None
    difference_stderr: float | None = None
    """None for a single token."""


@dataclass
class Distribution(Plain):
    """How one quantity is spread over the tokens of one condition, dense against pruned."""

    quantity: Literal["angle", "length", "margin"]
    condition: str
    """clean, or the name of a corruption."""
    quantiles: list[float]
    """The levels of the following lists."""
    dense: list[float]
    pruned: list[float]
    change: list[float]
    """Of the angle in degrees, of the length relative to the dense one, of the margin in logits."""
    edges: list[float]
    """Ends of the bins of the counts, which are over the values and not the changes."""
    dense_counts: list[int]
    pruned_counts: list[int]


@dataclass
class Condition(Plain):
    """What one corruption of the text does to both models."""

    name: str
    tokens: int
    dense_loss: float
    pruned_loss: float
    difference_stderr: float | None
    dense_right: float
    """Share of the tokens that are the likeliest one of the model."""
    pruned_right: float
    lost: float
    """Share of the tokens that were the likeliest of the dense model and are not of the pruned one."""
    gained: float
    length_part: float | None = None
    """Of the difference in loss, the part that the changed length alone makes; None where logits are not linear in the
    state."""
    direction_part: float | None = None
    aligned: int | None = None
    """Tokens that the corruption left in place; None for the clean text."""
    dense_damage: float | None = None
    """On these: loss in the corrupted text less loss in the clean one, dense."""
    pruned_damage: float | None = None
    damage_stderr: float | None = None
    """Standard error of pruned_damage - dense_damage, token by token."""


@dataclass
class BrokenToken(Plain):
    """A token whose margin fell far."""

    condition: str
    before: str
    """The text before it."""
    token: str
    rival: str
    """The strongest other token in the pruned model."""
    margin_dense: float
    margin_pruned: float
    angle_change: float
    length_change: float
    loss_change: float


@dataclass
class Continued(Plain):
    """One prompt, continued greedily."""

    prompt: str
    dense: str
    pruned: str


@dataclass
class Examined(Plain):
    """A pruned model beside its dense one, both run. ``skipped`` says why it is empty."""

    model: str
    source: str
    skipped: str = ""
    text: str = ""
    """What text, in how many windows of how many tokens."""
    by_frequency: list[GroupLoss] = field(default_factory=list)
    by_position: list[GroupLoss] = field(default_factory=list)
    distributions: list[Distribution] = field(default_factory=list)
    conditions: list[Condition] = field(default_factory=list)
    broken: list[BrokenToken] = field(default_factory=list)
    why: list[str] = field(default_factory=list)
    """What follows from the numbers, in sentences."""
    continued: list[Continued] = field(default_factory=list)


@dataclass
class ReportResult(Plain):
    """What `secateur report` prints."""

    answer: list[str]
    """Three sentences; of allocation files alone what they divide."""
    recommended: int | None
    command: str
    """The command that makes the recommended model, or uses the one allocation file there is; empty without one."""
    inputs: list[str]
    models: list[ReportModel] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    maps: list[BlockMap] = field(default_factory=list)
    allocations: list[AllocationMap] = field(default_factory=list)
    undrawn: int = 0
    """Models on a front that have no map here, since there would be too many."""
    examined: list[Examined] = field(default_factory=list)
    importances: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Study -> objective -> setting -> share by which it tells the best quarter of the trials from the others."""
    failures: list[dict[str, str]] = field(default_factory=list)
    """Trials that were stopped or failed: origin, trial, state, reason."""
    verdicts: dict[str, list[str]] = field(default_factory=dict)
    """Input -> what it says of itself."""
    warnings: list[str] = field(default_factory=list)
    machines: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
