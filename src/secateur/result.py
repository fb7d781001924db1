"""Typed results of the commands and of ``secateur.json``. Plain data only; units are in the names (SI)."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import CheckpointError

SCHEMA_VERSION = 1
RESULT_FILE = "secateur.json"


class Plain:
    """Plain data, as dictionaries and JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)


@dataclass
class Matrix(Plain):
    """One prunable matrix, seen as (out_features, in_features); fused experts are (experts, out, in)."""

    name: str
    shape: list[int]
    zeros: int


@dataclass
class Unprunable(Plain):
    """A tensor that stays as it is, and why."""

    name: str
    shape: list[int]
    reason: str


@dataclass
class InspectResult(Plain):
    """What `secateur inspect` prints."""

    model: str
    architecture: str
    dtype: str
    parameters: int
    nonzero: int
    prunable: int
    zeros: int
    sparsity: float
    """Share of the prunable weights that are zero."""
    bytes_disk: int
    blocks: int
    obstacle: str | None = None
    """Why `prune` refuses the whole model; None when it does not."""
    matrices: list[Matrix] = field(default_factory=list)
    unprunable: list[Unprunable] = field(default_factory=list)


@dataclass
class EvaluateResult(Plain):
    """What `secateur evaluate` prints. A value that was not measured is None."""

    model: str
    perplexity: float | None = None
    perplexity_stderr: float | None = None
    nll_per_token: float | None = None
    nll_stderr: float | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    expert_usage: dict[str, list[float]] = field(default_factory=dict)
    """Layer with a router that conversions or adapters have put in -> share of the tokens that chose each expert."""
    accuracy: dict[str, float] = field(default_factory=dict)
    accuracy_stderr: dict[str, float] = field(default_factory=dict)
    accuracy_interval: dict[str, list[float]] = field(default_factory=dict)
    """Lower and upper end at 95 %, like every interval here; of files of labelled texts only."""
    macro_f1: dict[str, float] = field(default_factory=dict)
    macro_f1_interval: dict[str, list[float]] = field(default_factory=dict)
    calibration_error: dict[str, float] = field(default_factory=dict)
    calibration_error_interval: dict[str, list[float]] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)
    """Mean negative log-likelihood of the right class, nats."""
    rank_correlation: dict[str, float] = field(default_factory=dict)
    """Of embedding models, under the name of a file of scored pairs or of the model it was compared with."""
    rank_correlation_interval: dict[str, list[float]] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)


@dataclass
class Measured(Plain):
    """One side (before or after) of a pruning result. A value that was not measured is None."""

    parameters: int
    nonzero: int
    sparsity: float
    bytes_disk: int
    dtype: str
    perplexity: float | None = None
    nll_per_token: float | None = None
    bytes_resident: int | None = None
    decode_tokens_per_second: float | None = None
    accuracy: dict[str, float] = field(default_factory=dict)
    expert_usage: dict[str, list[float]] = field(default_factory=dict)
    """Layer with a router -> share of the tokens that chose each expert."""
    continuation: str | None = None


@dataclass
class PrunedMatrix(Plain):
    """What happened to one matrix."""

    name: str
    shape: list[int]
    zeros: int
    sparsity: float
    loss: float | None = None
    notes: list[str] = field(default_factory=list)
    units: list[int] | list[list[int]] | None = None
    """Numbers of the neurons or heads that stayed, where others were removed; of stacked experts, for each."""
    loss_before_refit: float | None = None
    """``loss`` before the kept weights were solved anew; None where they were not."""
    loss_before_rounding: float | None = None
    """``loss`` before the kept weights were rounded to few bits; None where they were not."""
    beta: float | None = None
    """Share of the correction of earlier errors that was taken; None without one."""
    order: list[int] | None = None
    """For each input its number in the source, where inputs were put in another order first."""
    saliency_kept: list[float] | None = None
    """Share of the saliency that the pattern keeps in the source's order of the inputs and in the one that was chosen;
    None where none was searched."""
    held_out_error: list[float] | None = None
    """Relative squared error of the outputs of its block on calibration data held out, before and after the block was
    reconstructed; None where it was not. ``loss`` is that before."""


@dataclass
class PruneResult(Plain):
    """What `secateur prune` prints, and the bulk of ``secateur.json``."""

    out: str
    source: dict[str, Any]
    recipe: dict[str, Any]
    sparsity: float
    seconds: float
    peak_rss_bytes: int
    before: Measured
    after: Measured
    verified: bool
    verdict: list[str] = field(default_factory=list)
    protocol: dict[str, Any] = field(default_factory=dict)
    verification: dict[str, Any] = field(default_factory=dict)
    matrices: list[PrunedMatrix] = field(default_factory=list)
    blocks_kept: list[int] | None = None
    """Numbers, in the source, of the blocks that stayed; None when none was left out."""
    channels_kept: list[int] | None = None
    """Numbers of the hidden channels that stayed; None when none was removed."""
    shape_changes: dict[str, Any] = field(default_factory=dict)
    """Config entries that changed with the shapes, nested ones with dots."""
    budget: dict[str, Any] | None = None
    """How a budget was split: what was measured and considered, and what was chosen; None without one."""
    allocation: dict[str, float] = field(default_factory=dict)
    """Name of a matrix -> sparsity that was asked of it; empty where the same was asked of all of them."""
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    shards: dict[str, str] = field(default_factory=dict)
    """Output shard name -> sha256 of its bytes."""
    schema_version: int = SCHEMA_VERSION


@dataclass
class AllocatedMatrix(Plain):
    """The share of zeros that one matrix is to have."""

    name: str
    shape: list[int]
    sparsity: float


