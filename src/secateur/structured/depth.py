"""Leaves whole blocks out: the config and the checkpoint without them, and the proof.

The blocks that stay are numbered anew in the checkpoint and in the config, so that caches find their places, and lists
in the config with an entry for every block lose the same entries. Skip, then remove: that the whole model with the
blocks skipped and the model without them agree is tried on random weights before anything is written.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.view import CheckpointView
from secateur.engine.activations import ActivationStore
from secateur.engine.binding import Binding
from secateur.engine.blocks import Structure, find_structure, signature
from secateur.engine.entries import changed, entries_of
from secateur.engine.forward import NoSink, forward_outputs, probe_inputs
from secateur.engine.inputs import output_tensor
from secateur.engine.skeleton import skeleton_of
from secateur.errors import SparsityError, UnsupportedModelError
from secateur.structured.explore import RandomTensors
from secateur.structured.fewer import Row, fewer_blocks, for_every_block
from secateur.structured.proof import TOLERANCE

_LARGEST = 1e4
"""An output on random weights above which they are made smaller: what differs would drown in rounding."""


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


def row_counts(structure: Structure, share: float) -> dict[str, int]:
    """Blocks to remove from each row (an encoder and a decoder are two) for a share of the prunable weights.

    Rows that no forward has reached, such as a vision tower when the model read text, stay whole.

    Raises:
        SparsityError: when the request comes to no block, or to all of a row.
    """
    rows = Counter(block.row for block in structure.blocks if block.reached)
    counts = {row: round(share * total) for row, total in rows.items()}
    if not any(counts.values()) or any(count >= rows[row] for row, count in counts.items()):
        total = max(rows.values())
        where = "" if len(rows) == 1 else f" in each of {len(rows)} rows"
        raise SparsityError(
            f"{share * total:.2f} of {total} blocks cannot be left out{where}",
            hint=f"one block is {1 / total:.1%} of its row, and at least one stays; choose another --sparsity",
        )
    return counts


def block_count(structure: Structure, share: float) -> int:
    """Blocks to remove for a share of the prunable weights, in all rows together.

    Raises:
        SparsityError: when the request comes to no block, or to all of a row.
    """
    return sum(row_counts(structure, share).values())


def other_choices(
    config: Any, model: nn.Module, structure: Structure, counts: Mapping[str, int]
) -> Iterator[tuple[str, list[int]]]:
    """Where any blocks may not go: which of them might, in words, and the numbers of those that stay then.

    The config may count on the place of a block, or name the number after which something changes.

    Args:
        counts: by row, how many go.
    """
    in_row: dict[str, list[int]] = {}
    for block in structure.blocks:
        in_row.setdefault(block.row, []).append(block.index)
    said: dict[int, list[str]] = {}
    for path, value in entries_of(config):
        for numbers in in_row.values():
            if for_every_block(path[-1], value, [len(numbers)]):
                for number, one in zip(numbers, value, strict=True):
                    said.setdefault(number, []).append(repr(one))
    builds = [(block.row, signature(block, model), tuple(said.get(block.index, ()))) for block in structure.blocks]
    often = Counter(builds)
    alone = [block.index for block, build in zip(structure.blocks, builds, strict=True) if often[build] == 1]
    tried: list[list[int]] = [[]]
    for words, fixed in (
        ("blocks that are the only ones of their build stay", alone),
        ("only the last blocks go, so that all others keep their numbers",
         [i for row, numbers in in_row.items() for i in numbers[: len(numbers) - counts.get(row, 0)]]),
        ("only the first blocks go", [i for row, numbers in in_row.items() for i in numbers[counts.get(row, 0) :]]),
    ):  # fmt: skip
        if fixed not in tried:
            tried.append(fixed)
            yield words, fixed


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
    of_row: dict[str, list[int]] = {}
    for block in structure.blocks:
        of_row.setdefault(block.row, []).append(block.index)
    rows = [Row(numbers, set(gone)) for numbers in of_row.values()]
    origin = _renumbered(structure, binding, reader, kept)
    probe = probe_inputs(model, tokens=12)
    scale = 1.0
    try:
        expected = _answer(model, structure, binding, RandomTensors(reader), probe, frozenset(gone))
        if not expected.abs().max() < _LARGEST:  # nor when it is not a number
            scale = 0.25
            expected = _answer(model, structure, binding, RandomTensors(reader, scale=scale), probe, frozenset(gone))
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run without these blocks: {(str(error).splitlines() or ['?'])[0]}",
            hint="choose another --structure",
        ) from error
    reason = "its config has no entry for the number of its blocks"
    for entries in fewer_blocks(config, rows):
        try:
            skeleton = skeleton_of(changed(config, entries))
            small, view = find_structure(skeleton), CheckpointView(reader.folder, origin)
            own = Binding(skeleton, view.keys)
            own.resident = binding.resident
            if len(small.blocks) != len(kept) or own.missing or len(own.unbound) > len(binding.unbound):
                continue
            found = _answer(skeleton, small, own, RandomTensors(view, origin, scale), probe, frozenset())
        except Exception:  # noqa: BLE001 - a config may refuse values in any way; then it was not these entries
            continue
        if found.shape != expected.shape:
            continue
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
    numbers: dict[str, int] = {}
    in_row: Counter[str] = Counter()
    for stays in (structure.blocks[old] for old in kept):
        numbers[stays.name] = in_row[stays.row]
        in_row[stays.row] += 1
    origin: dict[str, str] = {}
    for key in reader.keys:
        block = of_block.get(key)
        if block is None:
            origin[key] = key
        elif block.name in numbers:
            parts = key.split(".")
            place = _place_of_number(parts, block.name)
            if place is None:
                raise UnsupportedModelError(
                    f"tensor {key} does not say in its name that it is in block {block.index}",
                    hint="blocks of this model cannot be numbered anew",
                )
            parts[place] = str(numbers[block.name])
            origin[".".join(parts)] = key
    return origin


def _place_of_number(parts: Sequence[str], block: str) -> int | None:
    """Where in a checkpoint key the number of its block stands; a stage or a prefix may bring other numbers."""
    row, _, number = block.rpartition(".")
    above = row.rpartition(".")[2]
    places = [i for i, part in enumerate(parts) if part == number]
    behind = [i for i in places if i and parts[i - 1] == above]
    return next(iter(behind or places), None)


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
