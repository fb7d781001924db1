"""A model as Llama is built as the library sees it, from the row of the embedding to the logits."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateur_kernels import _library
from secateur_kernels._block import _NORM, Block
from secateur_kernels._library import KernelError, refused
from secateur_kernels._matrix import Matrix, _code, _need

# What stands in struct sk_block of secateur_kernels.h behind its matrices and norms, and struct sk_cache
_REST = struct.Struct("=qqfi")
_CACHE = struct.Struct("=QQqqq")


@dataclass(frozen=True)
class Layer:
    """A block with what its attention needs."""

    block: Block
    rotated: int
    """Numbers of a head that are turned by their places; 0: none."""
    scale: float
    """Of the products of queries and keys."""


class Cache:
    """Keys and values of the tokens so far, with room for more, and the cosines and sines of those to come."""

    def __init__(
        self, layers: Sequence[tuple[Any, Any, int, int]], cosines: Any, sines: Any, *, hold: bool = True
    ) -> None:
        """
        Args:
            layers: of each block keys and values, (groups, places, head), contiguous and of one dtype; how many places
                are filled; and to how many a token attends, itself among them, 0 being all.
            cosines: (tokens, rotated), contiguous, of the tokens to come; ``sines`` as well.
            hold: keep keys and values alive; False where the caller does.

        Raises:
            KernelError: when there are fewer places than tokens to come, or tensors do not fit together.
        """
        dtype, room = cosines.dtype, cosines.shape[0]
        if sines.shape != cosines.shape or sines.dtype != dtype:
            raise KernelError("cosines and sines do not fit together")
        for keys, values, filled, window in layers:
            if len(keys.shape) != 3 or keys.shape != values.shape or filled < 0 or window < 0:
                raise KernelError(f"keys are {tuple(keys.shape)}, values {tuple(values.shape)}, {filled} filled")
            if keys.shape[1] - filled < room:
                raise KernelError(f"{keys.shape[1]} places, {filled} of them filled, have no room for {room}")
        for one in (cosines, sines, *(tensor for layer in layers for tensor in layer[:2])):
            _need("a tensor of the cache", one, (str(dtype),), None)
        self.shapes = [(layer[0].shape[0], layer[0].shape[2]) for layer in layers]
        self.dtype, self.rotated, self.room, self.steps = dtype, cosines.shape[1], room, 0
        """``steps``: tokens that came in since it was made, of ``room`` that may."""
        data = b"".join(
            _CACHE.pack(keys.data_ptr(), values.data_ptr(), keys.shape[1], filled, window)
            for keys, values, filled, window in layers
        )
        self._data = ctypes.create_string_buffer(data, len(data))
        self._turns = cosines.data_ptr(), sines.data_ptr(), self.rotated * (4 if _code(dtype) == 0 else 2)
        self._held = list(layers) if hold else [], cosines, sines


class Decoder:
    """Takes one token at a time through all blocks; everything that it points to is kept alive."""

    def __init__(self, layers: Sequence[Layer], norm: tuple[Any, float], head: Matrix | None) -> None:
        """
        Args:
            norm: behind the last block: weight, (hidden,), and epsilon.
            head: makes logits of what comes out of the norm; None leaves that to the caller.

        Raises:
            KernelError: when they do not fit together.
        """
        self.hidden = layers[0].block.hidden if layers else 0
        if not layers or any(layer.block.hidden != self.hidden for layer in layers):
            raise KernelError("there are no blocks, or some of another width")
        if head is not None and head.columns != self.hidden:
            raise KernelError(f"the head has {head.columns} columns, not {self.hidden}")
        _need("norm", norm[0], ("torch.float32", "torch.bfloat16", "torch.float16"), (self.hidden,))
        self.outputs = self.hidden if head is None else head.rows
        self._held = list(layers), norm, head
        self._count = len(layers)
        self._shapes = [(layer.block.groups, layer.block.head) for layer in layers]
        self._rotated = max(layer.rotated for layer in layers)
        self._blocks = b"".join(
            layer.block.data + _REST.pack(layer.block.head, layer.rotated, layer.scale, 0) for layer in layers
        )
        self._norm = _NORM.pack(norm[0].data_ptr(), _code(norm[0].dtype), norm[1])
        self._head = None if head is None else head.data

    def step(self, cache: Cache, x: Any, out: Any, activations: int = 0, threads: int = 1) -> None:
        """Take a token through all blocks; its keys and values are in the cache from then on.

        Args:
            x: its row of the embedding, contiguous, of the dtype of the cache.
            out: as many numbers as the head has rows; without a head the normed row of ``x``'s size.

        Raises:
            KernelError: when they do not fit together, or the cache has no room.
        """
        for tensor, count in ((x, self.hidden), (out, self.outputs)):
            if tensor.numel() != count or tensor.dtype != cache.dtype or not tensor.is_contiguous():
                raise KernelError(f"a tensor is {tuple(tensor.shape)} of {tensor.dtype}, not {count} of {cache.dtype}")
        if cache.shapes != self._shapes or cache.rotated < self._rotated:
            raise KernelError("the cache is that of another model")
        if cache.steps >= cache.room:
            raise KernelError("the cache has no room")
        cosines, sines, width = cache._turns
        turn = cache.steps * width
        status = _library.decode(
            self._blocks, cache._data, self._count, self._norm, self._head, x.data_ptr(), _code(x.dtype),
            cosines + turn, sines + turn, activations, out.data_ptr(), threads,
        )  # fmt: skip
        if status:
            raise refused(status)
        cache.steps += 1
