"""A packed matrix as the library sees it, and the calls on it."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from secateur_kernels import _library
from secateur_kernels._library import KernelError, refused

KINDS = {"mask": 0, "2:4": 1, "dense": 2}
ACTIVATIONS = {"float": 0, "int8-token": 1, "int8-group": 2}
"""How activations meet weights of 8 and 4 bits: as they are; rounded to 8 bits with one scale a token; or with one for
every 64 columns."""
PADDING = 64
_TYPES = {"torch.float32": 0, "torch.bfloat16": 1, "torch.float16": 2}
_VALUES = {16: ("torch.bfloat16", "torch.float16"), 8: ("torch.int8",), 4: ("torch.uint8",)}
_PATTERNS = {"mask": "torch.int64", "2:4": "torch.uint8"}
# struct sk_matrix of secateur_kernels.h
_MATRIX = struct.Struct("=qqqqiiiiQQQQQ")
_codes: dict[Any, int] = {}


class Matrix:
    """A matrix that passed all checks, by the addresses of its tensors, which it keeps alive unless told not to."""

    __slots__ = ("columns", "data", "held", "rows")

    def __init__(self, data: bytes, rows: int, columns: int, held: tuple[Any, ...]) -> None:
        self.data, self.rows, self.columns, self.held = data, rows, columns, held


def describe(
    kind: str,
    rows: int,
    columns: int,
    bits: int,
    values: Any,
    *,
    group_size: int = 0,
    pattern: Any = None,
    scales: Any = None,
    starts: Any = None,
    bias: Any = None,
    whole: bool = True,
    hold: bool = True,
) -> Matrix:
    """Check the tensors of a matrix and write down where they are.

    Args:
        kind: mask, 2:4 or dense.
        values: as the format stores them, with 64 bytes of padding.
        pattern: int64 words of a mask, (rows, ceil(columns / 64)), or uint8 indices of 2:4, (rows, ceil(columns / 8)).
        scales: bfloat16, (rows, groups), at 8 and 4 bits.
        starts: int64, (rows + 1,): where the values of each row of a mask begin.
        bias: (rows,), float32, bfloat16 or float16.
        whole: also read the whole pattern, as must be done once for tensors that nobody has checked.
        hold: keep the tensors alive; False where the caller does.

    Raises:
        KernelError: naming what does not fit.
    """
    if kind not in KINDS or bits not in _VALUES:
        raise KernelError(f"no kernels for {kind!r} at {bits} bits")
    if columns < 1 or rows < 1 or group_size < 0:
        raise KernelError(f"rows {rows}, columns {columns}, group_size {group_size}")
    groups = -(-columns // group_size) if group_size else 1
    _need("values", values, _VALUES[bits], None)
    size = {16: 2, 8: 1, 4: 1}[bits]
    count = int(values.shape[0]) - PADDING // size if len(values.shape) == 1 else -1
    if count < 0:
        raise KernelError(f"values is {tuple(values.shape)}, not a row with {PADDING} bytes of padding")
    if kind != "dense":
        width = -(-columns // (64 if kind == "mask" else 8))
        _need("pattern", pattern, (_PATTERNS[kind],), (rows, width))
    if bits < 16:
        _need("scales", scales, ("torch.bfloat16",), (rows, groups))
    if kind == "mask":
        _need("starts", starts, ("torch.int64",), (rows + 1,))
    if bias is not None:
        _need("bias", bias, tuple(_TYPES), (rows,))
    data = _MATRIX.pack(
        rows,
        columns,
        count,
        group_size,
        KINDS[kind],
        bits,
        _code(values.dtype) if bits == 16 else 0,
        0 if bias is None else _code(bias.dtype),
        0 if kind == "dense" else pattern.data_ptr(),
        values.data_ptr(),
        scales.data_ptr() if bits < 16 else 0,
        starts.data_ptr() if kind == "mask" else 0,
        0 if bias is None else bias.data_ptr(),
    )
    if whole and (status := _library.check(data)):
        raise refused(status)
    return Matrix(data, rows, columns, (values, pattern, scales, starts, bias) if hold else ())


def linear(matrix: Matrix, x: Any, out: Any, activations: int = 0, threads: int = 1) -> None:
    """``out = x W^T + bias``.

    Args:
        x: (tokens, columns), contiguous, float32, bfloat16 or float16.
        out: (tokens, rows), contiguous, of the same dtype.
        activations: a value of `ACTIVATIONS`.

    Raises:
        KernelError: when they do not fit together.
    """
    tokens, columns = x.shape
    if columns != matrix.columns or out.shape != (tokens, matrix.rows) or out.dtype != x.dtype:
        raise KernelError(f"x {tuple(x.shape)}, out {tuple(out.shape)}, matrix ({matrix.rows}, {matrix.columns})")
    _run(matrix.data, 1, x, out, tokens, activations, threads)


def linear_many(matrices: Sequence[Matrix], x: Any, out: Any, activations: int = 0, threads: int = 1) -> None:
    """The products of several matrices with the same input, side by side in ``out``: (tokens, sum of their rows).

    Raises:
        KernelError: when they do not fit together.
    """
    tokens, columns = x.shape
    rows = sum(matrix.rows for matrix in matrices)
    if any(matrix.columns != columns for matrix in matrices) or out.shape != (tokens, rows) or out.dtype != x.dtype:
        raise KernelError(f"x {tuple(x.shape)}, out {tuple(out.shape)}, {rows} rows in {len(matrices)} matrices")
    _run(b"".join(matrix.data for matrix in matrices), len(matrices), x, out, tokens, activations, threads)


def unpack(matrix: Matrix, first: int, last: int, out: Any, threads: int = 1) -> None:
    """Rows ``first`` to ``last`` (exclusive) as numbers in ``out``: (last - first, columns), contiguous.

    Raises:
        KernelError: when they do not fit together.
    """
    if out.shape != (last - first, matrix.columns) or not out.is_contiguous():
        raise KernelError(f"out is {tuple(out.shape)} for rows {first} to {last} of {matrix.columns} columns")
    if status := _library.unpack(matrix.data, first, last, out.data_ptr(), _code(out.dtype), threads):
        raise refused(status)


def highest(x: Any) -> int:
    """The place of the first of the highest numbers, or of the first NaN; computed by the calling thread alone.

    Args:
        x: contiguous, float32, bfloat16 or float16; places are counted through all of its axes.

    Raises:
        KernelError: for another dtype, or without a number.
    """
    if not x.is_contiguous() or not x.numel():
        raise KernelError(f"x is {tuple(x.shape)}, or not contiguous")
    return int(_library.highest(x.data_ptr(), _code(x.dtype), x.numel()))


def _run(data: bytes, count: int, x: Any, out: Any, tokens: int, activations: int, threads: int) -> None:
    if not (x.is_contiguous() and out.is_contiguous()):
        raise KernelError("x and out must be contiguous")
    if status := _library.linear(
        data, count, x.data_ptr(), _code(x.dtype), tokens, activations, out.data_ptr(), threads
    ):
        raise refused(status)


def _code(dtype: Any) -> int:
    code = _codes.get(dtype)
    if code is None:
        code = _TYPES.get(str(dtype), -1)
        if code < 0:
            raise KernelError(f"no kernels for {dtype}")
        _codes[dtype] = code
    return code


def _need(name: str, tensor: Any, dtypes: tuple[str, ...], shape: tuple[int, ...] | None) -> None:
    if tensor is None or str(tensor.dtype) not in dtypes or (shape is not None and tuple(tensor.shape) != shape):
        found = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        raise KernelError(f"{name} is {found}, not {' or '.join(dtypes)}{'' if shape is None else f' {shape}'}")
    if not tensor.is_contiguous() or str(tensor.device) != "cpu":
        raise KernelError(f"{name} must be contiguous, and on the CPU")
