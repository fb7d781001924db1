"""From a recipe and a model's structure to one target for every matrix. Everything that cannot work is refused here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from secateur.engine.blocks import MatrixSpec, Structure
from secateur.errors import SparsityError, TargetError
from secateur.plugins import Method, Target, load_class
from secateur.recipe import Recipe
from secateur.targets import matches, select


@dataclass
class Plan:
    """Which matrices are pruned and how far. ``counts`` holds exact numbers of zeros for (name, expert) where a method
    fixed them over the whole model.
    """

    targets: dict[str, Target] = field(default_factory=dict)
    counts: dict[tuple[str, int], int] = field(default_factory=dict)

    def target(self, name: str, expert: int) -> Target:
        """The target of one single matrix."""
        count = self.counts.get((name, expert))
        return self.targets[name] if count is None else replace(self.targets[name], count=count)


def make_plan(recipe: Recipe, structure: Structure) -> Plan:
    """Choose matrices by ``targets`` and ``ignore``, divide the sparsity among them, apply ``overrides``.

    Raises:
        TargetError: when a pattern matches nothing, or nothing is left to prune.
        PatternError: when the N:M pattern does not divide the inputs of a chosen matrix.
        SparsityError: when an override contradicts an N:M pattern.
        UnknownNameError: for an unknown allocation.
    """
    specs = {matrix.name: matrix for matrix in structure.matrices}
    chosen = _choose(recipe, structure, specs)
    pattern = recipe.parsed_pattern
    for name in chosen:
        pattern.check_divides(name, specs[name].in_features)
    overridden: dict[str, float] = {}
    for override in recipe.overrides:
        for name in select(override.match, list(chosen), "override"):
            overridden[name] = override.sparsity
        implied = pattern.sparsity
        if implied is not None and override.sparsity not in (0.0, implied):
            raise SparsityError(
                f"override '{override.match}' asks for {override.sparsity:g}, but pattern {pattern} means {implied:g}",
                hint="with N:M an override can only leave matrices dense: sparsity 0",
            )
    free = [name for name in chosen if name not in overridden]
    allocation = load_class("allocation", recipe.allocation, "allocation")()
    sparsities = allocation.allocate(free, {name: specs[name].size for name in free}, recipe.effective_sparsity)
    sparsities.update(overridden)
    return Plan({name: Target(sparsities[name], pattern) for name in chosen})


def _choose(recipe: Recipe, structure: Structure, specs: dict[str, MatrixSpec]) -> list[str]:
    names = list(specs)
    chosen = set(names)
    if recipe.targets:
        chosen = set()
        for pattern in recipe.targets:
            for name, (_, reason) in structure.unprunable.items():
                if not any(matches(pattern, other) for other in names) and matches(pattern, name):
                    raise TargetError(
                        f"target '{pattern}' names {name}, which cannot be pruned: {reason}",
                        hint="`secateur inspect` lists what can be pruned",
                    )
            chosen.update(select(pattern, names, "target"))
    for pattern in recipe.ignore:
        chosen.difference_update(select(pattern, names, "ignore"))
    if not chosen:
        raise TargetError("--targets and --ignore leave no matrix to prune", hint="loosen one of them")
    return [name for name in names if name in chosen]


def plan_globally(
    plan: Plan, method: Method, recipe: Recipe, structure: Structure, load: Callable[[str], torch.Tensor]
) -> None:
    """Let a method that compares weights across the whole model fix the number of zeros of every matrix.

    ``load`` returns a stored tensor of the model by name. Matrices with an override keep their own sparsity.
    """
    planner = getattr(method, "plan", None)
    if planner is None or not recipe.parsed_pattern.unstructured:
        return
    own = {name for override in recipe.overrides for name in plan.targets if matches(override.match, name)}
    single: dict[str, tuple[MatrixSpec, int]] = {}
    for spec in structure.matrices:
        if spec.name in plan.targets and spec.name not in own:
            for expert in range(max(spec.experts, 1)):
                single[f"{spec.name}[{expert}]" if spec.experts else spec.name] = (spec, expert)

    def load_single(name: str) -> torch.Tensor:
        spec, expert = single[name]
        return spec.slices(load(spec.name))[expert].float().contiguous()

    counts = planner(list(single), load_single, recipe.effective_sparsity)
    if counts is not None:
        plan.counts.update({(single[name][0].name, single[name][1]): count for name, count in counts.items()})
