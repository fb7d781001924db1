"""What can be removed from a model, and in which numbers: each structure is tried and proved before any is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import transformers

from secateur.checkpoint.reader import CheckpointReader
from secateur.engine.binding import Binding
from secateur.engine.blocks import Structure
from secateur.errors import SparsityError, UnsupportedModelError
from secateur.structured.configure import legal_counts
from secateur.structured.couplings import Coupling, Kind
from secateur.structured.depth import DepthPlan, row_counts, without_blocks
from secateur.structured.plan import WidthPlan, couplings_of_blocks, of_kind, plan_counts


@dataclass
class Offers:
    """The structures of a model that can be cut."""

    depth: DepthPlan | None = None
    """The model with half of its blocks, when blocks can go."""
    sizes: dict[Kind, list[int]] = field(default_factory=dict)
    """By kind: numbers of units that may stay, descending, less than there are."""
    smallest: dict[Kind, WidthPlan] = field(default_factory=dict)
    """By kind: the model with the smallest number."""
    couplings: dict[int, list[Coupling]] = field(default_factory=dict)
    """By block: those of the kinds above."""
    refused: dict[str, str] = field(default_factory=dict)
    """Structure -> why it cannot be cut."""


def find_offers(
    config: transformers.PreTrainedConfig, model: transformers.PreTrainedModel, structure: Structure, binding: Binding,
    reader: CheckpointReader, wanted: Sequence[str], round_to: int,
) -> Offers:  # fmt: skip
    """Try each structure on random weights.

    Args:
        wanted: names of structures, all of which must be possible; or ``auto`` for depth, ffn, and kv-groups or else
            heads, of which those that are not possible are left out.

    Raises:
        UnsupportedModelError: when one that was named is not possible, or none is.
    """
    auto = list(wanted) == ["auto"]
    offers = Offers()
    every: dict[int, list[Coupling]] | None = None
    for name in ("depth", "ffn", "kv-groups", "heads") if auto else wanted:
        if auto and name == "heads" and "kv-groups" in offers.sizes:
            continue
        try:
            if name == "depth":
                offers.depth = _half(config, model, structure, binding, reader)
            else:
                if every is None:
                    every = couplings_of_blocks(model, structure, binding, reader)
                _add_widths(offers, name, config, model, structure, binding, reader, every, round_to)
        except UnsupportedModelError as error:
            if not auto:
                raise
            offers.refused[name] = error.message
    if offers.depth is None and not offers.sizes:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in offers.refused.items())
        raise UnsupportedModelError(
            f"no structure of this model can be cut ({reasons})", hint="without --budget single weights are pruned"
        )
    offers.couplings = {
        block.index: [coupling for coupling in (every or {}).get(block.index, []) if coupling.kind in offers.sizes]
        for block in structure.blocks
    }
    return offers


def _half(
    config: transformers.PreTrainedConfig, model: transformers.PreTrainedModel, structure: Structure, binding: Binding,
    reader: CheckpointReader,
) -> DepthPlan:  # fmt: skip
    try:
        counts = row_counts(structure, 0.5)
    except SparsityError:
        raise UnsupportedModelError("there is only one block", hint="choose another --structure") from None
    if len(rows := {block.row for block in structure.blocks}) > 1:
        raise UnsupportedModelError(
            f"the blocks are {len(rows)} rows, and a budget is not split over several",
            hint="use --structure depth with --sparsity",
        )
    gone = list(range(len(structure.blocks)))[1::2][: sum(counts.values())]
    return without_blocks(config, model, structure, binding, reader, gone)


def _add_widths(
    offers: Offers, name: str, config: transformers.PreTrainedConfig, model: transformers.PreTrainedModel,
    structure: Structure, binding: Binding, reader: CheckpointReader, every: Mapping[int, Sequence[Coupling]],
    round_to: int,
) -> None:  # fmt: skip
    kind: Kind = "ffn" if name == "ffn" else "kv-groups" if name == "kv-groups" else "heads"
    own = of_kind(every, kind, structure)
    units, step = own[0].units, round_to if kind == "ffn" else own[0].parts
    if units <= step:
        raise UnsupportedModelError(
            f"a block has {units} {name} and they go in steps of {step}: none can go",
            hint="choose another --structure" + (", or a smaller --round-to" if kind == "ffn" else ""),
        )
    sizes = list(range((units - 1) // step * step, 0, -step)) if kind == "ffn" else legal_counts(config, own)
    # Where no number is legal the attempt says why.
    lowest = sizes[-1] if sizes else units - step
    try:
        offers.smallest[kind] = plan_counts(config, model, structure, binding, reader, every, {kind: lowest})
    except SparsityError as error:
        raise UnsupportedModelError(error.message, hint=error.hint) from None
    offers.sizes[kind] = sizes
