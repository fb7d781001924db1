"""How a budget is split among depth, neurons and attention: measured, predicted, tried, chosen, and told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers

from secateur.budgets import Budget, parse_budget
from secateur.checkpoint.source import Source
from secateur.checkpoint.writer import Layout, layout_like
from secateur.engine.device import parse_dtype
from secateur.engine.entries import changed
from secateur.errors import BudgetError, UnsupportedModelError, UsageError
from secateur.measure.steps import step_seconds
from secateur.plugins import Criterion
from secateur.progress import Recorder
from secateur.recipe import Recipe
from secateur.structured import costs
from secateur.structured.budget import MEASURED_SIZES, ladder, least, splits
from secateur.structured.configure import noun, shapes_of
from secateur.structured.couplings import Kind
from secateur.structured.ladder import count, divide, first
from secateur.structured.offers import Offers, find_offers
from secateur.verbs.calibration import Calibration
from secateur.verbs.loss import fits_in_memory
from secateur.verbs.loss_bench import ORDER_TOKENS, LossBench, finite

if TYPE_CHECKING:
    from secateur.verbs.shape import Model

FIT_TOKENS, HELD_TOKENS = 8192, 4096
"""Calibration tokens that are refitted on, and that losses are measured on."""
TRIALS = 3
"""Splits that are tried as a whole."""
NOTED = 20
"""Splits that the result keeps."""
_WHAT = {"parameters": "block parameters", "bytes": "bytes of weights", "decode": "seconds of a decoding step"}


@dataclass(frozen=True)
class Chosen:
    """How a budget was split, as plain data, so that a resumed run takes it from its ledger."""

    record: dict[str, Any]

    @property
    def gone(self) -> list[int]:
        """Blocks that go, ascending."""
        return list(self.record["chosen"]["blocks_gone"])

    @property
    def kept(self) -> dict[Kind, int]:
        """By kind, units that stay in each block; kinds that stay whole are not named."""
        return dict(self.record["chosen"]["units"])

    def lines(self) -> list[str]:
        """The choice in words."""
        known, chosen = self.record, self.record["chosen"]
        tokens = known["tokens"]
        said = [
            _goal_line(known),
            f"loss in {known['loss']}, above the {known['loss_before']:.3f} of the whole model, on "
            f"{tokens['measured']:,} tokens of the calibration text; refitted on {tokens['refitted']:,} others",
        ]
        for kind, points in known["alone"].items():
            shown = ", ".join(f"{size:,}: {_signed(excess)}" for size, excess in points)
            said.append(f"{noun(kind)} alone, by how many stay: {shown}")
        if known["depth"]:
            shown = ", ".join(f"{index}: {_signed(excess)}" for index, excess in known["depth"])
            said.append(f"blocks alone, one after the other: {shown}")
        said += [
            f"{'chosen' if split == chosen else 'considered'}: {_words(split)}: "
            f"{_signed(split['predicted'])} predicted, {_signed(split['measured'])} measured"
            for split in known["considered"]
            if split["measured"] is not None
        ]
        return said


def choose_split(
    recipe: Recipe, source: Source, config: transformers.PreTrainedConfig, model: Model, criterion: Criterion,
    calibration: Calibration, device: torch.device, compute: torch.dtype, reporter: Recorder,
) -> Chosen:  # fmt: skip
    """Choose blocks and widths that meet a budget, by measured loss.

    Every structure alone is measured at a few sizes, all splits that meet the budget are predicted by the sum of what
    their parts cost alone, and the best few are carried out on part of the calibration text and measured on another.

    Raises:
        BudgetError: when everything may stay, or nothing meets the budget.
        UnsupportedModelError: when a structure that was named cannot be cut, or the model does not decode.
        UsageError: when the model does not fit in memory.
    """
    budget = parse_budget(recipe.budget or "")
    parts = (model.skeleton, model.structure, model.binding, model.reader)
    offers = find_offers(config, *parts, recipe.structure, recipe.round_to)
    for name, reason in offers.refused.items():
        reporter.note(f"{name} is left out: {reason}")
    if not fits_in_memory(model.reader, _beside(offers, model, decode=budget.key == "decode")):
        raise UsageError(
            "a budget needs the whole model in memory, to measure what is lost, and it does not fit",
            hint="give --structure and --sparsity: these take one block at a time",
        )
    layout = layout_like(model.reader, parse_dtype(recipe.dtype, "dtype"))
    cost, timed = _cost(budget, offers, config, model, layout, device, reporter)
    limit = _limit(budget, cost, offers)
    sizes = {kind: ladder(cost, limit, kind, own) for kind, own in offers.sizes.items()}
    fit, held = divide(calibration.batches, max(FIT_TOKENS, 2 * _widest(offers)), HELD_TOKENS)
    if fit is held:
        reporter.warn("there is one calibration window: what is refitted and what is measured is the same text")
    bench = LossBench(recipe, source, model, offers, criterion, fit, held, device, compute, reporter)
    curves = bench.curves(sizes)
    order, depth = bench.order(cost, limit, curves) if offers.depth else ([], [])
    found = splits(cost, limit, order, depth, offers.sizes, curves)
    if not found:
        raise _out_of_reach(budget, cost, cost.of(order, {kind: own[-1] for kind, own in offers.sizes.items()}))
    measured = bench.trials(found[:TRIALS])
    every = costs.number_cost(layout, model.structure, model.binding, offers.couplings, shapes_of(model.skeleton))
    considered: list[dict[str, Any]] = [
        {"blocks_gone": list(split.gone), "units": dict(split.kept), "cost": split.cost, "predicted": split.predicted,
         "measured": value, "parameters": every.of(split.gone, split.kept) / every.of()}
        for split, value in zip(found[:NOTED], [*measured, *[None] * NOTED], strict=False)
    ]  # fmt: skip
    chosen = min(
        considered[: len(measured)], key=lambda split: math.inf if split["measured"] is None else split["measured"]
    )
    record = {
        "budget": budget.text, "of": _WHAT[budget.key], "whole": cost.of(), "limit": limit,
        "loss": bench.unit, "loss_before": bench.dense,
        "tokens": {"refitted": count(fit), "measured": count(held), "order": count(first(held, ORDER_TOKENS))},
        "alone": {kind: [[size, finite(curves[kind].at(size))] for size in own] for kind, own in sizes.items()},
        "depth": [[index, finite(excess)] for index, excess in zip(order, depth, strict=True)],
        "left_out": offers.refused, "timed": timed, "considered": considered, "chosen": chosen,
    }  # fmt: skip
    bench.close()
    return Chosen(record)


def _cost(
    budget: Budget, offers: Offers, config: transformers.PreTrainedConfig, model: Model, layout: Layout,
    device: torch.device, reporter: Recorder,
) -> tuple[costs.Cost, list[dict[str, Any]]]:  # fmt: skip
    """The cost that a budget speaks of, and what was timed for it."""
    structure, shapes = model.structure, shapes_of(model.skeleton)
    if budget.key == "parameters":
        return costs.parameter_cost(structure, offers.couplings, shapes), []
    if budget.key == "bytes":
        return costs.byte_cost(layout, structure, model.binding, offers.couplings, shapes), []
    if model.skeleton.config.is_encoder_decoder or not model.skeleton.can_generate():
        raise UnsupportedModelError(
            f"{type(model.skeleton).__name__} does not decode token by token, so there is no step to time",
            hint="give --budget parameters=... or bytes=...",
        )
    shapes_tried: list[tuple[str, int, dict[tuple[str, ...], Any]]] = [("whole", len(structure.blocks), {})]
    if offers.depth:
        shapes_tried.append(("depth", len(offers.depth.kept), offers.depth.changes))
    for kind, plan in offers.smallest.items():
        shapes_tried.append((kind, plan.units[kind][1], plan.shrunk.changes))
    entry = model.binding.unit_of(structure.matrices[0].name).keys[0]
    dtype = next(own.dtype for shard in layout.shards for own in shard.entries if own.key == entry)
    configs = [changed(config, changes) for _, _, changes in shapes_tried]
    seconds = step_seconds(configs, device=device, dtype=dtype, reporter=reporter)
    by_name = {name: (size, taken) for (name, size, _), taken in zip(shapes_tried, seconds, strict=True)}
    cost = costs.decode_cost(
        len(structure.blocks), costs.units_of(offers.couplings), seconds[0], by_name.get("depth"),
        {kind: by_name[kind] for kind in offers.smallest},
    )  # fmt: skip
    timed = [{"shape": name, "size": size, "seconds": taken} for name, (size, taken) in by_name.items()]
    return cost, timed


def _limit(budget: Budget, cost: costs.Cost, offers: Offers) -> float:
    """The most that may stay.

    Raises:
        BudgetError: when all of it may, or even the least that is possible is more.
    """
    limit = budget.limit(cost.of())
    if budget.key != "decode":
        limit = math.floor(limit + 1e-6)
    if cost.of() <= limit:
        raise BudgetError(
            f"budget '{budget.text}' keeps everything: the model has {_amount(budget.key, cost.of())}",
            hint="give a smaller one",
        )
    smallest = {kind: own[-1] for kind, own in offers.sizes.items()}
    reach = least(cost, smallest, depth=offers.depth is not None)
    if reach > limit:
        raise _out_of_reach(budget, cost, reach)
    return limit


def _out_of_reach(budget: Budget, cost: costs.Cost, reach: float) -> BudgetError:
    share = f"{cost.of() / reach:.2f}x" if budget.key == "decode" else f"{reach / cost.of():.3f} of what there is"
    return BudgetError(
        f"nothing meets budget '{budget.text}'",
        hint=f"the least that can be reached is {_amount(budget.key, reach)}, {share}; allow more structures, "
        "a smaller --round-to, or a larger budget",
    )


def _widest(offers: Offers) -> int:
    return max((coupling.columns.numel() for own in offers.couplings.values() for coupling in own), default=0)


def _beside(offers: Offers, model: Model, *, decode: bool) -> int:
    """Bytes beside the model: what is refitted at several sizes, or before that the shapes that are timed."""
    made = 0
    for own in offers.couplings.values():
        for coupling in own:
            info = model.reader.info(model.binding.unit_of(coupling.consumer).keys[0])
            made += info.nbytes * min(MEASURED_SIZES, len(offers.sizes[coupling.kind]))
    whole = sum(model.reader.info(key).nbytes for key in model.reader.keys)
    return max(made, whole * (len(offers.sizes) + 1) if decode else 0)


def _amount(key: str, value: float) -> str:
    return f"{value * 1e3:.2f} ms a decoding step" if key == "decode" else f"{value:,.0f} {_WHAT[key]}"


def _signed(value: float | None) -> str:
    return "destroyed" if value is None else f"{value:+.3f}"


def _words(split: Mapping[str, Any]) -> str:
    """A split in words."""
    parts = [f"{len(split['blocks_gone'])} blocks fewer"] if split["blocks_gone"] else []
    return ", ".join(parts + [f"{size:,} {noun(kind)}" for kind, size in split["units"].items()])


def _goal_line(known: Mapping[str, Any]) -> str:
    chosen, whole = known["chosen"], known["whole"]
    share = f"{chosen['parameters']:.1%} of all parameters"
    if known["timed"]:
        return (
            f"budget {known['budget']}: decoding is predicted to be {whole / chosen['cost']:.2f} times as fast, "
            f"{chosen['cost'] * 1e3:.2f} instead of {whole * 1e3:.2f} ms a step at batch 1 (a line through "
            f"{len(known['timed'])} shapes timed here on random weights); {share} stay"
        )
    return (
        f"budget {known['budget']}: at most {known['limit']:,.0f} of {whole:,.0f} {known['of']} may stay; these are "
        f"{chosen['cost']:,.0f} ({chosen['cost'] / whole:.1%}), {share}"
    )
