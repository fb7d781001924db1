"""Fuses fine-tuned models with their base, block by block; or writes one of them as its difference from the base."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoint.folder import copy_side_files
from secateur.checkpoint.ledger import LEDGER, Ledger
from secateur.checkpoint.writer import CheckpointWriter
from secateur.conversions.fused import Fused
from secateur.converting.family import check_related, open_member
from secateur.converting.opened import Converted, Opened
from secateur.converting.output import ConvertSink, Replaced, copied_keys, layout_of, replaced, write_config
from secateur.engine.forward import probe_inputs, stream_forward
from secateur.errors import UnsupportedModelError
from secateur.layers import fused as layer
from secateur.layers.spec import Spec
from secateur.progress import Reporter
from secateur.result import ConvertedMatrix, PrunedMatrix


class FuseWork:
    """A fusion that was found possible: models opened and compared with the base."""

    def __init__(self, conversion: Fused, opened: Opened, reporter: Reporter, stack: ExitStack) -> None:
        self.conversion, self.opened = conversion, opened
        experts = [matrix.name for matrix in opened.structure.matrices if matrix.experts]
        if experts:
            raise UnsupportedModelError(
                f"{experts[0]} is a stack of experts, which cannot be fused", hint="fuse dense models only"
            )
        self.members = [open_member(model, opened, reporter, stack) for model in conversion.models]
        self.models = [member.provenance for member in self.members]
        stored = [name for name in dict.fromkeys(opened.model.state_dict()) if opened.binding.bound(name)]
        reporter.stage("comparing models", len(self.members))
        self.differing: set[str] = set()
        for member in self.members:
            self.differing |= check_related(opened, member, stored)
            reporter.advance(member.model)
        self.by_name: dict[str, Replaced] = {}
        for name, spec in opened.specs.items():
            entry = conversion.entry(name, (spec.out_features, spec.in_features))
            bias = opened.binding.bound(name.removesuffix(".weight") + ".bias")
            if name in self.differing or (bias and name.removesuffix(".weight") + ".bias" in self.differing):
                stored_shape = opened.reader.info(opened.key_of(name)).shape
                shapes = {"base.weight": stored_shape} | layer.shapes(spec.out_features, spec.in_features, entry, bias)
                self.by_name[name] = replaced(opened, name, entry, shapes, layer.BIAS)
        self.changed = {one.key: one for one in self.by_name.values()}
        layout = layout_of(opened, self.changed)
        self.nbytes, self.parameters = layout.nbytes, (layout.parameters, layout.parameters)

    @property
    def rest(self) -> list[str]:
        """Names of differing tensors that are no part of a fused layer."""
        inside = {one.name for one in self.by_name.values()}
        inside |= {one.module + ".bias" for one in self.by_name.values()}
        return [name for name in self.opened.model.state_dict() if name in self.differing - inside]

    def tensors_of(self, one: Replaced) -> tuple[dict[str, Tensor], float]:
        """What is stored for a layer, and the error of it."""
        opened = self.opened
        spec, stored = opened.specs[one.name], opened.reader.tensor(one.key)
        base = spec.slices(stored)[0].to(opened.device, torch.float32)
        tuned = [spec.slices(member.tensor(one.name))[0].to(opened.device, torch.float32) for member in self.members]
        made, error = self.conversion.solve(base, tuned, one.entry["rank"], one.entry["router_rank"])
        if "expert_bias" in one.tensors:
            name = one.module + ".bias"
            own = opened.binding.load([name], opened.reader)[name].float()
            made["expert_bias"] = torch.stack([member.tensor(name).float() - own for member in self.members])
        return {"base.weight": stored, **made}, error

    def other(self, name: str) -> Tensor:
        """A tensor outside the fused layers, by ``rest``, in its own number format."""
        own = self.opened.binding.load([name], self.opened.reader)[name]
        origin = self.conversion.origin_of_rest
        if origin == "base" or not own.dtype.is_floating_point:
            return own
        theirs = [member.tensor(name) for member in self.members]
        return (
            theirs[0].to(own.dtype) if origin == "model" else torch.stack([t.float() for t in theirs]).mean(0).to(own)
        )

    def write(self, partial: Path, fingerprint: dict[str, Any], resume: bool, reporter: Reporter) -> Converted:
        """Fuse block by block."""
        opened, errors = self.opened, {}

        def make(one: Replaced) -> Mapping[str, Tensor]:
            made, errors[one.name] = self.tensors_of(one)
            return made

        ledger = Ledger.begin(partial / LEDGER, fingerprint, resume=resume)
        with CheckpointWriter(partial, layout_of(opened, self.changed), resume=resume) as writer:
            sink = _FuseSink(opened, writer, ledger, self.changed, make, lambda tensors, entry: tensors["base.weight"])
            sink.others = {key: name for name in self.rest for key in self._keys(name)} if self._takes_rest else {}
            sink.work = self
            if sink.blocks_done:
                reporter.note(f"resuming: {sink.blocks_done} of {len(opened.structure.blocks)} blocks are done")
            reporter.stage("fusing", len(opened.structure.blocks))
            for block in opened.structure.blocks:
                done = sink.done(block.index)
                if done is None:
                    for key in opened.binding.keys_of(block.tensors):
                        if key in self.changed:
                            sink.write(key, torch.empty(0))
                        else:
                            sink.copy(key)
                    done = [
                        PrunedMatrix(name, [], 0, 0.0, errors.get(name)) for name in _own(block.tensors, self.by_name)
                    ]
                    sink.finish(block.index, done)
                errors.update({matrix.name: matrix.loss or 0.0 for matrix in done})
                reporter.advance(block.name)
            sink.copy_rest()
            shards = writer.finish()
        self._tell_rest(reporter)
        copy_side_files(opened.source.folder, partial)
        spec = Spec("fused", {one.module: one.entry for one in self.by_name.values()})
        write_config(partial, opened, spec)
        probe = probe_inputs(opened.model)
        taken = {key for name in self.rest for key in self._keys(name)} if self._takes_rest else set()
        renamed = {
            new: old for new, old in copied_keys(opened, list(self.by_name.values())).items() if old not in taken
        }
        renamed |= {one.tensors["base.weight"][0]: one.key for one in self.by_name.values()}
        return Converted(
            spec=spec,
            matrices=self.rows(errors),
            shards=shards,
            probe=probe,
            answer=stream_forward(partial, probe),
            prunable=self._prunable(),
            renamed=renamed,
            told=self._told(),
        )

    @property
    def _takes_rest(self) -> bool:
        return self.conversion.origin_of_rest != "base"

    def _keys(self, name: str) -> list[str]:
        unit = self.opened.binding.unit_of(name)
        if unit.converter is not None or len(unit.keys) != 1:
            raise UnsupportedModelError(
                f"{name} differs, and is not stored by itself in the checkpoint", hint="use --rest base"
            )
        return unit.keys

    def _tell_rest(self, reporter: Reporter) -> None:
        names = self.rest
        if names and not self._takes_rest:
            reporter.warn(
                f"{len(names)} tensors outside the linear layers of the blocks differ among the models and are the "
                f"base's: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}; --rest mean takes their mean"
            )

    def rows(self, errors: Mapping[str, float]) -> list[ConvertedMatrix]:
        """A row for each matrix."""
        rows = []
        for name, spec in self.opened.specs.items():
            one = self.by_name.get(name)
            if one is None:
                rows.append(ConvertedMatrix(name, spec.shape, "dense", spec.size, None, 0.0, ["no model differs"]))
            else:
                rows.append(
                    ConvertedMatrix(name, spec.shape, "fused", one.parameters, one.entry["rank"], errors.get(name))
                )
        return rows

    def _prunable(self) -> dict[str, int]:
        kept = {key: count for key, count in self.opened.prunable().items() if key not in self.changed}
        return kept | {key: prod(shape) for one in self.by_name.values() for key, shape in one.tensors.values()}

    def _told(self) -> list[str]:
        whole = sum(self.opened.reader.info(key).numel for key in self.opened.reader.keys)
        more = sum(one.parameters - self.opened.specs[one.name].size for one in self.by_name.values())
        count = len(self.members)
        names = "1 model" if count == 1 else f"{count} models"
        said = [
            f"{names} in one: {more:,} parameters came to those of the base ({more / whole:+.2%}); "
            f"apart they are {count * whole:,}.",
        ]
        if not self.by_name:
            said.append("No model differs from the base in a linear layer of its blocks: these are the base's.")
        return said


class _FuseSink(ConvertSink):
    """Takes some of the tensors that are copied from the models instead."""

    others: dict[str, str]
    """Key -> name of a tensor that is not the base's."""
    work: FuseWork

    def copy(self, key: str) -> None:
        if key in self.others:
            new = self._renames.get(key, key)
            self._writer.write(new, self.work.other(self.others[key]).to(self._dtypes[new]))
        else:
            super().copy(key)


def _own(names: list[str], known: Mapping[str, Replaced]) -> list[str]:
    return [name for name in names if name in known]
