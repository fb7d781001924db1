"""Which rows feed the columns of stacked experts: tried by zeroing, since the experts of a block run as one module.

Of a pair of stacked matrices (experts, ...) one is the consumer, whose columns are the neurons of every expert, and the
others of the same module feed it. In which order their rows stand (gate and up one after the other, or in turn) is
decided by numbers: with the rows of some neurons at zero the block must give what it gives with their columns at zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.blocks import Block, MatrixSpec
from secateur.engine.inputs import output_tensor
from secateur.structured.couplings import Coupling, Cut


def find_expert_neurons(
    block: Block, module: nn.Module, run: Callable[[], Any], tensors: Mapping[str, Tensor]
) -> list[Coupling]:
    """The couplings of stacked experts of a block; arguments as of `couplings.find_couplings`."""
    found = []
    stacked = [matrix for matrix in block.matrices if matrix.experts]
    for consumer in stacked:
        producers = [matrix for matrix in stacked if matrix.module == consumer.module and matrix != consumer]
        if producers and (coupling := _coupling(block, module, run, tensors, consumer, producers)) is not None:
            found.append(coupling)
    return found


def _coupling(
    block: Block, module: nn.Module, run: Callable[[], Any], tensors: Mapping[str, Tensor], consumer: MatrixSpec,
    producers: Sequence[MatrixSpec],
) -> Coupling | None:  # fmt: skip
    width = consumer.in_features
    number = torch.arange(width)
    columns = Cut(consumer.name, 1 if consumer.transposed else 2, number[:, None])
    some = number[number % 3 == 1]
    owner = module.get_submodule(consumer.module.removeprefix(f"{block.name}."))
    whole = output_tensor(run()).float().clone()
    with _zeroed(owner, consumer.module, [columns], some):
        wanted = output_tensor(run()).float().clone()
    if not (wanted - whole).abs().max() > 1e-6 * whole.abs().max():
        return None
    for rows in itertools.product(*(list(_layouts(producer, width)) for producer in producers)):
        cuts = [cut for producer, own in zip(producers, rows, strict=True) for cut in _cuts_of(producer, own, tensors)]
        with _zeroed(owner, consumer.module, cuts, some):
            found = output_tensor(run()).float().clone()
        if (found - wanted).abs().max() <= 1e-5 * whole.abs().max():
            return Coupling("ffn", consumer.name, number[:, None], (columns, *cuts), experts=consumer.experts)
    return None


def _layouts(producer: MatrixSpec, width: int) -> Iterator[Tensor]:
    number = torch.arange(width)
    if producer.out_features == width:
        yield number[:, None]
    if producer.out_features == 2 * width:
        yield torch.stack([number, width + number], dim=1)
        yield torch.stack([2 * number, 2 * number + 1], dim=1)


def _cuts_of(producer: MatrixSpec, rows: Tensor, tensors: Mapping[str, Tensor]) -> list[Cut]:
    cuts = [Cut(producer.name, 2 if producer.transposed else 1, rows)]
    bias = tensors.get(f"{producer.name}_bias")
    if bias is not None and tuple(bias.shape) == (producer.experts, producer.out_features):
        cuts.append(Cut(f"{producer.name}_bias", 1, rows))
    return cuts


@contextmanager
def _zeroed(owner: nn.Module, path: str, cuts: Sequence[Cut], units: Tensor) -> Iterator[None]:
    """While it lasts, the slices of these units are zero."""
    saved: list[tuple[Tensor, Tensor]] = []
    with torch._C.DisableTorchFunction(), torch.no_grad():
        for cut in cuts:
            parameter = owner._parameters[cut.name.removeprefix(f"{path}.")]
            assert parameter is not None
            saved.append((parameter, parameter.clone()))
            parameter.index_fill_(cut.dim, cut.indices[units].reshape(-1), 0.0)
    try:
        yield
    finally:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for changed, old in saved:
                changed.copy_(old)
