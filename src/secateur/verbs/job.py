"""A pruning run from checked input to written shards: what it needs, and the work itself."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from secateur.checkpoint.check import check_finite, hash_folder
from secateur.checkpoint.folder import copy_side_files
from secateur.checkpoint.ledger import LEDGER, Ledger
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.source import Source
from secateur.checkpoint.view import CheckpointView
from secateur.checkpoint.writer import CheckpointWriter, Layout, layout_like
from secateur.engine.activations import ActivationStore
from secateur.engine.binding import Binding
from secateur.engine.blocks import Structure, find_structure
from secateur.engine.device import activation_limit, compute_dtype, parse_dtype, resolve_device, trim_memory
from secateur.engine.entries import apply_changes, as_spelled
from secateur.engine.forward import probe_inputs, rehearse, runs_in
from secateur.engine.opening import open_checkpoint
from secateur.engine.permute import FreeChannels, moved_keys
from secateur.engine.plan import Plan, make_plan, plan_globally
from secateur.engine.sink import CheckpointSink
from secateur.engine.skeleton import build_skeleton
from secateur.errors import UnsupportedModelError, WeightValueError
from secateur.layers.spec import is_converted, read_spec
from secateur.methods._quantised import bare, with_bits
from secateur.methods._refitted import with_refit
from secateur.plugins import (
    Chooser,
    Criterion,
    ExpertCriterion,
    GradientCriterion,
    Method,
    check_chooser,
    make_chooser,
    sees_dense_block,
)
from secateur.progress import Recorder, Reporter
from secateur.recipe import Recipe
from secateur.result import RESULT_FILE, PrunedMatrix
from secateur.structured.channels import CutBinding
from secateur.structured.configure import cut_shapes, shapes_of
from secateur.verbs.asked import options_of
from secateur.verbs.calibration import Calibration, Data, load_calibration
from secateur.verbs.choices import Choices, check_gradients, choose_channels, gradient_scores
from secateur.verbs.dividing import divide
from secateur.verbs.fingerprint import config_digest, fingerprint
from secateur.verbs.ordering import free_channels
from secateur.verbs.shape import Model, Shape, plan_shape
from secateur.verbs.streams import check_correction, check_reconstruction, make_stream, reconstruction
from secateur.verify import Expected


@dataclass
class Job:
    """Everything a run needs, checked, before anything is written."""

    source: Source
    recipe: Recipe
    method: Chooser
    model: transformers.PreTrainedModel
    structure: Structure
    reader: CheckpointReader
    binding: Binding
    plan: Plan
    calibration: Calibration
    device: torch.device
    compute: torch.dtype
    dtype: torch.dtype | None
    source_hash: str
    prunable_before: dict[str, int]
    """Checkpoint key -> number of weights of every tensor that may be pruned, in the source."""
    shape: Shape = field(default_factory=Shape)
    """What goes, when whole units do."""
    choices: Choices = field(default_factory=Choices)
    """What is decided for the whole model when the work starts."""
    free: Mapping[int, Sequence[FreeChannels]] = field(default_factory=dict)
    """By block: inputs that are put in another order first."""
    calibration_read: bool = True
    """Whether the calibration data were needed, be it only to choose what goes."""
    calibration_protocol: dict[str, Any] = field(default_factory=dict)
    """What was read of them; where the method needs none, for the choice or the allocation alone."""

    @property
    def method_options(self) -> dict[str, Any]:
        """The options of the method by name; none where it is asked nothing."""
        asked = bare(self.method) if isinstance(self.method, Method) else self.method
        return {} if self.recipe.method == "auto" else options_of(asked)

    @property
    def layout(self) -> Layout:
        """Shards, names and shapes of the result."""
        return layout_like(self.result_reader, self.dtype, self.new_shapes)

    @property
    def result_reader(self) -> CheckpointReader:
        """The source under the keys of the result."""
        return self.shape.experts.reader if self.shape.experts else self.reader

    @property
    def result_binding(self) -> Binding:
        """Keys of the result and the tensors they make."""
        return self.shape.experts.binding if self.shape.experts else self.binding

    @property
    def new_shapes(self) -> dict[str, tuple[int, ...]]:
        """Checkpoint key -> shape, of every tensor that is cut."""
        if self.shape.experts is not None:
            return self.shape.experts.shapes
        width, hidden = self.shape.width, self.shape.hidden
        if hidden is not None:
            return {
                key: shape for key, shape in self.cut_binding().key_shapes().items()
                if shape != self.reader.info(key).shape
            }  # fmt: skip
        if width is None:
            return {}
        old = shapes_of(self.model)
        new = cut_shapes(old, width.couplings, {kind: after for kind, (_, after) in width.units.items()})
        made: dict[str, tuple[int, ...]] = {}
        for unit in {id(u): u for u in (self.binding.unit_of(n) for n in new if new[n] != old[n])}.values():
            entries = self.binding.unload(unit, {name: torch.empty(new[name], device="meta") for name in unit.names})
            made |= {key: tuple(entry.shape) for key, entry in entries.items()}
        return made

    def cut_binding(self) -> CutBinding:
        """The tensors of the model with fewer hidden channels."""
        hidden, keep = self.shape.hidden, self.choices.keep
        assert hidden is not None
        keep, units = (hidden.spread(), hidden.spread_units()) if keep is None else (keep, self.choices.units)
        return CutBinding(
            hidden.shrunk.skeleton, self.reader.keys, self.binding, hidden, keep, self.choices.scales, units
        )  # fmt: skip

    @property
    def prunable(self) -> tuple[dict[str, int], dict[str, int]]:
        """Checkpoint key -> number of weights, for every tensor that may be pruned; before and after."""
        names = [matrix.name for matrix in self.structure.matrices]
        after = {key: self.result_reader.info(key).numel for key in self.result_binding.keys_of(names)}
        return self.prunable_before, after | {k: math.prod(v) for k, v in self.new_shapes.items() if k in after}

    @property
    def shape_changes(self) -> dict[str, Any]:
        """Config entries that change with the shapes, nested ones with dots."""
        return {".".join(path): value for path, value in self.shape.changes.items()}

    @property
    def removed(self) -> float | None:
        """Share of the prunable weights that go, when whole units do."""
        before, after = (sum(side.values()) for side in self.prunable)
        return 1 - after / before if self.recipe.structure else None


@dataclass
class Written:
    """Results of all matrices, and what a verification must find on the disk."""

    matrices: list[PrunedMatrix]
    expected: Expected


def prepare(
    source: Source, recipe: Recipe, method: Chooser | None, data: Data | None, reporter: Recorder,
    stack: ExitStack, resumed: Mapping[str, Any] | None = None,
) -> Job:  # fmt: skip
    """Open and check everything. Nothing is written here.

    Args:
        resumed: fingerprint of the run that is taken up: what took long to choose is not chosen again.
    """
    if method is None:
        # Where only blocks go, nothing is asked of a method, and the recipe names none.
        name = "obs" if recipe.method == "auto" else recipe.method
        method = make_chooser(name, recipe.structure, recipe.method_options)
    check_chooser(method, recipe.structure)
    if isinstance(method, Method):
        method = with_bits(with_refit(method, recipe.refit), recipe.bits, recipe.columns_of_scale)
        check_correction(recipe, method)
    reconstruction(recipe)
    device = resolve_device(recipe.device)
    asked = recipe.compute_dtype
    as_published = asked == "auto" and recipe.correction == "off"
    if as_published and isinstance(method, Method) and sees_dense_block(method, recipe.parsed_pattern):
        asked = "float32"  # who asks for the paper's procedure wants its numbers, and these hang on rounding
    compute, dtype = compute_dtype(asked, device), parse_dtype(recipe.dtype, "dtype")
    activation_limit(recipe.activation_memory)
    found = open_checkpoint(source.folder, stack)
    _check_layers(source, found.config, recipe)
    model, structure, reader, binding = found.model, found.structure, found.reader, found.binding
    plan = Plan() if recipe.structure else make_plan(recipe, structure)
    rehearse(model, structure, binding, reader)
    if binding.resident:
        reporter.note("the model reads a weight outside its blocks in a way of its own: all of these stay in memory")
        compute = torch.float32  # the format of the verification, as they are there in one format only
    names = [matrix.name for matrix in structure.matrices]
    prunable = {key: reader.info(key).numel for key in binding.keys_of(names)}
    if recipe.bits is not None and any(reader.info(key).dtype != torch.float32 for key in prunable):
        dtype = torch.float32
        reporter.note(f"written as float32, in which weights of {recipe.bits} bits are exact; export packs them")
    loaded: list[Calibration] = []

    def calibrated() -> Calibration:
        if not loaded:
            demo = source.kind == "demo"
            loaded.append(load_calibration(recipe, model, source.folder, reporter, data=data, demo=demo))
        return loaded[0]

    if asked == "auto" and compute != torch.float32:
        sample = calibrated().batches[0] if _needs_data(method, recipe) else None
        if not runs_in(compute, model, structure, binding, reader, sample):
            reporter.note(f"calibrated in float32: the model does not run in {str(compute).removeprefix('torch.')}")
            compute = torch.float32
    opened = Model(model, structure, reader, binding)
    shape = Shape()
    if recipe.structure:
        check_finite(reader, reporter)
        same = resumed is not None and resumed.get("config_sha256") == config_digest(source)
        earlier = resumed.get("split") if resumed is not None and same else None
        shape = plan_shape(recipe, source, opened, method, calibrated, device, compute, reporter, stack, earlier)
    if not recipe.structure:
        check_finite(reader, reporter)
        divided = divide(recipe, source, opened, plan, calibrated, device, compute, reporter, resumed)
        plan = make_plan(recipe, structure, divided) if divided else plan
    free = free_channels(recipe, opened, plan, reporter) if recipe.permutes else {}
    calibration = Calibration(protocol={"calibration": "none: the method needs no data"})
    if _needs_data(method, recipe):
        calibration = calibrated()
    check_reconstruction(recipe, len(calibration.batches))
    if shape.width is not None or shape.hidden is not None:
        check_gradients(method, model)
    if dtype is not None:
        _check_fits(reader, dtype)
    digest = hash_folder(source.folder)
    read = bool(loaded)
    protocol = loaded[0].protocol if loaded else calibration.protocol
    loaded.clear()
    trim_memory()  # tokenizer and text are no longer needed
    if isinstance(method, Method):
        plan_globally(plan, method, recipe, structure, lambda name: binding.load([name], reader)[name])
    return Job(
        source, recipe, method, opened.skeleton, opened.structure, opened.reader, opened.binding, plan, calibration,
        device, compute, dtype, digest, prunable, shape, free=free,
        calibration_read=read, calibration_protocol=protocol,
    )  # fmt: skip


def _check_layers(source: Source, config: Mapping[str, Any], recipe: Recipe) -> None:
    """Refuse converted models where other layers, or several blocks, would have to change along."""
    if is_converted(config) and (recipe.structure or read_spec(config).sharing is not None):
        why = "its blocks share their weights" if read_spec(config).sharing is not None else "its layers are converted"
        raise UnsupportedModelError(
            f"{source.name} cannot be pruned {'by structures' if recipe.structure else 'block by block'}: {why}",
            hint="prune the model that it was made from, and convert the result",
        )


def _needs_data(method: Chooser, recipe: Recipe) -> bool:
    if isinstance(method, Method):
        return method.statistics != "none" or recipe.reconstruct != "none"
    if isinstance(method, ExpertCriterion):
        return method.data
    return (method.data or recipe.update or recipe.reconstruct != "none") and set(recipe.structure) != {"depth"}


def _check_fits(reader: CheckpointReader, dtype: torch.dtype) -> None:
    """Refuse a number format in which a weight would become infinite."""
    for key in reader.keys:
        if reader.info(key).dtype.is_floating_point:
            for chunk in reader.chunks(key):
                if not torch.isfinite(chunk.to(dtype)).all():
                    name = str(dtype).removeprefix("torch.")
                    raise WeightValueError(f"{key} holds values too large for {name}", hint="use --dtype bfloat16")


def write(job: Job, partial: Path, resume: bool, reporter: Recorder) -> Written:
    """Prune block by block into the partial folder, and put everything beside the weights that a model needs."""
    _choose(job, partial, reporter)
    keys_of = {block.index: job.result_binding.keys_of(block.tensors) for block in job.structure.blocks}
    ledger = Ledger.begin(partial / LEDGER, fingerprint(job), resume=resume)
    limit = activation_limit(job.recipe.activation_memory)
    with CheckpointWriter(partial, job.layout, resume=resume) as writer:
        sink = CheckpointSink(job.result_reader, writer, ledger, keys_of)
        if sink.blocks_done:
            reporter.note(f"resuming: {sink.blocks_done} of {len(keys_of)} blocks are done")
        stream = make_stream(job, sink, ActivationStore(limit, partial), reporter)
        probe = job.calibration.probe or probe_inputs(job.model)
        result = stream.run(job.calibration.batches, probe)
        sink.copy_rest()
        shards = writer.finish()
    tell_notes(result.matrices, reporter)
    copy_side_files(job.source.folder, partial)
    _write_config(job, partial)
    whole = job.result_reader
    origin = whole.origin if isinstance(whole, CheckpointView) else None
    moved = moved_keys(job.free, result.matrices, job.binding, job.reader)
    return Written(result.matrices, Expected(shards, sink.zeros, probe, result.probe, job.source.folder, origin, moved))


def _choose(job: Job, scratch: Path, reporter: Reporter) -> None:
    """Decide what is decided once for the whole model."""
    made, shape, criterion = Choices(), job.shape, job.method
    if isinstance(criterion, Method) or (shape.width is None and shape.hidden is None):
        return
    assert isinstance(criterion, Criterion)  # experts have their own kind, and neither of these
    if isinstance(criterion, GradientCriterion):
        whole = find_structure(build_skeleton(job.source.folder))
        made.saliences = gradient_scores(
            criterion, shape, job.source.folder, whole, job.calibration.batches, job.device, reporter
        )
        trim_memory()
    if shape.hidden is not None:
        store = ActivationStore(activation_limit(job.recipe.activation_memory), scratch)
        chosen = choose_channels(
            shape.hidden, job.model, job.structure, job.binding, job.reader, criterion, made.saliences,
            job.calibration.batches, store, job.device, job.compute, reporter,
        )  # fmt: skip
        made.keep, made.scales, made.units = chosen.keep, chosen.scales, chosen.units
    job.choices = made


def _write_config(job: Job, partial: Path) -> None:
    """The config as it is, but for another number format when one was asked for, and for what says the new shapes."""
    text = (job.source.folder / "config.json").read_text(encoding="utf-8")
    if job.dtype is not None or job.shape.changes:
        config = json.loads(text)
        if job.dtype is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = str(job.dtype).removeprefix("torch.")
        config = apply_changes(config, as_spelled(job.shape.changes, job.model.config, config))
        text = json.dumps(config, indent=2) + "\n"
    (partial / "config.json").write_text(text, encoding="utf-8")


def tell_notes(matrices: Sequence[PrunedMatrix], reporter: Reporter) -> None:
    """What methods reported, each kind once with a count; the result file has them matrix by matrix."""
    seen: dict[str, list[str]] = {}
    for matrix in matrices:
        for note in matrix.notes:
            seen.setdefault(note, []).append(matrix.name)
    for note, names in list(seen.items())[:10]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        reporter.warn(f"{names[0]}{more}: {note}")
    if len(seen) > 10:
        reporter.warn(f"{len(seen) - 10} more notes are in {RESULT_FILE}")
