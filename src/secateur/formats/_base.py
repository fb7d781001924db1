"""What a format is: options that plan an export, and the plan, which writes it and checks what it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from secateur.checkpoint.source import Source
from secateur.progress import Reporter


class Plan(Protocol):
    """An export that was found possible. Nothing is written before ``write``."""

    nbytes: int
    """Bytes that the result will need on the disk."""
    source_sha256: str
    """Hash of the weights that are exported."""

    def write(self, path: Path, reporter: Reporter) -> dict[str, Any]:
        """Write the result; what is worth telling comes back, by the names of fields of `ExportResult`."""

    def check(self, path: Path, reporter: Reporter) -> dict[str, Any]:
        """Read the result back and compare it with the source; what was checked comes back.

        Raises:
            VerificationError: naming the first thing that is not as it should be.
        """


@runtime_checkable
class Format(Protocol):
    """The whole contract of a format: a frozen dataclass of its options with a ``name`` and these two."""

    suffix: ClassVar[str]
    """How the name of a result ends; empty when the result is a folder."""
    reads_packed: ClassVar[bool]
    """Whether the source may be in the sparse format."""

    def plan(self, source: Source, reporter: Reporter) -> Plan:
        """Open the source and refuse all that can be refused.

        Raises:
            UnsupportedModelError: when the format cannot express the model; the message says what and why.
        """
