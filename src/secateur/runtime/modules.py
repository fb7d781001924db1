"""Modules that keep their weight packed: the kernels multiply with it, or it is unpacked, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import CheckpointError
from secateur.packing.check import check
from secateur.packing.layout import PARTS, Entry
from secateur.packing.unpack import BLOCK, gather_rows, row_blocks, unpack, unpack_rows
from secateur.runtime import kernels, ops

if TYPE_CHECKING:
    from secateur.runtime.siblings import Siblings


class Packed(nn.Module):
    """A packed weight: the tensors of the file as buffers, under the names they have there.

    ``weight`` unpacks all of it, for code that looks at the weights of others.
    """

    values: Tensor
    starts: Tensor
    """Where the values of each row begin; computed when the module is checked, never stored."""

    def __init__(self, entry: Entry, dtype: torch.dtype) -> None:
        """
        Args:
            dtype: number format of the outputs where the inputs do not say it, and of ``weight``.
        """
        super().__init__()
        self.entry = entry
        self.dtype = dtype
        self.activations: int | None = None
        """How the kernels take activations; None without kernels."""
        for part, (kind, shape) in entry.parts().items():
            self.register_buffer(part, torch.empty(shape, dtype=kind))

    @property
    def parts(self) -> Mapping[str, Tensor]:
        """The packed tensors by part, and ``starts``, of a module that was checked; at no cost."""
        return self._buffers  # type: ignore[return-value]

    def tensors(self) -> Mapping[str, Tensor]:
        """The packed tensors by part."""
        return {part: self._buffers[part] for part in PARTS if self._buffers.get(part) is not None}  # type: ignore[misc]

    def check(self, name: str) -> None:
        """Refuse what does not fit together; the module runs only after this.

        Raises:
            CheckpointError: naming the module and what is wrong with its tensors.
        """
        if any(tensor.is_meta for tensor in self.tensors().values()):
            raise CheckpointError(f"packed matrix {name} was not loaded", hint="its tensors are not in the checkpoint")
        self.register_buffer("starts", check(name, self.entry, self.tensors()), persistent=False)
        self.activations = None if kernels.find().module is None else kernels.activations()

    @property
    def weight(self) -> Tensor:
        """The weight as the model would hold it: (out, in), or (in, out) where its class holds it so.

        While the model is loaded it has no numbers: what would initialise it has nothing to do.
        """
        if "starts" not in self._buffers:
            return torch.empty(self.entry.shape, dtype=self.dtype, device="meta")
        whole = unpack(self.entry, self.tensors(), self.dtype, self.starts)
        return whole.T if self.entry.transposed else whole

    def product(self, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        """``inputs W^T + bias``.

        Args:
            inputs: (..., columns), any floating dtype, which is that of the result.

        Returns:
            (..., rows).
        """
        fast = self.activations is not None and ops.runs(self.entry, inputs)
        if fast and inputs.numel() <= ops.TOKENS * self.entry.columns:
            return self.few(inputs, bias)
        tensors, dtype = self.tensors(), inputs.dtype
        rows_of = ops.unpack if fast else unpack_rows
        parts = []
        for first, last in row_blocks(self.entry, ops.BLOCK if fast else BLOCK):
            rows = rows_of(self.entry, tensors, self.starts, first, last, dtype)
            own = None if bias is None else bias[first:last].to(dtype)
            parts.append(functional.linear(inputs, rows, own))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def few(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """``product`` of up to `ops.TOKENS` tokens, which the kernels compute."""
        assert self.activations is not None
        return ops.linear(self.entry, self.parts, self.parts["starts"], inputs, bias, self.activations)

    def rows(self, numbers: Tensor) -> Tensor:
        """Single rows, (*numbers.shape, columns)."""
        return gather_rows(self.entry, self.tensors(), numbers, self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Packed tensors go to other devices, but keep their number formats: ``half()`` is about outputs."""
        kept = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype

        def moved(tensor: Tensor) -> Tensor:
            mine = any(tensor is buffer for buffer in self._buffers.values())
            return (
                fn(tensor.view(torch.uint8)).view(tensor.dtype) if mine and tensor.is_floating_point() else fn(tensor)
            )

        super()._apply(moved, recurse)
        assert all(self._buffers[name].dtype == dtype for name, dtype in kept.items())  # type: ignore[union-attr]
        return self


class SparseLinear(Packed):
    """In the place of a Linear, or of a Conv1D as GPT-2 has them."""

    def __init__(self, entry: Entry, dtype: torch.dtype, bias: nn.Parameter | None) -> None:
        super().__init__(entry, dtype)
        self.bias = bias
        self.in_features, self.out_features = entry.columns, entry.rows
        self.siblings: Siblings | None = None
        """Others that may get the same input, and its place among them."""
        self.place = 0

    def forward(self, inputs: Tensor) -> Tensor:
        return self.product(inputs, self.bias)

    def few(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """``product`` of up to `ops.TOKENS` tokens; together with others that get the same, where there are any."""
        found = None if self.siblings is None else self.siblings.product(self.place, inputs)
        return super().few(inputs, bias) if found is None else found

    def extra_repr(self) -> str:
        return _told(self.entry)


class SparseEmbedding(Packed):
    """In the place of an Embedding; its rows are stored dense."""

    def __init__(self, entry: Entry, dtype: torch.dtype, padding_idx: int | None = None) -> None:
        super().__init__(entry, dtype)
        self.padding_idx = padding_idx
        self.num_embeddings, self.embedding_dim = entry.rows, entry.columns

    def forward(self, numbers: Tensor) -> Tensor:
        return self.rows(numbers)

    def extra_repr(self) -> str:
        return _told(self.entry)


class _Tied(nn.Module):
    """Uses the packed weight of another module; it holds none, so that the weight is saved once."""

    def __init__(self, owner: Packed) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple, or it would be registered as a part of this module

    @property
    def weight(self) -> Tensor:
        return self._owner[0].weight


class TiedLinear(_Tied):
    """A head tied to a packed embedding."""

    def __init__(self, owner: Packed, bias: nn.Parameter | None) -> None:
        super().__init__(owner)
        self.bias = bias
        self.in_features, self.out_features = owner.entry.columns, owner.entry.rows

    def forward(self, inputs: Tensor) -> Tensor:
        return self._owner[0].product(inputs, self.bias)


class TiedEmbedding(_Tied):
    """An embedding tied to a packed one."""

    def forward(self, numbers: Tensor) -> Tensor:
        return self._owner[0].rows(numbers)


def packed_for(module: nn.Module, entry: Entry, dtype: torch.dtype, name: str) -> Packed:
    """What takes the place of a module.

    Raises:
        CheckpointError: when the module is none that can be packed, or has another shape.
    """
    from transformers.pytorch_utils import Conv1D

    if type(module) in (nn.Linear, Conv1D) and entry.transposed == isinstance(module, Conv1D):
        made: Packed = SparseLinear(entry, dtype, module.bias)  # type: ignore[arg-type]
    elif type(module) is nn.Embedding and entry.kind == "dense" and not entry.transposed:
        made = SparseEmbedding(entry, dtype, module.padding_idx)
    else:
        raise CheckpointError(
            f"the header packs {name}, a {type(module).__name__} of the model, as {entry.kind}",
            hint="config.json does not belong to these weights",
        )
    weight: Any = module.weight
    if tuple(weight.shape) != entry.shape:
        raise CheckpointError(
            f"{name} is {list(entry.shape)} in the header, {list(weight.shape)} by the config",
            hint="config.json does not belong to these weights",
        )
    return made


def _told(entry: Entry) -> str:
    return f"{entry.columns}, {entry.rows}, {entry.kind}, {entry.bits} bits"
