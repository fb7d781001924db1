"""Typed result of `secateur bench`. Plain data only; units are in the names (SI)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from secateur.result import SCHEMA_VERSION, Plain


@dataclass
class Quantities(Plain):
    """What one model is and takes, in one runtime and number format. A value that was not measured is None."""

    name: str
    """As it was asked for: a folder, hub id, ``demo``."""
    runtime: str
    """transformers or llama.cpp."""
    format: str
    """Number format of the weights: float32, bfloat16, q8_0 (8 bits), q4_0 (4 bits); of packed ones also how: sparse
    int8 (zeros are left out), dense int8."""
    parameters: int | None = None
    nonzero: int | None = None
    bytes_disk: int | None = None
    bytes_resident: int | None = None
    """What the loaded model adds to the memory of a fresh process."""
    flops_per_token: float | None = None
    """Floating-point operations for one decoded token by PyTorch's counter, two for every multiply-add."""
    sparse_flops_per_token: float | None = None
    """What a kernel would do that leaves out every multiplication by a weight that is zero."""
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    decode_tokens_per_second_batch_8: float | None = None
    """Of all eight rows together."""
    seconds_to_first_token: float | None = None
    joules_per_token: float | None = None
    grams_co2_per_token: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    """Loss on the same passages by their bytes: what models of different vocabularies are compared by."""
    kernels: str | None = None
    """Of packed weights: the variant of the CPU kernels that multiplies with them. None, with a reason in ``missing``,
    where they are unpacked each time they are used; None without a reason where nothing is packed."""
    efficiency: float | None = None
    """Mean of parameters, operations, bits of a number and bytes, each relative to the first dense model; 1 for it."""
    missing: dict[str, str] = field(default_factory=dict)
    """Name of a field that is None -> why it was not measured."""

    @property
    def packed(self) -> bool:
        """Whether the weights are in the sparse format."""
        return self.kernels is not None or "kernels" in self.missing

    @property
    def label(self) -> str:
        """How a row is told from the others."""
        return f"{self.name} ({self.runtime}, {self.format})"


@dataclass
class RatioResult(Plain):
    """Median of the paired ratios of all rounds, of the perplexity of all windows, and the interval that holds it."""

    median: float
    low: float
    high: float
    coverage: float
    """How sure the interval is."""
    differs: bool
    """Whether the difference is beyond noise."""


@dataclass
class BenchResult(Quantities):
    """What `secateur bench` prints: the model itself at the top level, and those it was measured against."""

    against: list[Quantities] = field(default_factory=list)
    ratio: dict[str, dict[str, RatioResult]] = field(default_factory=dict)
    """Label of another (its name, runtime and format) -> quantity -> this model's value by that one's."""
    verdict: list[str] = field(default_factory=list)
    protocol: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION
