"""Divides the sparsity of a run among its matrices by a rule that looks at the dense model first."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.allocation._base import Measuring, WithGradients, make_allocation
from secateur.allocation_file import is_file
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.source import Source
from secateur.engine.activations import ActivationStore
from secateur.engine.blocks import MatrixSpec
from secateur.engine.device import activation_limit, trim_memory
from secateur.engine.fisher import output_gradients
from secateur.engine.forward import Stored
from secateur.engine.plan import Plan, free_shares
from secateur.engine.survey import Survey, gathering
from secateur.errors import CalibrationError, UnsupportedModelError, UsageError
from secateur.measure.model import load_model
from secateur.measure.scoring import NextTokenScorer
from secateur.plugins import Method, StatisticsKind, Target, make_method
from secateur.progress import Recorder, Reporter
from secateur.recipe import Recipe
from secateur.result import PrunedMatrix
from secateur.structured.ladder import Discard
from secateur.verbs.calibration import Calibration
from secateur.verbs.loss import fits_in_memory
from secateur.verbs.shape import Model


def measuring_rule(recipe: Recipe) -> Measuring | None:
    """The rule of a recipe when it looks at the model; None for uniform, for a file, and where whole units go."""
    if recipe.structure or is_file(recipe.allocation):
        return None
    rule = make_allocation(recipe.allocation, recipe.allocation_options)
    return rule if isinstance(rule, Measuring) else None


def divide(
    recipe: Recipe, source: Source, model: Model, plan: Plan, calibrated: Callable[[], Calibration],
    device: torch.device, compute: torch.dtype, reporter: Recorder, resumed: Mapping[str, Any] | None,
) -> dict[str, float]:  # fmt: skip
    """The sparsity of each matrix that has no override, as the rule of the recipe divides it.

    Args:
        plan: says which matrices there are.
        calibrated: loads the calibration data, where the rule needs them.
        resumed: fingerprint of the run that is taken up: its allocation is taken over. Where that run was another one,
            it is refused before any work, as the fingerprints differ.

    Returns:
        By name; empty where the rule does not look at the model.

    Raises:
        UnsupportedModelError: for gradients of a model that predicts no next tokens, or has stacked experts.
        UsageError: when they do not fit in memory.
        CalibrationError: when the data hold no token ids to predict.
    """
    rule = measuring_rule(recipe)
    if rule is None or not plan.free:
        return {}
    earlier = resumed.get("allocation") if resumed is not None else None
    if isinstance(earlier, dict) and set(plan.targets) == set(earlier):
        return {name: float(earlier[name]) for name in plan.free}
    batches: Sequence[Mapping[str, Tensor]] = () if rule.needs == "weights" else calibrated().batches
    fisher: dict[str, Tensor] = {}
    solver: Method | None = None
    specs = {matrix.name: matrix for matrix in model.structure.matrices}
    if isinstance(rule, WithGradients):
        solver = make_method(rule.solver)
        fisher = _gradients(rule, source, model.reader, [specs[name] for name in plan.free], batches, device, reporter)
    stored = Stored(model.reader)
    kinds: dict[str, StatisticsKind] = {"norms": "norms", "gram": "gram"}
    with tempfile.TemporaryDirectory(prefix="secateur-") as scratch:
        survey = Survey(
            model.skeleton, model.structure, model.binding, stored, Discard(stored),
            gathering(kinds.get(rule.needs, "none")), Plan({name: Target(0.0) for name in plan.free}),
            ActivationStore(activation_limit(recipe.activation_memory), Path(scratch)), device, compute, recipe.seed,
            reporter, f"measuring for {recipe.allocation}", rule=rule, solver=solver, fisher=fisher,
            sparsity=recipe.effective_sparsity,
        )  # fmt: skip
        survey.run(batches)
    trim_memory()
    return rule.allocate(free_shares(model.structure, plan.free, survey.measured), recipe.effective_sparsity)


def _gradients(
    rule: WithGradients, source: Source, reader: CheckpointReader, specs: Sequence[MatrixSpec],
    batches: Sequence[Mapping[str, Tensor]],
    device: torch.device, reporter: Reporter,
) -> dict[str, Tensor]:  # fmt: skip
    """Mean squared gradient of each output, from the first windows of the calibration text."""
    rows = [row[None, : rule.length] for batch in batches if set(batch) <= {"input_ids", "attention_mask"}
            for row in batch.get("input_ids", ())]  # fmt: skip
    rows = [row.to(device) for row in rows[: rule.sequences] if row.shape[1] > 1]
    if not rows:
        raise CalibrationError("this allocation needs token ids to predict", hint="give text with --calibration")
    if not fits_in_memory(reader):
        raise UsageError(
            "this allocation takes the whole model in memory for its gradients, and that does not fit",
            hint="use --allocation owl or alpha, which stream one block at a time",
        )
    model = load_model(source.folder, device=str(device), dtype="float32")
    try:
        NextTokenScorer(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"this allocation needs a loss of next tokens: {error.message}", hint="use --allocation owl or alpha"
        ) from None
    found = output_gradients(model, specs, rows, reporter)
    del model
    trim_memory()
    return found


def allocation_sentences(matrices: Sequence[PrunedMatrix], recipe: Recipe) -> list[str]:
    """From where to where the sparsities go, when they were divided by anything but the uniform rule."""
    if recipe.structure or recipe.allocation == "uniform" or not matrices:
        return []
    least, most = (pick(matrices, key=lambda one: one.sparsity) for pick in (min, max))
    return [
        f"Allocation {recipe.allocation}: from {least.sparsity:.1%} zeros in {least.name} to {most.sparsity:.1%} in "
        f"{most.name}."
    ]
