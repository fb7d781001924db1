"""The kernels as operators of PyTorch, ``torch.ops.secateur``, with shapes for tracing, so that compiling works.

They are defined whether the wheel is there or not; running one takes it (`secateur.runtime.kernels`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.packing.layout import KINDS, Entry, Tensors
from secateur.runtime.kernels import find

if TYPE_CHECKING:
    from secateur.runtime.modules import Packed, SparseLinear

TOKENS = 32
"""Rows of activations up to which the product works on packed weights; above, rows are unpacked and multiplied.
Measured by `benchmarks/prefill.py`."""
BLOCK = 1 << 19
"""Weights that are unpacked at once: a megabyte in bfloat16 stays in the cache of a core."""
MOST_TOGETHER = 16
"""Matrices of one product."""
MOST_COLUMNS = 131072
"""Of a matrix that has kernels."""
_PARTS = "Tensor values, Tensor? pattern, Tensor? scales, Tensor? starts"
_LAYOUT = "int kind, int rows, int columns, int bits, int group_size"

_library = torch.library.Library("secateur", "DEF")
_library.define(f"packed_linear(Tensor x, {_PARTS}, Tensor? bias, {_LAYOUT}, int activations) -> Tensor")
_library.define(f"unpack_rows({_PARTS}, {_LAYOUT}, int first, int last, ScalarType dtype) -> Tensor")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_described: dict[tuple[Any, ...], Any] = {}
"""Descriptions by all they depend on, addresses among it: whoever calls with these addresses holds their memory."""
_MOST_DESCRIBED = 4096


def _describe(
    values: Tensor,
    pattern: Tensor | None,
    scales: Tensor | None,
    starts: Tensor | None,
    bias: Tensor | None,
    *layout: int,
) -> Any:
    key = (
        values.data_ptr(),
        values.numel(),
        0 if pattern is None else pattern.data_ptr(),
        0 if scales is None else scales.data_ptr(),
        0 if starts is None else starts.data_ptr(),
        None if bias is None else (bias.data_ptr(), bias.dtype),
        values.dtype,
        layout,
    )
    found = _described.get(key)
    if found is None:
        kind, rows, columns, bits, group_size = layout
        # The pattern was read when the module was loaded (`secateur.packing.check`); sizes are looked at here.
        found = find().module.describe(
            KINDS[kind],
            rows,
            columns,
            bits,
            values,
            group_size=group_size,
            pattern=pattern,
            scales=scales,
            starts=starts,
            bias=bias,
            whole=False,
            hold=False,
        )
        if len(_described) >= _MOST_DESCRIBED:
            _described.clear()
        _described[key] = found
    return found


def _packed_linear(
    x: Tensor,
    values: Tensor,
    pattern: Tensor | None,
    scales: Tensor | None,
    starts: Tensor | None,
    bias: Tensor | None,
    kind: int,
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    activations: int,
) -> Tensor:
    matrix = _describe(values, pattern, scales, starts, bias, kind, rows, columns, bits, group_size)
    flat = x.reshape(-1, columns).contiguous()
    out = torch.empty(flat.shape[0], rows, dtype=x.dtype)
    find().module.linear(matrix, flat, out, activations, torch.get_num_threads())
    return out.view(*x.shape[:-1], rows)


def _unpack_rows(
    values: Tensor,
    pattern: Tensor | None,
    scales: Tensor | None,
    starts: Tensor | None,
    kind: int,
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    first: int,
    last: int,
    dtype: torch.dtype,
) -> Tensor:
    matrix = _describe(values, pattern, scales, starts, None, kind, rows, columns, bits, group_size)
    out = torch.empty(last - first, columns, dtype=dtype)
    find().module.unpack(matrix, first, last, out, torch.get_num_threads())
    return out


_library.impl("packed_linear", _packed_linear, "CPU")
_library.impl("unpack_rows", _unpack_rows, "CPU")


def _shape_of_linear(x: Tensor, values: Tensor, *others: Any) -> Tensor:
    rows = others[5]  # pattern, scales, starts, bias, kind, rows
    return x.new_empty(*x.shape[:-1], rows)


def _shape_of_unpacked(values: Tensor, *others: Any) -> Tensor:
    columns, (first, last, dtype) = others[5], others[-3:]
    return values.new_empty(last - first, columns, dtype=dtype)


torch.library.register_fake("secateur::packed_linear", _shape_of_linear, lib=_library)
torch.library.register_fake("secateur::unpack_rows", _shape_of_unpacked, lib=_library)


def runs(entry: Entry, inputs: Tensor) -> bool:
    """Whether the kernels, where they are, can do the product; they have no gradients."""
    return (
        inputs.device.type == "cpu"
        and inputs.dtype in _DTYPES
        and entry.columns <= MOST_COLUMNS
        and not (torch.is_grad_enabled() and inputs.requires_grad)
    )


def linear(
    entry: Entry, tensors: Tensors, starts: Tensor, inputs: Tensor, bias: Tensor | None, activations: int
) -> Tensor:
    """``inputs W^T + bias`` on packed weights.

    Args:
        inputs: (..., columns).
        activations: of `secateur.runtime.kernels.activations`; of no matter at 16 bits.

    Returns:
        (..., rows), of the dtype of the inputs.
    """
    bias = None if bias is None else bias.detach()
    found: Tensor = torch.ops.secateur.packed_linear(
        inputs, *_parts(entry, tensors, starts), bias, *_layout(entry), activations
    )
    return found


def describe(module: Packed, bias: Tensor | None) -> Any:
    """A packed module as the kernels see it: valid while its tensors stay where they are."""
    values, pattern, scales, starts = _parts(module.entry, module.parts, module.parts["starts"])
    return _describe(values, pattern, scales, starts, bias, *_layout(module.entry))


def linear_many(modules: Sequence[SparseLinear], inputs: Tensor) -> list[Tensor]:
    """``inputs W^T + bias`` of several packed modules with as many columns, in one call.

    It is no operator, for handing over lists of tensors takes PyTorch longer than is saved: nothing that is traced may
    come here.

    Args:
        inputs: (..., columns), at most `TOKENS` of them.

    Returns:
        (..., rows) for each, of the dtype of the inputs: bit for bit what `linear` gives.
    """
    matrices = [describe(module, module.bias) for module in modules]
    flat = inputs.reshape(-1, modules[0].entry.columns).contiguous()
    rows = [matrix.rows for matrix in matrices]
    out = torch.empty(flat.shape[0], sum(rows), dtype=inputs.dtype)
    find().module.linear_many(matrices, flat, out, modules[0].activations, torch.get_num_threads())
    parts = torch.split_with_sizes(out.view(*inputs.shape[:-1], -1), rows, -1)
    return list(parts) if len(flat) == 1 else [part.contiguous() for part in parts]


def unpack(entry: Entry, tensors: Tensors, starts: Tensor, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Rows of the matrix, (last - first, columns): the numbers of `secateur.packing.unpack.unpack_rows`."""
    found: Tensor = torch.ops.secateur.unpack_rows(*_parts(entry, tensors, starts), *_layout(entry), first, last, dtype)
    return found


def _parts(
    entry: Entry, tensors: Tensors, starts: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    pattern = tensors.get("mask" if entry.kind == "mask" else "index")
    return tensors["values"], pattern, tensors.get("scales"), starts if entry.kind == "mask" else None


def _layout(entry: Entry) -> tuple[int, ...]:
    return KINDS.index(entry.kind), entry.rows, entry.columns, entry.bits, entry.group_size