@dataclass
class AllocateResult(Plain):
    """What `secateur allocate` prints."""

    out: str
    model: str
    allocation: str
    allocation_options: dict[str, Any]
    sparsity: float
    """Mean over all weights."""
    matrices: list[AllocatedMatrix]
    protocol: dict[str, Any]
    """What the rule looked at."""
    seconds: float
    peak_rss_bytes: int
    warnings: list[str] = field(default_factory=list)


@dataclass
class ConvertedMatrix(Plain):
    """What a conversion made of one matrix."""

    name: str
    shape: list[int]
    kind: str
    """Kind of the layer, or "dense" where it stayed as it was."""
    parameters: int
    """Parameters of the layer without bias; a tensor that layers share counts in the first of them."""
    rank: int | None = None
    """Largest rank in it."""
    error: float | None = None
    """Share lost of the squares of the outputs (of the differences, in fused models), as far as it is known."""
    notes: list[str] = field(default_factory=list)


@dataclass
class ConvertResult(Plain):
    """What `secateur convert` prints, and the bulk of ``secateur.json``."""

    out: str
    source: dict[str, Any]
    conversion: str
    options: dict[str, Any]
    models: list[dict[str, Any]]
    """Further models that went into it: where they were, and the hash of their weights."""
    seconds: float
    peak_rss_bytes: int
    before: Measured
    after: Measured
    verified: bool
    needs_training: bool = False
    """Whether the result is of no use before it was trained."""
    verdict: list[str] = field(default_factory=list)
    protocol: dict[str, Any] = field(default_factory=dict)
    verification: dict[str, Any] = field(default_factory=dict)
    matrices: list[ConvertedMatrix] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    shards: dict[str, str] = field(default_factory=dict)
    """Output shard name -> sha256 of its bytes."""
    schema_version: int = SCHEMA_VERSION


@dataclass
class PlanResult(Plain):
    """What `secateur prune --structure ... --dry-run` prints, or `--budget ... --dry-run`."""

    lines: list[str]
    """The plan in words."""
    removed: float
    """Share of the prunable weights that would go."""
    weights_before: int
    weights_after: int
    """Prunable weights."""
    blocks_kept: list[int] | None
    units: dict[str, list[int]]
    """By structure: units of a block before and after."""
    shape_changes: dict[str, Any]
    """Config entries that would change, nested ones with dots."""
    budget: dict[str, Any] | None = None
    """How a budget would be split: what was measured and considered, and what was chosen; None without one."""


@dataclass
class RecoverResult(Plain):
    """What `secateur recover` prints, and the bulk of the ``secateur.json`` it writes."""

    out: str
    source: dict[str, Any]
    """The dense model at the start of it all, as `prune` recorded it."""
    student: dict[str, Any]
    """The pruned or converted model that was trained; ``conversion`` says which one made it, where one did."""
    settings: dict[str, Any]
    sparsity: float
    seconds: float
    peak_rss_bytes: int
    before: Measured
    after: Measured
    teacher: Measured | None = None
    training: dict[str, Any] = field(default_factory=dict)
    """steps, tokens, seconds, tokens_per_second, losses [(step, loss)], held_out_loss before and after, and the gap."""
    zeros_held: int = 0
    verified: bool = False
    verdict: list[str] = field(default_factory=list)
    protocol: dict[str, Any] = field(default_factory=dict)
    verification: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    shards: dict[str, str] = field(default_factory=dict)
    """Output shard name -> sha256 of its bytes."""
    schema_version: int = SCHEMA_VERSION


def read_after(folder: Path) -> tuple[str, Measured]:
    """What the result file of an earlier run says: sha256 of the model it started from, and the side after.

    Raises:
        CheckpointError: when there is none, or it is not one of a pruning.
    """
    path = folder / RESULT_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        names = {entry.name for entry in dataclasses.fields(Measured)}
        after = {name: value for name, value in data["after"].items() if name in names}
        return str(data["source"]["sha256"]), Measured(**after)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{folder} has no {RESULT_FILE} of a run of secateur that can be read",
            hint="name the folder of a finished prune or recover",
        ) from None


@dataclass
class StoredMatrix(Plain):
    """What the sparse format made of one matrix."""

    name: str
    shape: list[int]
    """As the model holds it."""
    kind: str
    """mask, 2:4, dense (rounded, every value stored) or plain (as it was)."""
    bits: int
    """Of a stored value."""
    zeros: int
    """As the matrix came."""
    nbytes: int
    bits_per_weight: float
    reason: str
    """Why it is stored so."""
    in_block: bool
    """Whether it is one of those that `prune` prunes."""


@dataclass
class ExportResult(Plain):
    """What `secateur export` prints."""

    out: str
    source: dict[str, Any]
    format: str
    options: dict[str, Any]
    bytes_disk: int
    bytes_folder: int
    """Bytes of the weights of the folder that was exported."""
    ratio: float
    """Bytes of the folder by bytes of the result: how many times smaller it is."""
    tensors: dict[str, int]
    """Number format -> tensors in it."""
    zeros: int
    """Zeros in the matrices of the folder."""
    zeros_lost: int
    """How many of them are no longer zero in the result."""
    seconds: float
    peak_rss_bytes: int
    verified: bool
    verification: dict[str, Any] = field(default_factory=dict)
    runtime: dict[str, Any] = field(default_factory=dict)
    """What the program that reads the format made of the result; empty when it is not installed or was not asked."""
    matrices: list[StoredMatrix] = field(default_factory=list)
    """Of the sparse format."""
    bits_per_weight: float | None = None
    """Of the sparse format: over the matrices of the blocks, zeros counted as weights."""
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    sha256: str = ""
    """Of a file; of a folder that of its weights."""
    shards: dict[str, str] = field(default_factory=dict)
    """Of a folder: name of a weights file -> sha256."""
    schema_version: int = SCHEMA_VERSION


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write plain data whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)
