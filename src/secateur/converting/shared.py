"""Ties the blocks of a model into groups, or takes blocks of a tied model out and has the others make larger steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.checkpoint.check import check_model_folder
from secateur.checkpoint.folder import copy_side_files
from secateur.checkpoint.ledger import LEDGER, Ledger
from secateur.checkpoint.source import Source
from secateur.checkpoint.writer import CheckpointWriter, Entry, Layout, layout_for
from secateur.conversions.shared import Shared, mean
from secateur.converting.opened import Converted, Opened
from secateur.converting.output import write_config
from secateur.engine.blocks import signature
from secateur.engine.forward import probe_inputs, stream_forward
from secateur.engine.sink import CheckpointSink
from secateur.errors import UnsupportedModelError, UsageError
from secateur.layers.spec import Sharing, Spec, is_converted, read_spec, stock_config
from secateur.progress import Reporter
from secateur.result import ConvertedMatrix, PrunedMatrix

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Config entries that say how many blocks there are."""


def shared_spec(source: Source) -> Spec:
    """The layers of a model whose blocks are tied.

    Raises:
        UnsupportedModelError: when it shares nothing, or does not say which blocks share.
    """
    config = check_model_folder(source.folder)
    spec = read_spec(config) if is_converted(config) else Spec("none")
    if not spec.tied and spec.sharing is None:
        raise UnsupportedModelError(
            f"{source.name} shares nothing: each of its blocks is a function of its own, and none can stand for others",
            hint="tie its blocks with --groups and train it first; --structure depth of prune leaves blocks out",
        )
    if spec.sharing is None:
        raise UnsupportedModelError(
            f"{source.name} ties tensors, but has no map of its blocks to groups",
            hint="give a model that `secateur convert --to shared --groups G` made, or one trained from it",
        )
    return spec


class ShareWork:
    """Blocks that were found to be alike."""

    def __init__(self, conversion: Shared, opened: Opened) -> None:
        self.models: list[dict[str, Any]] = []
        self.opened = opened
        recipe = opened.recipe.to_dict()
        if recipe["targets"] or recipe["ignore"]:
            raise UsageError("blocks are tied as a whole", hint="leave --targets and --ignore out")
        self.row = row_of(opened)
        blocks = opened.structure.blocks
        self.groups = conversion.group_map(len(blocks))
        first = signature(blocks[0], opened.model)
        other = next((block.name for block in blocks if signature(block, opened.model) != first), None)
        if other is not None:
            raise UnsupportedModelError(
                f"{other} is built in another way than {blocks[0].name}: they cannot share their weights",
                hint="only models whose blocks are all alike can be tied",
            )
        self.owners = [self.groups.index(group) for group in self.groups]
        """Block -> the block in whose place its weights are stored."""
        self.dropped = {
            key for block, owner in zip(blocks, self.owners, strict=True) if owner != block.index
            for key in opened.binding.keys_of(block.tensors)
        }  # fmt: skip
        layout = self._layout()
        self.nbytes, self.parameters = layout.nbytes, (layout.parameters, layout.parameters)

    def _layout(self) -> Layout:
        opened = self.opened
        return layout_for(
            Entry(key, _dtype(opened, key), opened.reader.info(key).shape)
            for key in opened.reader.keys if key not in self.dropped
        )  # fmt: skip

    def _keys(self, owner: int) -> dict[str, list[str]]:
        """Key of a tensor of an owner -> the keys of it in all blocks of the group."""
        opened, blocks = self.opened, self.opened.structure.blocks
        members = [blocks[block] for block, own in enumerate(self.owners) if own == owner]
        made: dict[str, list[str]] = {}
        for name in blocks[owner].tensors:
            if opened.binding.bound(name):
                leaf = name.removeprefix(blocks[owner].name)
                units = [opened.binding.unit_of(member.name + leaf) for member in members]
                made |= {keys[0]: list(keys) for keys in zip(*(unit.keys for unit in units), strict=True)}
        return made

    def write(self, partial: Path, fingerprint: dict[str, Any], resume: bool, reporter: Reporter) -> Converted:
        """Average the blocks of each group."""
        opened, layout = self.opened, self._layout()
        owners = sorted(set(self.owners))
        ledger = Ledger.begin(partial / LEDGER, fingerprint, resume=resume)
        keys_of = {owner: self._keys(owner) for owner in owners}
        reporter.stage("tying blocks", len(owners))
        with CheckpointWriter(partial, layout, resume=resume) as writer:
            sink = CheckpointSink(opened.reader, writer, ledger, keys_of)
            for owner in owners:
                if sink.done(owner) is None:
                    for key, sources in keys_of[owner].items():
                        tensors = [opened.reader.tensor(source) for source in sources]
                        sink.write(key, mean(tensors).to(_dtype(opened, key)))
                    sink.finish(owner, [PrunedMatrix(opened.structure.blocks[owner].name, [], 0, 0.0)])
                reporter.advance(opened.structure.blocks[owner].name)
            rest = [key for key in layout.keys if not any(key in keys for keys in keys_of.values())]
            for key in rest:
                sink.copy(key)
            shards = writer.finish()
        copy_side_files(opened.source.folder, partial)
        spec = Spec("shared", {}, self._ties(), Sharing(self.row, self.groups))
        write_config(partial, opened, spec)
        probe = probe_inputs(opened.model)
        return Converted(
            spec=spec,
            matrices=self._rows(),
            shards=shards,
            probe=probe,
            answer=stream_forward(partial, probe),
            prunable={key: count for key, count in opened.prunable().items() if key not in self.dropped},
            renamed={key: key for key in rest},
            told=self._told(),
            needs_training=len(set(self.groups)) < len(self.groups),
        )

    def _ties(self) -> dict[str, str]:
        blocks = self.opened.structure.blocks
        ties: dict[str, str] = {}
        for block, owner in zip(blocks, self.owners, strict=True):
            if owner != block.index:
                ties |= {name: blocks[owner].name + name.removeprefix(block.name) for name in block.tensors}
        return ties

    def _rows(self) -> list[ConvertedMatrix]:
        rows = []
        for block, owner in zip(self.opened.structure.blocks, self.owners, strict=True):
            for matrix in block.matrices:
                size = matrix.size if owner == block.index else 0
                rows.append(ConvertedMatrix(matrix.name, matrix.shape, "shared", size))
        return rows

    def _told(self) -> list[str]:
        reader, count = self.opened.reader, len(set(self.groups))
        before = sum(reader.info(key).numel for key in reader.keys)
        after = before - sum(reader.info(key).numel for key in self.dropped)
        return [
            f"{len(self.groups)} blocks became {count} that are run {len(self.groups) // count} times each: "
            f"{after:,} parameters, before {before:,} ({after / before:.1%}); as many operations as before.",
            "Each weight is the mean of those that it stands for: the model is of no use until it is trained.",
        ]


