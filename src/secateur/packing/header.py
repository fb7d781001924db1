"""The header of the sparse format: ``quantization_config`` of config.json. It names every packed matrix."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import CheckpointError, UnsupportedModelError
from secateur.packing.layout import Entry, bad

METHOD = "secateur"
"""``quant_method``, by which transformers finds the plug-in."""
VERSION = 1
MOST = 1_000_000
"""Matrices in one header at most."""


@dataclass(frozen=True)
class Header:
    """What a folder packs: module of the model -> entry."""

    matrices: Mapping[str, Entry] = field(default_factory=dict)

    @property
    def number_format(self) -> str:
        """How most of the weights that leave zeros out are stored (where none do, of all): ``sparse int8``."""
        entries = list(self.matrices.values())
        weights: Counter[str] = Counter()
        for entry in [one for one in entries if one.kind != "dense"] or entries:
            kind = "sparse" if entry.kind == "mask" else entry.kind
            weights[f"{kind} {entry.dtype if entry.bits == 16 else f'int{entry.bits}'}"] += entry.numel
        return weights.most_common(1)[0][0]

    def to_dict(self) -> dict[str, Any]:
        """The content of ``quantization_config``."""
        entries = {name: entry.to_dict() for name, entry in self.matrices.items()}
        return {"quant_method": METHOD, "format_version": VERSION, "matrices": entries}

    @classmethod
    def from_dict(cls, data: Any) -> Header:
        """Read and check a header.

        Raises:
            UnsupportedModelError: for a version that is not known, or a machine with the other byte order.
            CheckpointError: when it makes no sense.
        """
        if not isinstance(data, Mapping) or data.get("quant_method") != METHOD:
            raise _broken("it is not one of secateur")
        version = data.get("format_version")
        if type(version) is not int:
            raise _broken("it has no format_version")
        if version != VERSION:
            raise UnsupportedModelError(
                f"config.json: the sparse format has version {version}, this secateur reads version {VERSION}",
                hint="a newer secateur may read it" if version > VERSION else "export the model again",
            )
        if sys.byteorder != "little":
            raise UnsupportedModelError("the sparse format needs a machine that stores the low byte first")
        unknown = set(data) - {"quant_method", "format_version", "matrices"}
        if unknown:
            raise _broken(f"it has an unknown key {min(map(str, unknown))!r}")
        matrices = data.get("matrices")
        if not isinstance(matrices, Mapping) or not 0 < len(matrices) <= MOST:
            raise _broken("it names no matrices")
        found = {}
        for name, entry in matrices.items():
            if not isinstance(name, str) or not all(part.isidentifier() or part.isdigit() for part in name.split(".")):
                raise _broken(f"{name!r:.80} is no name of a module")
            found[name] = Entry.from_dict(name, entry)
        return cls(found)


def header_of(config: Mapping[str, Any]) -> Header | None:
    """The header in a config.json; None when its model is not packed by secateur.

    Raises:
        UnsupportedModelError: see `Header.from_dict`.
        CheckpointError: likewise.
    """
    data = config.get("quantization_config")
    if not isinstance(data, Mapping) or data.get("quant_method") != METHOD:
        return None
    return Header.from_dict(data)


def check_places(header: Header, stored: Mapping[str, tuple[Any, tuple[int, ...], int]], where: str | Path) -> None:
    """Compare the tensors that a header asks for with those that the files' own headers describe.

    Args:
        stored: name of a tensor -> number format (torch's), shape, and the byte of its file at which it begins.

    Raises:
        CheckpointError: naming the first that is missing, another, or at a place at which it cannot be read.
    """
    for key, (dtype, _, offset) in stored.items():
        # Files are mapped into memory: kernels would read whole numbers at odd addresses.
        if offset % dtype.itemsize:
            raise CheckpointError(
                f"{where}: tensor {key} begins at byte {offset}, which is no multiple of {dtype.itemsize}",
                hint="the file was changed or damaged; download or export it again",
            )
    for name, entry in header.matrices.items():
        for part, wanted in entry.parts().items():
            key = f"{name}.{part}"
            if key not in stored:
                raise CheckpointError(
                    f"{where}: packed matrix {name} lacks its tensor {key}", hint="download or export it again"
                )
            if stored[key][:2] != wanted:
                raise bad(name, f"its tensor {key} is {_told(stored[key][:2])}, the header says {_told(wanted)}")


def _told(place: tuple[Any, tuple[int, ...]]) -> str:
    return f"{str(place[0]).removeprefix('torch.')} {list(place[1])}"


def _broken(why: str) -> CheckpointError:
    return CheckpointError(
        f"the header of the sparse format (quantization_config in config.json) makes no sense: {why}",
        hint="the file was changed or damaged; download or export it again",
    )
