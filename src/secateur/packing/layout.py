"""Which tensors a packed matrix is made of, by kind, bits and shape. `docs/sparse-format.md` says the same in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from secateur.errors import CheckpointError

WORD = 64
"""Columns in one word of a mask; groups of a scale are a multiple of it."""
PADDING = 64
"""Bytes of zero behind the last value, so that whole vectors can be loaded from any of them."""
KINDS = ("mask", "2:4", "dense")
BITS = (16, 8, 4)
LARGEST = 2**31 - 1
"""Rows or columns of a matrix at most: their product stays far from the end of 64 bits."""
PARTS = ("mask", "index", "values", "scales")
_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

Tensors = Mapping[str, torch.Tensor]
"""The tensors of one packed matrix by part: ``mask`` or ``index``, ``values``, ``scales``."""


@dataclass(frozen=True)
class Entry:
    """One packed matrix, as the header describes it."""

    kind: str
    """mask: one bit a weight and the values that are not zero; 2:4: two indices for every four columns and their
    values; dense: every value."""
    rows: int
    """Outputs."""
    columns: int
    """Inputs."""
    bits: int
    """Of a value: 16, 8 or 4."""
    values: int
    """Elements of the tensor of values without its padding: numbers of 16 or 8 bits, or bytes of two numbers."""
    group_size: int = 0
    """Columns that share a scale; 0 is the whole row. Without meaning for 16 bits."""
    dtype: str = ""
    """Of values of 16 bits: bfloat16 or float16."""
    transposed: bool = False
    """Whether the model holds the matrix as (inputs, outputs)."""

    @property
    def words(self) -> int:
        """Words of a mask, for one row."""
        return -(-self.columns // WORD)

    @property
    def groups(self) -> int:
        """Scales of one row."""
        return -(-self.columns // self.group_size) if self.group_size else 1

    @property
    def numel(self) -> int:
        """Weights, zeros included."""
        return self.rows * self.columns

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight in the model."""
        return (self.columns, self.rows) if self.transposed else (self.rows, self.columns)

    @property
    def value_dtype(self) -> torch.dtype:
        """Number format of the stored values."""
        return {16: _HALVES.get(self.dtype, torch.bfloat16), 8: torch.int8, 4: torch.uint8}[self.bits]

    def row_values(self) -> int | None:
        """Elements of the values of one row, where all rows have the same: not with a mask."""
        numbers = {"2:4": self.columns // 2, "dense": self.columns}.get(self.kind)
        if numbers is None or self.bits != 4:
            return numbers
        return -(-numbers // 2)

    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Number format and shape of each tensor."""
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if self.kind == "mask":
            found["mask"] = torch.int64, (self.rows, self.words)
        if self.kind == "2:4":
            found["index"] = torch.uint8, (self.rows, -(-self.columns // 8))
        found["values"] = self.value_dtype, (self.values + PADDING // self.value_dtype.itemsize,)
        if self.bits < 16:
            found["scales"] = torch.bfloat16, (self.rows, self.groups)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        total = 0
        for dtype, shape in self.parts().values():
            count = 1
            for size in shape:
                count *= size
            total += count * dtype.itemsize
        return total

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the header."""
        data = asdict(self)
        left_out = [key for key in ("group_size", "dtype", "transposed") if not data[key]]
        return {key: value for key, value in data.items() if key not in left_out}

    @classmethod
    def from_dict(cls, name: str, data: Any) -> Entry:
        """Read one entry of a header, trusting nothing.

        Raises:
            CheckpointError: naming what makes no sense.
        """
        if not isinstance(data, dict):
            raise bad(name, "its entry is not an object")
        unknown = set(data) - set(cls.__dataclass_fields__)
        if unknown:
            raise bad(name, f"its entry has an unknown key {min(map(str, unknown))!r}")
        for key in ("rows", "columns", "bits", "values", "group_size"):
            number = data.get(key, 0 if key == "group_size" else None)
            if type(number) is not int or not 0 <= number <= (2**62 if key == "values" else LARGEST):
                raise bad(name, f"{key} is {_short(number)}")
        entry = cls(**{"group_size": 0, **data})
        if entry.kind not in KINDS:
            raise bad(name, f"its kind is {_short(entry.kind)}, known are {', '.join(KINDS)}")
        if entry.rows < 1 or entry.columns < 1:
            raise bad(name, f"it has {entry.rows} rows and {entry.columns} columns")
        if entry.bits not in BITS:
            raise bad(name, f"it has {entry.bits} bits, known are {', '.join(map(str, BITS))}")
        if entry.dtype not in (tuple(_HALVES) if entry.bits == 16 else ("",)):  # a tuple: it may be no key of a table
            raise bad(name, f"its dtype is {_short(entry.dtype)} at {entry.bits} bits")
        if entry.group_size % WORD or (entry.bits == 16 and entry.group_size):
            raise bad(name, f"its group_size is {entry.group_size} at {entry.bits} bits")
        if type(entry.transposed) is not bool:
            raise bad(name, f"transposed is {_short(entry.transposed)}")
        if entry.kind == "2:4" and entry.columns % 4:
            raise bad(name, f"it is 2:4 and has {entry.columns} columns")
        expected, most = entry.row_values(), entry.numel
        if entry.values > most or (expected is not None and entry.values != expected * entry.rows):
            raise bad(name, f"it has {entry.values} values in {entry.rows} rows of {entry.columns}")
        return entry


def bad(name: str, why: str) -> CheckpointError:
    """The error of a packed matrix that makes no sense."""
    return CheckpointError(
        f"packed matrix {name}: {why}", hint="the file was changed or damaged; download or export it again"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