class IterateWork:
    """A model whose blocks are tied, and which of them will run."""

    def __init__(self, conversion: Shared, opened: Opened, spec: Spec) -> None:
        self.models: list[dict[str, Any]] = []
        self.opened, self.spec = opened, spec
        assert spec.sharing is not None
        self.row, self.old = row_of(opened), spec.sharing.groups
        self.kept = conversion.kept(self.old)
        self.step = conversion.step_of(len(self.old), spec.sharing.step)
        self.groups = [self.old[block] for block in self.kept]
        self.config = shortened(stock_config(opened.config), len(self.old), self.kept)
        self.keys = {key: self._renamed(key) for key in opened.reader.keys}
        layout = self._layout()
        self.nbytes, self.parameters = layout.nbytes, (layout.parameters, layout.parameters)

    def _renamed(self, key: str) -> str:
        """A key of a tied block under the number that the first of its group has now."""
        tail = self.row.rpartition(".")[2]
        for group in set(self.old):
            was, now = self.old.index(group), self.groups.index(group)
            if f"{tail}.{was}." in key:
                return key.replace(f"{tail}.{was}.", f"{tail}.{now}.", 1)
        return key

    def _layout(self) -> Layout:
        opened = self.opened
        return layout_for(
            Entry(new, _dtype(opened, old), opened.reader.info(old).shape) for old, new in self.keys.items()
        )

    def write(self, partial: Path, fingerprint: dict[str, Any], resume: bool, reporter: Reporter) -> Converted:
        """Copy all tensors under their new names."""
        opened = self.opened
        Ledger.begin(partial / LEDGER, fingerprint, resume=resume)
        reporter.stage("copying", len(self.keys))
        with CheckpointWriter(partial, self._layout()) as writer:
            for old, new in self.keys.items():
                writer.write(new, opened.reader.tensor(old).to(_dtype(opened, old)))
                reporter.advance(old)
            shards = writer.finish()
        copy_side_files(opened.source.folder, partial)
        leaves = [name.removeprefix(f"{self.row}.0.") for name in opened.structure.blocks[0].tensors]
        ties = {
            f"{self.row}.{block}.{leaf}": f"{self.row}.{self.groups.index(group)}.{leaf}"
            for block, group in enumerate(self.groups) if self.groups.index(group) != block for leaf in leaves
        }  # fmt: skip
        spec = Spec("shared", {}, ties, Sharing(self.row, self.groups, self.step))
        write_config(partial, opened, spec, self.config)
        probe = probe_inputs(opened.model)
        return Converted(
            spec=spec,
            matrices=[ConvertedMatrix(one.name, one.shape, "shared", one.size) for one in opened.structure.matrices],
            shards=shards,
            probe=probe,
            answer=stream_forward(partial, probe),
            prunable={self.keys[key]: count for key, count in opened.prunable().items()},
            renamed={new: old for old, new in self.keys.items()},
            told=[
                f"{len(self.kept)} of {len(self.old)} blocks are run, each with a step of {self.step:.4g}; "
                "the parameters are the same.",
            ],
        )


def row_of(opened: Opened) -> str:
    """Path of the one list that holds all blocks, in their order.

    Raises:
        UnsupportedModelError: when there are several, as in an encoder-decoder.
    """
    row = opened.structure.blocks[0].row
    if any(block.name != f"{row}.{place}" for place, block in enumerate(opened.structure.blocks)):
        raise UnsupportedModelError(
            f"the blocks of {type(opened.model).__name__} are in several rows, which are no repetition of one block",
            hint="only models with one row of blocks can share them",
        )
    return row


def shortened(config: Mapping[str, Any], blocks: int, kept: list[int]) -> dict[str, Any]:
    """A config of fewer blocks: their number, and every list with an entry for each.

    Raises:
        UnsupportedModelError: when the config does not say the number where it is known to be said.
    """
    made = dict(config)
    names = [name for name in COUNTS if made.get(name) == blocks]
    if not names:
        raise UnsupportedModelError(
            f"config.json does not say the number of blocks ({blocks}) in {' or '.join(COUNTS)}",
            hint="such a model cannot be run with fewer iterations yet",
        )
    made |= dict.fromkeys(names, len(kept))
    for name, value in made.items():
        if isinstance(value, list) and len(value) == blocks:
            made[name] = [value[block] for block in kept]
    return made


def _dtype(opened: Opened, key: str) -> Any:
    own = opened.reader.info(key).dtype
    return opened.dtype if opened.dtype is not None and own.is_floating_point else own
