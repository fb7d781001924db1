"""Leaves whole blocks out: the config and the checkpoint without them, and the proof.

The blocks that stay are numbered anew in the checkpoint and in the config, so that caches find their places, and lists
in the config with an entry for every block lose the same entries. Skip, then remove: that the whole model with the
blocks skipped and the model without them agree is tried on random weights before anything is written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.view import CheckpointView
from secateur.engine.activations import ActivationStore
from secateur.engine.binding import Binding
from secateur.engine.blocks import Structure, find_structure
from secateur.engine.forward import NoSink, forward_outputs, probe_inputs
from secateur.engine.inputs import output_tensor
from secateur.engine.skeleton import skeleton_of
from secateur.errors import SparsityError, UnsupportedModelError
from secateur.structured.configure import changed
from secateur.structured.explore import RandomTensors
from secateur.structured.proof import TOLERANCE


@dataclass(frozen=True)
class DepthPlan:
    """A model without some of its blocks."""

    kept: list[int]
    blocks: int
    """How many there were."""
    skeleton: transformers.PreTrainedModel
    changes: dict[tuple[str, ...], Any]
    origin: dict[str, str]
    """Checkpoint key -> key in the source."""
    difference: float
    """Between blocks skipped and blocks removed, as a share of the largest output."""

    def line(self) -> str:
        """The plan in words."""
        gone = [index for index in range(self.blocks) if index not in self.kept]
        return f"blocks: {self.blocks} -> {len(self.kept)}, without {', '.join(map(str, gone))}"


def block_count(structure: Structure, share: float) -> int:
    """Blocks to remove for a share of the prunable weights.

    Raises:
        UnsupportedModelError: when the blocks are not one row.
        SparsityError: when the request comes to no block, or to all of them.
    """
    rows = {block.name.rpartition(".")[0] for block in structure.blocks}
    if len(rows) > 1:
        raise UnsupportedModelError(
            f"the blocks are {len(rows)} rows ({', '.join(sorted(rows))}), and leaving some out is not possible yet",
            hint="choose another --structure",
        )
    total = len(structure.blocks)
    wanted = share * total
    count = round(wanted)
    if not 0 < count < total:
        raise SparsityError(
            f"{wanted:.2f} of {total} blocks cannot be left out",
            hint=f"one block is {1 / total:.1%} of the weights, and at least one stays; choose another --sparsity",
        )
    return count


def without_blocks(
    config: transformers.PreTrainedConfig, model: transformers.PreTrainedModel, structure: Structure, binding: Binding,
    reader: CheckpointReader, gone: Sequence[int],
) -> DepthPlan:  # fmt: skip
    """The model without some blocks, proved on random weights.

    Args:
        config: as it was read, unchanged.
        model: without weights, of that config.
        gone: numbers of the blocks to leave out.

    Raises:
        UnsupportedModelError: when no config of this model says it, or it computes something else.
    """
    total = len(structure.blocks)
    kept = [index for index in range(total) if index not in set(gone)]
    origin = _renumbered(structure, binding, reader, kept)
    probe = probe_inputs(model, tokens=12)
    expected = _answer(model, structure, binding, RandomTensors(reader), probe, frozenset(gone))
    reason = "its config has no entry for the number of its blocks"
    for entries in _candidates(config, total, kept):
        try:
            skeleton = skeleton_of(changed(config, entries))
        except Exception:  # noqa: BLE001 - a config may refuse values in any way; then it was not this entry
            continue
        small, view = find_structure(skeleton), CheckpointView(reader.folder, origin)
        own = Binding(skeleton, view.keys)
        if len(small.blocks) != len(kept) or own.missing or len(own.unbound) > len(binding.unbound):
            continue
        found = _answer(skeleton, small, own, RandomTensors(view, origin), probe, frozenset())
        difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        if difference <= TOLERANCE:
            return DepthPlan(kept, total, skeleton, entries, origin, difference)
        reason = f"blocks left out and blocks skipped differ by {difference:.2g}"
    raise UnsupportedModelError(
        f"{type(model).__name__} cannot do without blocks: {reason}", hint="choose another --structure"
    )


def _renumbered(
    structure: Structure, binding: Binding, reader: CheckpointReader, kept: Sequence[int]
) -> dict[str, str]:
    """New key -> old key: blocks that stay have new numbers, everything outside the blocks keeps its name."""
    of_block = {key: block for block in structure.blocks for key in binding.keys_of(block.tensors)}
    numbers = {structure.blocks[old].name: new for new, old in enumerate(kept)}
    origin: dict[str, str] = {}
    for key in reader.keys:
        block = of_block.get(key)
        if block is None:
            origin[key] = key
        elif block.name in numbers:
            parts = key.split(".")
            place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
            if place is None or parts[place] != block.name.rpartition(".")[2]:
                raise UnsupportedModelError(
                    f"tensor {key} does not say in its name that it is in block {block.index}",
                    hint="blocks of this model cannot be numbered anew",
                )
            parts[place] = str(numbers[block.name])
            origin[".".join(parts)] = key
    return origin


def _candidates(
    config: transformers.PreTrainedConfig, total: int, kept: Sequence[int]
) -> Iterator[dict[tuple[str, ...], Any]]:
    """Config entries for fewer blocks: the number, lists with an entry a block, lists of block numbers."""
    known = config.to_dict()
    name = dict(getattr(config, "attribute_map", {})).get("num_hidden_layers", "num_hidden_layers")
    lists = {
        key: [value[i] for i in kept] for key, value in known.items() if isinstance(value, list) and len(value) == total
    }
    numbers = {
        key: [kept.index(i) for i in value if i in kept]
        for key, value in known.items()
        if isinstance(value, list) and len(value) != total and "layer" in key and value
        and all(type(i) is int and 0 <= i < total for i in value)
    }  # fmt: skip
    base: dict[tuple[str, ...], Any] = {(name,): len(kept)}
    cut = {**base, **{(key,): value for key, value in lists.items()}}
    yield {**cut, **{(key,): value for key, value in numbers.items()}}
    if numbers:
        yield cut
    if lists:
        yield base


def _answer(
    model: transformers.PreTrainedModel, structure: Structure, binding: Binding, source: RandomTensors,
    probe: Mapping[str, torch.Tensor], skip: frozenset[int],
) -> torch.Tensor:  # fmt: skip
    store = ActivationStore(None, Path(tempfile.gettempdir()))
    found: list[torch.Tensor] = []

    def take(index: int, output: Any) -> float:
        found.append(output_tensor(output).float())
        return 0.0

    forward_outputs(model, structure, binding, source, NoSink(source), store, [dict(probe)], take, skip=skip)
    return found[0]
