"""From a recipe and a model's structure to one target for every matrix. Everything that cannot work is refused here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from secateur.allocation._base import Measuring, Share, make_allocation, projected
from secateur.allocation_file import check_model, is_file, read_allocation
from secateur.engine.blocks import MatrixSpec, Structure
from secateur.errors import SparsityError, TargetError, UsageError
from secateur.plugins import Method, Target
from secateur.recipe import Recipe
from secateur.targets import matches, select


@dataclass
class Plan:
    """Which matrices are pruned and how far. ``counts`` holds exact numbers of zeros for (name, expert) where a method
    fixed them over the whole model.
    """

    targets: dict[str, Target] = field(default_factory=dict)
    counts: dict[tuple[str, int], int] = field(default_factory=dict)
    free: list[str] = field(default_factory=list)
    """Matrices without an override, among which the sparsity is divided."""

    def target(self, name: str, expert: int) -> Target:
        """The target of one single matrix."""
        count = self.counts.get((name, expert))
        return self.targets[name] if count is None else replace(self.targets[name], count=count)


def make_plan(recipe: Recipe, structure: Structure, measured: Mapping[str, float] | None = None) -> Plan:
    """Choose matrices by ``targets`` and ``ignore``, divide the sparsity among them, apply ``overrides``.

    Args:
        measured: the sparsities that a rule which looks at the model has found. Without them such a rule is taken for
            uniform: everything else is checked, and `free_matrices` says what there is to divide.

    Raises:
        TargetError: when a pattern matches nothing, or nothing is left to prune.
        PatternError: when the N:M pattern does not divide the inputs of a chosen matrix.
        SparsityError: when an override or the allocation contradicts an N:M pattern, or bounds leave no way to divide.
        UnknownNameError: for an unknown allocation, or an unknown option of it.
        AllocationError: for an allocation file that was made for another model.
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
    if measured is not None:
        sparsities = {name: measured[name] for name in free}
    elif is_file(recipe.allocation):
        sparsities = _from_file(recipe, structure, free)
    else:
        rule = make_allocation(recipe.allocation, recipe.allocation_options)
        if isinstance(rule, Measuring):
            _check_divisible(recipe)
            rule = make_allocation("uniform")
        sparsities = rule.allocate(free_shares(structure, free), recipe.effective_sparsity)
    return Plan({name: Target({**sparsities, **overridden}[name], pattern) for name in chosen}, free=free)


def free_shares(
    structure: Structure, names: Iterable[str], measured: Mapping[str, Sequence[torch.Tensor]] | None = None
) -> list[Share]:
    """What an allocation rule is told of the matrices it divides among."""
    wanted = set(names)
    return [
        Share(matrix.name, matrix.size, block.index, tuple((measured or {}).get(matrix.name, ())))
        for block in structure.blocks for matrix in block.matrices if matrix.name in wanted
    ]  # fmt: skip


def _check_divisible(recipe: Recipe) -> None:
    """Refuse to divide what cannot be, before anything is measured."""
    if not recipe.parsed_pattern.unstructured:
        raise SparsityError(
            f"allocation {recipe.allocation} has no meaning with pattern {recipe.pattern}, which fixes every sparsity",
            hint="leave one of them out; --override PATTERN=0 leaves matrices dense",
        )
    projected({"": 0.0}, {"": 1}, recipe.effective_sparsity)


def _from_file(recipe: Recipe, structure: Structure, free: Sequence[str]) -> dict[str, float]:
    """The sparsities of an allocation file, moved to the recipe's where that asks for another one."""
    found = read_allocation(recipe.allocation)
    specs = {matrix.name: matrix for matrix in structure.matrices}
    check_model(recipe.allocation, found, {name: spec.shape for name, spec in specs.items()}, free)
    made = {name: found.sparsities[name] for name in free}
    pattern = recipe.parsed_pattern
    if not pattern.unstructured:
        odd = next((name for name, value in made.items() if value not in (0.0, pattern.sparsity)), None)
        if odd is not None:
            raise SparsityError(
                f"{recipe.allocation} has {made[odd]:g} for {odd}, but pattern {pattern} means {pattern.sparsity:g}",
                hint="with N:M an allocation can only leave matrices dense: sparsity 0",
            )
    elif recipe.sparsity is not None and made:
        made = projected(made, {name: specs[name].size for name in free}, recipe.sparsity)
    return made


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

    Raises:
        UsageError: when an allocation divides the sparsity already.
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
        if recipe.allocation != "uniform":
            raise UsageError(
                f"method {recipe.method} compares all weights of the model: --allocation has no meaning beside that",
                hint="leave one of them out",
            )
        plan.counts.update({(single[name][0].name, single[name][1]): count for name, count in counts.items()})
