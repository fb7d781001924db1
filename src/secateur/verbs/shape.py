"""What a structured pruning of a model will be: blocks first, then the units of those that stay."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers

from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.source import Source
from secateur.checkpoint.view import CheckpointView
from secateur.engine.activations import ActivationStore
from secateur.engine.binding import Binding
from secateur.engine.blocks import Structure, find_structure
from secateur.engine.device import activation_limit
from secateur.engine.entries import changed
from secateur.engine.forward import NoSink, Stored, rehearse
from secateur.engine.plan import Plan
from secateur.errors import UnsupportedModelError, UsageError
from secateur.measure.model import load_model
from secateur.plugins import Chooser, Criterion, GradientCriterion, make_method
from secateur.progress import Recorder
from secateur.recipe import Recipe
from secateur.structured import block_choice
from secateur.structured.channel_plan import plan_channels, plan_channels_with_units
from secateur.structured.channels import Channels
from secateur.structured.couplings import Kind
from secateur.structured.depth import DepthPlan, other_choices, row_counts, without_blocks
from secateur.structured.experts import ExpertPlan, plan_experts
from secateur.structured.ladder import first
from secateur.structured.plan import WidthPlan, couplings_of_blocks, plan_counts, plan_widths
from secateur.verbs.calibration import Calibration
from secateur.verbs.loss import fits_in_memory, measured_loss
from secateur.verbs.split import Chosen, choose_split


@dataclass
class Model:
    """A model without weights and its checkpoint; after `plan_shape` without the blocks that go."""

    skeleton: transformers.PreTrainedModel
    structure: Structure
    reader: CheckpointReader
    binding: Binding


@dataclass
class Shape:
    """What goes, and the config entries that say so."""

    depth: DepthPlan | None = None
    experts: ExpertPlan | None = None
    width: WidthPlan | None = None
    hidden: Channels | None = None
    split: Chosen | None = None
    """How a budget was split."""

    @property
    def changes(self) -> dict[tuple[str, ...], Any]:
        """Config key path -> new value."""
        made: dict[tuple[str, ...], Any] = dict(self.depth.changes) if self.depth else {}
        made |= self.experts.shrunk.changes if self.experts else {}
        made |= self.width.shrunk.changes if self.width else {}
        return made | (self.hidden.shrunk.changes if self.hidden else {})

    @property
    def lines(self) -> list[str]:
        """The plan in words."""
        parts = [part.line() for part in (self.depth, self.experts) if part]
        budget = self.split.lines() if self.split else []
        hidden = self.hidden.lines() if self.hidden else []
        return budget + parts + hidden + (self.width.lines() if self.width else [])

    @property
    def units(self) -> dict[str, list[int]]:
        """By structure: units of a block before and after; hidden channels of the whole model."""
        made = {"experts": [self.experts.experts, self.experts.stay]} if self.experts else {}
        made |= self.hidden.units() if self.hidden else {}
        return made | ({kind: list(counts) for kind, counts in self.width.units.items()} if self.width else {})


def plan_shape(
    recipe: Recipe, source: Source, model: Model, criterion: Chooser, calibration: Callable[[], Calibration],
    device: torch.device, compute: torch.dtype, reporter: Recorder, stack: ExitStack, earlier: dict[str, Any] | None,
) -> Shape:  # fmt: skip
    """Decide what goes, and prove on random weights that it can.

    Args:
        model: changed in place to the one without the blocks that go.
        criterion: chooses units.
        calibration: loads the calibration data, where the choice of blocks needs it.
        earlier: how the run that is resumed split the budget; None for a new run.

    Raises:
        UnsupportedModelError: when this model has no such structure, or it cannot be cut.
        SparsityError: when the request comes to nothing, or leaves nothing.
    """
    config = transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    kinds = [name for name in recipe.structure if name not in ("depth", "experts", "hidden")]
    sparsity, every = recipe.effective_sparsity, len(recipe.structure)
    total = sum(matrix.size for matrix in model.structure.matrices)
    shape = Shape()
    if recipe.budget is not None:
        if not isinstance(criterion, Criterion) or isinstance(criterion, GradientCriterion):
            raise UsageError(
                f"method {recipe.method} does not go with --budget: it needs more than the inputs of each matrix",
                hint="leave --method out, or give --structure and --sparsity",
            )
        shape.split = Chosen(earlier) if earlier else choose_split(
            recipe, source, config, model, criterion, calibration(), device, compute, reporter
        )  # fmt: skip
        if gone := shape.split.gone:
            shape.depth = without_blocks(config, model.skeleton, model.structure, model.binding, model.reader, gone)
    elif "depth" in recipe.structure and sparsity:
        counts = row_counts(model.structure, sparsity / every)
        for row in dict.fromkeys(block.row for block in model.structure.blocks if block.row not in counts):
            reporter.note(f"the calibration data does not reach {row}: its blocks stay")

        def without(fixed: Sequence[int]) -> DepthPlan:
            free = [b.index for b in model.structure.blocks if counts.get(b.row) and b.index not in fixed]
            forced = len(free) == sum(counts.values())  # nothing to choose
            gone = free if forced else _choose_blocks(
                recipe, source, model, counts, fixed, calibration(), device, compute, reporter
            )  # fmt: skip
            return without_blocks(config, model.skeleton, model.structure, model.binding, model.reader, gone)

        try:
            shape.depth = without([])
        except UnsupportedModelError as error:
            for words, fixed in other_choices(config, model.skeleton, model.structure, counts):
                with contextlib.suppress(UnsupportedModelError):
                    shape.depth = without(fixed)
                    reporter.note(f"{error.message}; {words}")
                    break
            else:
                raise
    if shape.depth is not None:
        config = changed(config, shape.depth.changes)
        model.skeleton = shape.depth.skeleton
        model.structure = find_structure(model.skeleton)
        model.reader = stack.enter_context(CheckpointView(source.folder, shape.depth.origin))
        model.binding = Binding(model.skeleton, model.reader.keys)
        rehearse(model.skeleton, model.structure, model.binding, model.reader)
    if "experts" in recipe.structure and sparsity:
        left = sum(matrix.size for matrix in model.structure.matrices)
        shape.experts = plan_experts(
            config, model.skeleton, model.structure, model.binding, model.reader, sparsity / every * total / left
        )
        stack.enter_context(shape.experts.reader)
    if shape.split and shape.split.kept:
        couplings = couplings_of_blocks(model.skeleton, model.structure, model.binding, model.reader)
        shape.width = plan_counts(
            config, model.skeleton, model.structure, model.binding, model.reader, couplings, shape.split.kept
        )
    elif kinds and sparsity and recipe.budget is None and "hidden" not in recipe.structure:
        left = sum(matrix.size for matrix in model.structure.matrices)
        shape.width = plan_widths(
            config, model.skeleton, model.structure, model.binding, model.reader, kinds,
            sparsity * len(kinds) / every * total / left, recipe.round_to,
        )  # fmt: skip
    if "hidden" in recipe.structure and sparsity:
        opened = config, model.skeleton, model.structure, model.binding, model.reader
        if kinds:  # heads or groups, of which the recipe allows one beside them
            shape.hidden = plan_channels_with_units(*opened, cast(Kind, kinds[0]), sparsity)
        else:
            shape.hidden = plan_channels(*opened, sparsity, recipe.round_to)
        for name in shape.hidden.loose if recipe.update else ():
            reporter.warn(f"{name} loses channels without a refit: where its input comes from was not found")
    for line in shape.lines:
        reporter.note(line)
    return shape


def _choose_blocks(
    recipe: Recipe, source: Source, model: Model, counts: Mapping[str, int], fixed: Sequence[int],
    calibration: Calibration, device: torch.device, compute: torch.dtype, reporter: Recorder,
) -> list[int]:  # fmt: skip
    way, count = recipe.depth_by, sum(counts.values())
    quotas = block_choice.Quotas(model.structure, counts, fixed)
    if way == "angular" and len(counts) > 1:
        raise UsageError(
            f"--depth-by angular takes one run of blocks, and these are {len(counts)} rows",
            hint="use --depth-by greedy or influence",
        )
    total = len(model.structure.blocks)
    batches = calibration.batches
    fits = fits_in_memory(model.reader)
    if way == "auto":
        size = sum(parameter.numel() for parameter in model.skeleton.parameters())
        cheap = block_choice.greedy_is_affordable(total, count, size, block_choice.GREEDY_TOKENS)
        way = "greedy" if fits and cheap else "influence"
        why = "greedy would take long" if fits else "the model does not fit in memory"
        reporter.note(f"blocks are chosen by {way}" + ("" if way == "greedy" else f": {why}"))
    if way == "greedy" and not fits:
        raise UsageError(
            "--depth-by greedy needs the model in memory, and it does not fit", hint="use --depth-by influence"
        )
    if way == "greedy":
        whole = load_model(source.folder, device=str(device), dtype="float32")
        few = first(batches, block_choice.GREEDY_TOKENS)
        loss, _ = measured_loss(whole, few, device, compute, reporter)
        gone, losses = block_choice.greedy_removal(whole, model.structure, count, loss, reporter, quotas)
        reporter.note(f"loss on calibration text after each block: {', '.join(f'{value:.3f}' for value in losses)}")
        return gone
    stored = Stored(model.reader)
    stream = block_choice.StateStream(
        model.skeleton, model.structure, model.binding, stored, NoSink(stored), make_method("magnitude"), Plan(),
        ActivationStore(activation_limit(recipe.activation_memory), Path(tempfile.gettempdir())), device, compute,
        recipe.seed, reporter,
    )  # fmt: skip
    states = stream.look(batches)
    choose = block_choice.least_influence if way == "influence" else block_choice.smallest_angle
    return choose(states, count, quotas)
