"""An allocation as a file: the sparsity of every matrix, with its shape, by which a file for another model is known."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import AllocationError, OutputError
from secateur.patterns import check_sparsity

ENDINGS = (".yaml", ".yml", ".json")
FORMAT = 1


@dataclass(frozen=True)
class AllocationFile:
    """What the file says."""

    sparsities: dict[str, float]
    """By name of a matrix."""
    shapes: dict[str, list[int]]
    sparsity: float
    """Of all of them together."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Model, rule and options it was made with."""


def is_file(allocation: str) -> bool:
    """Whether the ``allocation`` of a recipe names a file and not a rule."""
    return allocation.endswith(ENDINGS)


def write_allocation(path: Path, found: AllocationFile) -> None:
    """Write the file whole or not at all.

    Raises:
        OutputError: when it cannot be written.
    """
    import yaml

    head = {"format": FORMAT, **found.origin, "sparsity": found.sparsity}
    matrices = {name: {"shape": found.shapes[name], "sparsity": value} for name, value in found.sparsities.items()}
    text = yaml.safe_dump(head, sort_keys=False) + yaml.safe_dump(
        {"matrices": matrices}, sort_keys=False, default_flow_style=None, width=200
    )
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}", hint="give another file with -o") from error


def is_allocation_file(path: str | Path) -> bool:
    """Whether a file is one, or YAML that is no study: `allocate` writes YAML under any ending, a study has a space."""
    try:
        with Path(path).open("rb") as stream:
            lines = stream.read(1 << 20).splitlines()
    except OSError:
        return False  # told by who reads it
    if any(line.startswith((b"format:", b"matrices:")) for line in lines):
        return True
    return Path(path).suffix in (".yaml", ".yml") and not any(line.startswith(b"space:") for line in lines)


def read_allocation(path: str | Path) -> AllocationFile:
    """Read a file.

    Raises:
        AllocationError: when it is missing, is not YAML, or does not say a sparsity in [0, 1) for each matrix.
    """
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AllocationError(
            f"no allocation file {path}", hint="`secateur allocate MODEL -o FILE` writes one"
        ) from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: a date or number that is none
        raise AllocationError(
            f"{path} is not a readable YAML file: {' '.join(str(error).split())}", hint="write it anew"
        ) from None
    matrices = data.get("matrices") if isinstance(data, dict) else None
    if not isinstance(matrices, dict) or not matrices:
        raise AllocationError(f"{path} has no matrices", hint="`secateur allocate MODEL -o FILE` writes such a file")
    sparsities, shapes = {}, {}
    for name, entry in matrices.items():
        value = entry.get("sparsity") if isinstance(entry, dict) else None
        shape = entry.get("shape") if isinstance(entry, dict) else None
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
        if number is None or not isinstance(shape, list) or not all(_is_length(size) for size in shape):
            raise AllocationError(
                f"{path}: the entry of {name} is {reprlib.repr(entry)}",
                hint="it must be {shape: [out, in], sparsity: 0.5}",
            )
        sparsities[str(name)] = check_sparsity(number, f"{path}: sparsity of {name}")
        shapes[str(name)] = shape
    origin = {str(key): value for key, value in data.items() if key not in ("format", "matrices", "sparsity")}
    weights = {name: _size(shape) for name, shape in shapes.items()}
    total = sum(value * weights[name] for name, value in sparsities.items()) / max(1, sum(weights.values()))
    return AllocationFile(sparsities, shapes, total, origin)


def check_model(path: str, found: AllocationFile, shapes: Mapping[str, list[int]], wanted: Sequence[str]) -> None:
    """Refuse a file that was made for another model.

    Args:
        shapes: of all prunable matrices of the model.
        wanted: the matrices that need a sparsity.

    Raises:
        AllocationError: naming the first matrix that does not match, and how many do not.
    """
    hint = "make one for this model with `secateur allocate MODEL -o FILE`"
    unknown = [name for name in found.sparsities if name not in shapes]
    if unknown:
        raise AllocationError(f"{path} is for another model: this one has no matrix {_named(unknown)}", hint=hint)
    other = [name for name in found.shapes if found.shapes[name] != shapes[name]]
    if other:
        first, second = (" x ".join(map(str, one[other[0]])) for one in (found.shapes, shapes))
        raise AllocationError(
            f"{path} is for another model: {_named(other)} is {first} there, and {second} here", hint=hint
        )
    missing = [name for name in wanted if name not in found.sparsities]
    if missing:
        raise AllocationError(
            f"{path} has no sparsity for {_named(missing)}", hint=f"{hint}, or leave it out with --ignore"
        )


def _named(names: Sequence[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _is_length(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and 0 < size < 1 << 40


def _size(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
