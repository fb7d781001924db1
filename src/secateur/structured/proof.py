"""Zero, then remove: proves on numbers that a cut block computes what the whole one does with its units at zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from secateur.engine.blocks import Block
from secateur.engine.capture import copied_call
from secateur.engine.inputs import output_tensor
from secateur.engine.skeleton import set_tensor
from secateur.errors import UnsupportedModelError
from secateur.structured.configure import noun
from secateur.structured.couplings import Coupling
from secateur.structured.explore import Call

TOLERANCE = 1e-4
"""Largest difference, as a share of the largest output."""


def spread_units(coupling: Coupling, count: int) -> Tensor:
    """``count`` unit numbers, as many from each part, spread so that first and last units go as well as others."""
    each, size = count // coupling.parts, coupling.units // coupling.parts
    inside = (torch.arange(each) * size + size // 2) // each
    return (torch.arange(coupling.parts)[:, None] * size + inside).reshape(-1)


def cut_tensors(tensors: Mapping[str, Tensor], choices: Sequence[tuple[Coupling, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a block with only the chosen units of each coupling."""
    made = dict(tensors)
    for coupling, units in choices:
        for cut in coupling.cuts:
            made[cut.name] = cut.apply(made[cut.name], units)
    return made


def zero_units(tensors: Mapping[str, Tensor], coupling: Coupling, units: Tensor) -> dict[str, Tensor]:
    """The tensors with zeros in the consumer's columns of all units but the chosen ones."""
    cut = coupling.cuts[0]
    weight = tensors[cut.name].clone()
    stacked = units.ndim == 2  # units of each expert
    for part, stay in zip(weight, units, strict=True) if stacked else [(weight, units)]:
        gone = torch.ones(coupling.units, dtype=torch.bool)
        gone[stay] = False
        part.index_fill_(cut.dim - stacked, cut.indices[gone].reshape(-1), 0.0)
    return {**tensors, cut.name: weight}


def prove(
    block: Block, whole: nn.Module, small: nn.Module, call: Call,
    tensors: Mapping[str, Tensor], choices: Sequence[tuple[Coupling, Tensor]],
) -> float:  # fmt: skip
    """Run a block with units at zero, and the smaller block without them, on the same input.

    Args:
        whole, small: the models that hold the block, in the old and the new shapes.
        call: positional and keyword arguments of the block's forward.
        tensors: the block's, by full name.
        choices: couplings with the units that stay.

    Returns:
        The largest difference as a share of the largest output.

    Raises:
        UnsupportedModelError: when the small block cannot be run so, or computes something else.
    """
    zeroed = dict(tensors)
    for coupling, units in choices:
        zeroed = zero_units(zeroed, coupling, units)
    for model, made in ((whole, zeroed), (small, cut_tensors(tensors, choices))):
        for name, tensor in made.items():
            set_tensor(model, name, tensor)
    names = " and ".join(dict.fromkeys(noun(coupling.kind) for coupling, _ in choices))
    args, kwargs = copied_call(*call)
    with torch.no_grad():
        expected = output_tensor(whole.get_submodule(block.name)(*args, **kwargs)).float()
        args, kwargs = copied_call(*call)
        try:
            found = output_tensor(small.get_submodule(block.name)(*args, **kwargs)).float()
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise UnsupportedModelError(
                f"{block.name} cannot be run with fewer {names}: {reason}", hint="choose another --structure"
            ) from error
    difference = float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not difference <= TOLERANCE:
        raise UnsupportedModelError(
            f"{block.name} computes something else without {names} than with them at zero, by {difference:.2g}",
            hint="the units hang together there (by a norm over all of them, for example): choose another --structure",
        )
    return difference
