"""Puts a ReLU in the place of the activation of feed-forward networks, by the entry of the config that names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from transformers.activations import ACT2FN

from secateur.checkpoint.folder import copy_side_files
from secateur.checkpoint.ledger import LEDGER, Ledger
from secateur.checkpoint.writer import CheckpointWriter, layout_like
from secateur.converting.activity import is_zero_below, zero_shares
from secateur.converting.opened import Converted, Opened
from secateur.converting.output import write_config
from secateur.engine.entries import apply_changes, as_spelled, entries_of
from secateur.engine.feed_forward import FeedForward, FeedForwards
from secateur.engine.forward import probe_inputs, stream_forward
from secateur.engine.skeleton import skeleton_of
from secateur.errors import UnsupportedModelError, UsageError
from secateur.progress import Reporter
from secateur.result import ConvertedMatrix

RELU = "relu"
"""As configs of transformers call it."""


class ReluWork:
    """A model whose config was found to say the activation of its feed-forward networks."""

    def __init__(self, opened: Opened, batches: Sequence[Mapping[str, Tensor]], reporter: Reporter) -> None:
        self.models: list[dict[str, Any]] = []
        self.opened, self.batches = opened, batches
        recipe = opened.recipe.to_dict()
        if recipe["targets"] or recipe["ignore"]:
            raise UsageError("a config names one activation for all blocks", hint="leave --targets and --ignore out")
        found = FeedForwards(opened.model)
        self.networks = [one for block in opened.structure.blocks for one in found.of(block)]
        name = type(opened.model).__name__
        if not self.networks:
            raise UnsupportedModelError(
                f"no block of {name} has a plain feed-forward network",
                hint="it must be a module of its own: two linear layers around an activation, or three with a gate",
            )
        old = {act_of(opened.model, one): None for one in self.networks if not _is_relu(opened.model, one)}
        if not old:
            act = act_of(opened.model, self.networks[0])
            raise UnsupportedModelError(
                f"the activation of {name} is {act} already, which is zero below zero",
                hint="cut it into experts as it is, with --to moe",
            )
        self.old = " and ".join(old)
        self.entry, self.config, self.model = self._find(name)
        self._tell_others(reporter)
        layout = layout_like(opened.reader, opened.dtype)
        self.nbytes, self.parameters = layout.nbytes, (layout.parameters, layout.parameters)

    def _find(self, name: str) -> tuple[str, dict[str, Any], transformers.PreTrainedModel]:
        """The entry with which all networks have a ReLU, the config with it, and that model without weights.

        Raises:
            UnsupportedModelError: when there is none.
        """
        config, data = self.opened.model.config, self.opened.config
        tried = []
        for path, value in entries_of(config):
            if not isinstance(value, str) or value not in ACT2FN:
                continue
            changed = apply_changes(data, as_spelled({path: RELU}, config, data))
            model = skeleton_of(type(config).from_dict(changed))
            if all(_is_relu(model, one) for one in self.networks):
                return ".".join(path), changed, model
            tried.append(".".join(path))
        raise UnsupportedModelError(
            f"no entry of the config of {name} says the activation of its feed-forward networks, which is {self.old}"
            + (f" (tried: {', '.join(tried)})" if tried else ""),
            hint="only a model whose config names it can have another one and stay an ordinary checkpoint",
        )

    def _tell_others(self, reporter: Reporter) -> None:
        own = {f"{one.module}.{one.act}" for one in self.networks}
        others = [
            path for path, module in self.model.named_modules()
            if path not in own and type(module) is not type(self.opened.model.get_submodule(path))
        ]  # fmt: skip
        if others:
            reporter.warn(
                f"config {self.entry} names the activation of {len(others)} other modules too, which are ReLU as well "
                f"now: {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}"
            )

    def write(self, partial: Path, fingerprint: dict[str, Any], resume: bool, reporter: Reporter) -> Converted:
        """Copy all tensors, under the config with the other activation."""
        opened, reader = self.opened, self.opened.reader
        Ledger.begin(partial / LEDGER, fingerprint, resume=resume)
        shares = [
            zero_shares(model, opened, self.networks, self.batches, partial, reporter) if self.batches else {}
            for model in (opened.model, self.model)
        ]
        reporter.stage("copying", len(reader.keys))
        with CheckpointWriter(partial, layout_like(reader, opened.dtype)) as writer:
            for key in reader.keys:
                dtype = reader.info(key).dtype
                own = opened.dtype if opened.dtype is not None and dtype.is_floating_point else dtype
                writer.write(key, reader.tensor(key).to(own))
                reporter.advance(key)
            shards = writer.finish()
        copy_side_files(opened.source.folder, partial)
        write_config(partial, opened, None, self.config)
        probe = probe_inputs(self.model)
        return Converted(
            spec=None,
            matrices=[
                ConvertedMatrix(one.name, one.shape, "dense", one.size, notes=["as it was"])
                for one in opened.structure.matrices
            ],
            shards=shards,
            probe=probe,
            answer=stream_forward(partial, probe),
            prunable=opened.prunable(),
            renamed={key: key for key in reader.keys},
            told=self._told(*shares),
            needs_training=True,
        )

    def _told(self, before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
        said = [
            f"{self.old} became ReLU in {len(self.networks)} feed-forward networks ({self.entry} of the config). No "
            "weight changed, and the folder is an ordinary checkpoint.",
        ]
        if after:
            was, now = (sum(side.values()) / len(side) for side in (before, after))
            said.append(
                f"On calibration text {now:.1%} of their activity is exactly zero ({min(after.values()):.1%} to "
                f"{max(after.values()):.1%}), {was:.1%} before."
            )
        said.append("What the model knows suffers until it is trained; then cut it into experts: --to moe.")
        return said


def act_of(model: transformers.PreTrainedModel, one: FeedForward) -> str:
    """The class of the activation of a network."""
    return type(model.get_submodule(f"{one.module}.{one.act}")).__name__


def _is_relu(model: transformers.PreTrainedModel, one: FeedForward) -> bool:
    return is_zero_below(model.get_submodule(f"{one.module}.{one.act}"))
