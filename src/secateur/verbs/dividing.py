"""Divides the sparsity of a run among its matrices by a rule that looks at the dense model first."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from secateur.allocation._base import Measuring, Searching, WithGradients, make_allocation
from secateur.allocation_file import is_file
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.source import Source
from secateur.engine.activations import ActivationStore
from secateur.engine.device import activation_limit, trim_memory
from secateur.engine.fisher import output_gradients
from secateur.engine.forward import Stored
from secateur.engine.levels import LevelStore
from secateur.engine.plan import Plan, free_shares
from secateur.engine.survey import Survey, gathering
from secateur.errors import CalibrationError, UnsupportedModelError, UsageError
from secateur.measure.model import load_model
from secateur.measure.scoring import NextTokenScorer
from secateur.plugins import Method, StatisticsKind, Target, make_method
from secateur.progress import Recorder
from secateur.recipe import Recipe
from secateur.result import PrunedMatrix
from secateur.structured.ladder import Discard
from secateur.verbs.calibration import Calibration
from secateur.verbs.loss import fits_in_memory
from secateur.verbs.searching import Dense, ask_dense, search, tell_cost
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
    store: LevelStore | None = None
    dense = Dense([])
    specs = {matrix.name: matrix for matrix in model.structure.matrices}
    stored = Stored(model.reader)
    kinds: dict[str, StatisticsKind] = {"norms": "norms", "gram": "gram"}
    with tempfile.TemporaryDirectory(prefix="secateur-") as scratch, tempfile.TemporaryDirectory() as levels:
        if isinstance(rule, WithGradients):
            solver = make_method(rule.solver)
            rows = _rows(batches, rule.length, device)
            whole = _in_memory(source, model.reader, device)
            fisher = output_gradients(whole, [specs[name] for name in plan.free], rows[: rule.sequences], reporter)
            if isinstance(rule, Searching) and rule.generations:
                store = LevelStore(Path(levels), rule.tried(recipe.effective_sparsity))
                dense = ask_dense(whole, rows[: rule.windows], compute)
                tell_cost(rule, dense, store, sum(specs[name].size for name in plan.free), reporter)
            del whole
            trim_memory()
        survey = Survey(
            model.skeleton, model.structure, model.binding, stored, Discard(stored),
            gathering(kinds.get(rule.needs, "none")), Plan({name: Target(0.0) for name in plan.free}),
            ActivationStore(activation_limit(recipe.activation_memory), Path(scratch)), device, compute, recipe.seed,
            reporter, f"measuring for {recipe.allocation}", rule=rule, solver=solver, fisher=fisher,
            sparsity=recipe.effective_sparsity, keep=None if store is None else store.keep,
        )  # fmt: skip
        survey.run(batches)
        trim_memory()
        shares = free_shares(model.structure, plan.free, survey.measured)
        made = rule.allocate(shares, recipe.effective_sparsity)
        if store is not None and isinstance(rule, Searching):
            free = {name: specs[name] for name in plan.free}
            made = search(
                rule, source, free, store, dense, shares, made, recipe.effective_sparsity, recipe.seed, device, compute,
                reporter,
            )  # fmt: skip
    return made


def _rows(batches: Sequence[Mapping[str, Tensor]], length: int, device: torch.device) -> list[Tensor]:
    """Windows of the calibration text that have a next token, (1, length) each at most.

    Raises:
        CalibrationError: when there is none.
    """
    rows = [row[None, :length] for batch in batches if set(batch) <= {"input_ids", "attention_mask"}
            for row in batch.get("input_ids", ())]  # fmt: skip
    rows = [row.to(device) for row in rows if row.shape[1] > 1]
    if not rows:
        raise CalibrationError("this allocation needs token ids to predict", hint="give text with --calibration")
    return rows


def _in_memory(source: Source, reader: CheckpointReader, device: torch.device) -> transformers.PreTrainedModel:
    """The whole model, for a rule that wants its loss.

    Raises:
        UsageError: when it does not fit.
        UnsupportedModelError: when it predicts no next tokens.
    """
    if not fits_in_memory(reader):
        raise UsageError(
            "this allocation takes the whole model in memory for its loss, and that does not fit",
            hint="use --allocation owl or alpha, which stream one block at a time",
        )
    model = load_model(source.folder, device=str(device), dtype="float32")
    try:
        NextTokenScorer(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"this allocation needs a loss of next tokens: {error.message}", hint="use --allocation owl or alpha"
        ) from None
    return model


def asked_of_each(plan: Plan) -> dict[str, float]:
    """The sparsity asked of every matrix; empty where it is the same one, and where the method itself divides it."""
    asked = {name: target.sparsity for name, target in plan.targets.items()}
    return {} if plan.counts or len(set(asked.values())) < 2 else asked


def allocation_sentences(matrices: Sequence[PrunedMatrix], recipe: Recipe) -> list[str]:
    """From where to where the sparsities go, when they were divided by anything but the uniform rule."""
    if recipe.structure or recipe.allocation == "uniform" or not matrices:
        return []
    least, most = (pick(matrices, key=lambda one: one.sparsity) for pick in (min, max))
    return [
        f"Allocation {recipe.allocation}: from {least.sparsity:.1%} zeros in {least.name} to {most.sparsity:.1%} in "
        f"{most.name}."
    ]
