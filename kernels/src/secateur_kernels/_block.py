"""A block of a model as the library sees it: its seven matrices and two norms, without its attention."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from secateur_kernels import _library
from secateur_kernels._library import KernelError, refused
from secateur_kernels._matrix import Matrix, _code, _need

# struct sk_norm of secateur_kernels.h
_NORM = struct.Struct("=Qif")


class Block:
    """What one token goes through before and behind the attention; everything that it points to is kept alive."""

    def __init__(self, matrices: Sequence[Matrix], norms: Sequence[tuple[Any, float]], head: int) -> None:
        """
        Args:
            matrices: query, key, value, output, gate, up, down.
            norms: before the attention and before the network: weight, (columns,), and epsilon.
            head: numbers of a head.

        Raises:
            KernelError: when they do not fit together.
        """
        query, key, value, output, gate, up, down = matrices
        hidden = query.columns
        fits = (
            key.columns == value.columns == output.rows == gate.columns == up.columns == down.rows == hidden
            and output.columns == query.rows
            and gate.rows == up.rows == down.columns
            and key.rows == value.rows
            and head > 0
            and query.rows % head == key.rows % head == 0
        )
        if not fits:
            raise KernelError("the matrices of the block do not fit together")
        for weight, _ in norms:
            _need("norm", weight, ("torch.float32", "torch.bfloat16", "torch.float16"), (hidden,))
        self.hidden, self.head, self.queries, self.rows = hidden, head, query.rows, query.rows + 2 * key.rows
        self.groups = key.rows // head
        self._held = (tuple(matrices), tuple(norms))
        self._first = b"".join(matrix.data for matrix in matrices[:3])
        self._second = b"".join(matrix.data for matrix in matrices[3:])
        self._norms = [_NORM.pack(weight.data_ptr(), _code(weight.dtype), epsilon) for weight, epsilon in norms]
        self.data = self._first + self._second + b"".join(self._norms)  # the beginning of struct sk_block

    def before(self, x: Any, cosines: Any, sines: Any, out: Any, activations: int = 0, threads: int = 1) -> None:
        """Norm, products and rotation: ``out`` is query, key and value side by side.

        Args:
            x: one token, contiguous; all are of its dtype.
            cosines: (..., rotated), contiguous; ``sines`` as well.
            out: as many numbers as the three matrices have rows, contiguous.

        Raises:
            KernelError: when they do not fit together.
        """
        rotated = cosines.shape[-1]
        self._see((x, self.hidden), (out, self.rows), (cosines, rotated), (sines, rotated))
        status = _library.block_before(
            self._first, self._norms[0], x.data_ptr(), _code(x.dtype), cosines.data_ptr(), sines.data_ptr(), self.head,
            rotated, activations, out.data_ptr(), threads,
        )  # fmt: skip
        if status:
            raise refused(status)

    def behind(self, attended: Any, x: Any, out: Any, activations: int = 0, threads: int = 1) -> None:
        """Output, sum, norm, gated network (silu) and sum.

        Args:
            attended: what the attention gives, as many numbers as the query has rows; contiguous, as all are.
            x: what came into the block.

        Raises:
            KernelError: when they do not fit together.
        """
        self._see((x, self.hidden), (attended, self.queries), (out, self.hidden))
        status = _library.block_behind(
            self._second, self._norms[1], attended.data_ptr(), x.data_ptr(), _code(x.dtype), activations,
            out.data_ptr(), threads,
        )  # fmt: skip
        if status:
            raise refused(status)

    @staticmethod
    def _see(*wanted: tuple[Any, int]) -> None:
        dtype = wanted[0][0].dtype
        for tensor, count in wanted:
            if tensor.numel() != count or tensor.dtype != dtype or not tensor.is_contiguous():
                raise KernelError(f"a tensor is {tuple(tensor.shape)} of {tensor.dtype}, not {count} of {dtype}")
