"""The recipe of a pruning run: flags of the command line = keys of the YAML file = arguments of the Python call."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.allocation_file import is_file
from secateur.budgets import parse_budget
from secateur.combinations import best
from secateur.errors import RecipeError, SparsityError, UnknownNameError
from secateur.patterns import Pattern, check_sparsity, parse_pattern
from secateur.recipe_values import checked

DEFAULT_SPARSITY = 0.5
DEFAULT_SAMPLES = 128
DEFAULT_SEQUENCE_LENGTH = 2048
DEFAULT_PERMUTE = False
STRUCTURES = ("depth", "ffn", "kv-groups", "heads", "experts", "hidden")
"""What --structure can remove."""
BUDGET_STRUCTURES = ("depth", "ffn", "kv-groups", "heads")
"""Among which a budget can be split."""
LOOKED_AT = {
    "round_to": ("ffn", "hidden"),
    "update": ("ffn", "kv-groups", "heads", "hidden"),
}
"""Which structures look at a field."""
RECONSTRUCTS = ("ffn", "kv-groups", "heads")
"""Structures after which a block can be trained."""
DEPTH_WAYS = ("auto", "greedy", "influence", "angular")
BITS, GROUP_SIZES = (8, 4), (64, 128)
"""Of rounded weights, and how many may share a scale."""
STANDS_FOR = ("auto", "best")
"""Methods that are names for something else, which a recipe puts in their place."""
RECONSTRUCTED = ("none", "block", "half-block")
"""What --reconstruct can train in one go."""


@dataclass(frozen=True, kw_only=True)
class Override:
    """Another sparsity for the matrices whose names match a glob or ``re:`` pattern."""

    match: str
    sparsity: float

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, f"sparsity of override '{self.match}'")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to prune and how. A field left at None takes its default when the model is known."""

    method: str = "auto"
    """Pruning method; `secateur methods` lists them. auto is best, which stands for alps with --error-correction auto;
    with --structure it is mixed, for hidden obs, for experts reap. Blocks are chosen by --depth-by instead."""
    method_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the method, as KEY=VALUE; `secateur methods NAME` lists them."""
    sparsity: float | None = None
    """Share of the weights that become zero (0.5; for N:M the pattern says it)."""
    pattern: str = "unstructured"
    """unstructured, or N:M to keep N of every M consecutive inputs."""
    permute: bool | None = None
    """With N:M: first put inputs whose order is free (neurons; values within a head) in the order in which the pattern
    keeps most. The dense model computes the same then. Default: off."""
    structure: tuple[str, ...] = ()
    """Remove whole units, not single weights: depth, ffn, kv-groups, heads, experts, hidden; several by commas.
    heads,hidden removes heads together with hidden channels, where a config knows no size of a head."""
    budget: str | None = None
    """Instead of --sparsity: parameters=0.75 (at most this share of the block parameters stays), bytes=150MB or
    bytes=0.75 (weights on disk), or decode=1.5x (times as fast, predicted). How depth, neurons and attention share it
    is chosen by measured loss on calibration text; --structure says which of them may be used (all that there are)."""
    depth_by: str = "auto"
    """How --structure depth chooses blocks: greedy, influence or angular; auto is greedy where that is affordable."""
    round_to: int = 32
    """Neurons and hidden channels that stay are a multiple of this (with --structure ffn or hidden)."""
    update: bool = True
    """Refit what stays to make up for what goes (with --structure ffn, kv-groups, heads or hidden)."""
    refit: bool | None = None
    """Solve the kept weights anew by least squares once the zeros are known. Default: on where the method has the Gram
    matrix of the inputs (sparsegpt, admm, alps); for any other method --refit gathers it. --no-refit is the published
    method."""
    error_correction: str | None = None
    """Prune towards what the dense model gives behind each matrix, so that earlier errors are made good: a share of the
    correction from 0 to 1, auto to choose it for each matrix on calibration text that is held out, or off. It takes a
    dense forward beside the other one, and a method with the Gram matrix of the inputs. Default: off where a method is
    named, auto with --method best."""
    reconstruct: str = "none"
    """After a block is pruned, train what is left of it on the calibration data until it gives the dense block's
    outputs: block, half-block (attention first, then the rest), or none. The best state on data held out stays."""
    reconstruct_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of --reconstruct, as KEY=VALUE: passes, learning_rate, batch; docs/methods.md says what they are."""
    bits: int | None = None
    """Round the kept weights to 8 or 4 bits once the zeros are known, each error made good by the other weights; zeros
    stay zero. Written as the rounded numbers, in float32, which the sparse format packs without loss in the same bits
    and group size. It takes a method with the Gram matrix of the inputs."""
    group_size: int | None = None
    """With --bits: weights of a row that share a scale, 64 or 128 (64)."""
    allocation: str = "uniform"
    """How the sparsity is divided among the matrices: the name of a rule, or a .yaml file that `secateur allocate`
    wrote (moved to --sparsity where that is given as well)."""
    allocation_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the allocation, as KEY=VALUE; `secateur methods NAME` lists them."""
    calibration: str = "builtin"
    """Calibration data: a text file, a dataset NAME[:CONFIG[:SPLIT]], a folder of images, or builtin."""
    samples: int | None = None
    """Number of calibration windows (128)."""
    sequence_length: int | None = None
    """Tokens in a window (2048, never more than the model's)."""
    targets: tuple[str, ...] = ()
    """Prune only the matrices that match these globs or re: patterns."""
    ignore: tuple[str, ...] = ()
    """Leave the matrices that match these globs or re: patterns dense."""
    overrides: tuple[Override, ...] = ()
    """Sparsity for the matrices that match, instead of the global one."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """cpu, cuda, mps ...; auto takes an accelerator when there is one."""
    dtype: str = "auto"
    """Number format of the written weights: auto (as the source), float32, bfloat16, float16."""
    compute_dtype: str = "auto"
    """Number format of the calibration forward: auto, float32, bfloat16, float16."""
    activation_memory: str = "auto"
    """Activations beyond this spill to disk, e.g. 2GB; auto is half of the free memory."""

    def __post_init__(self) -> None:
        if self.budget is not None and not self.structure:
            object.__setattr__(self, "structure", ("auto",))
        pattern = parse_pattern(self.pattern)
        self._check_structure()
        self._resolve()
        if self.permute and pattern.unstructured:
            raise RecipeError("permute needs an N:M pattern", hint="give --pattern 2:4, or leave it out")
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
            implied = pattern.sparsity
            if implied is not None and abs(self.sparsity - implied) > 1e-9 and self.sparsity != 0:
                raise SparsityError(
                    f"pattern {pattern} means sparsity {implied:g}, not {self.sparsity:g}",
                    hint=f"leave --sparsity out with --pattern {pattern}",
                )
        self.correction  # noqa: B018 - a value that is none is refused
        if self.reconstruct not in RECONSTRUCTED:
            raise UnknownNameError("way to reconstruct", self.reconstruct, RECONSTRUCTED)
        if self.reconstruct_options and self.reconstruct == "none":
            raise RecipeError("reconstruct_options need --reconstruct block or half-block", hint="leave them out")
        self._check_bits()
        if self.allocation_options and is_file(self.allocation):
            raise RecipeError(f"allocation {self.allocation} is a file, which has no options", hint="leave them out")
        for name in ("samples", "sequence_length", "round_to"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name} is {value}", hint=f"{name} must be at least 1")

    def _resolve(self) -> None:
        """Put what is meant in the place of the names that stand for something, and keep what was asked."""
        asked = {"method": self.method, "error_correction": self.error_correction}
        object.__setattr__(self, "_asked", asked)
        method, correction = self.method, self.error_correction
        if method in STANDS_FOR and {*self.structure} != {"depth"}:
            units = "reap" if "experts" in self.structure else "obs" if "hidden" in self.structure else "mixed"
            method = units if self.structure else best.METHOD
            correction = best.ERROR_CORRECTION if correction is None and not self.structure else correction
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "error_correction", "off" if correction is None else correction)

    @property
    def combination(self) -> str | None:
        """The name of the combination that method and error correction were taken from; None where there is none."""
        named = self.__dict__["_asked"]["method"] in STANDS_FOR
        return "best" if named and not self.structure else None

    def as_asked(self) -> dict[str, Any]:
        """`to_dict` with names that stand for something as they were given: what other settings are laid over."""
        asked: dict[str, Any] = self.__dict__["_asked"]
        return self.to_dict() | asked

    @property
    def correction(self) -> float | str:
        """Share of the error correction, or off or auto.

        Raises:
            RecipeError: when it is neither off nor auto nor a number from 0 to 1.
        """
        asked = "off" if self.error_correction is None else self.error_correction
        if asked in ("off", "auto"):
            return asked
        try:
            share = float(asked)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            raise RecipeError(f"error_correction is '{asked}'", hint="give off, auto, or a share from 0 to 1")
        return share

    def _check_bits(self) -> None:
        if self.bits is None:
            if self.group_size is not None:
                raise RecipeError("group_size needs --bits", hint="leave it out, or give --bits 8")
            return
        if self.bits not in BITS:
            raise RecipeError(f"bits is {self.bits}", hint="it must be 8 or 4")
        if self.columns_of_scale not in GROUP_SIZES:
            raise RecipeError(f"group_size is {self.group_size}", hint="it must be 64 or 128")
        if self.dtype not in ("auto", "float32"):
            raise RecipeError(
                f"dtype {self.dtype} cannot hold weights of {self.bits} bits, which are exact in float32",
                hint="leave dtype out, and export the result with --format sparse",
            )
        if self.reconstruct != "none":
            raise RecipeError("--reconstruct would take weights off the grid of --bits", hint="leave one of them out")

    @property
    def columns_of_scale(self) -> int:
        """Weights of a row that share a scale when they are rounded."""
        return GROUP_SIZES[0] if self.group_size is None else self.group_size

    def _check_structure(self) -> None:
        if self.budget is not None:
            self._check_budget()
        for name in self.structure:
            if name not in STRUCTURES and not (self.budget is not None and self.structure == ("auto",)):
                raise UnknownNameError("structure", name, STRUCTURES)
        if len(set(self.structure)) < len(self.structure):
            raise RecipeError(f"structure {', '.join(self.structure)} names one twice")
        beside = [name for name in self.structure if name not in ("experts", "depth")]
        if "experts" in self.structure and beside:
            raise RecipeError(
                f"experts and {', '.join(beside)} cannot go in one run: their methods are of two kinds",
                hint="remove experts first, then prune the result once more",
            )
        if {"kv-groups", "heads"} <= set(self.structure):
            raise RecipeError(
                "kv-groups and heads cannot go in one run: both cut the same output projection",
                hint="choose one, or prune the result once more",
            )
        if "hidden" in self.structure and {*self.structure} - {"hidden", "heads", "kv-groups"}:
            raise RecipeError(
                "structure hidden goes alone, or with heads or kv-groups in proportion",
                hint="prune twice: first the one, then the other on the result",
            )
        if self.depth_by not in DEPTH_WAYS:
            raise UnknownNameError("way to choose blocks", self.depth_by, DEPTH_WAYS)
        self.refuse_unused(f.name for f in dataclasses.fields(self) if not is_default(f, getattr(self, f.name)))

    def refuse_unused(self, names: Iterable[str]) -> None:
        """Refuse the fields among ``names`` that have no meaning beside the others.

        Raises:
            RecipeError: naming the first.
        """
        units = {*self.structure} - {"depth"}
        single = (
            "pattern", "permute", "refit", "error_correction", "bits", "group_size", "allocation",
            "allocation_options", "targets", "ignore", "overrides",
        )  # fmt: skip
        for name in names:
            if name == "depth_by" and not {"depth", "auto"} & {*self.structure}:
                raise RecipeError(f"depth_by needs --structure{' depth' * bool(units)}", hint="leave it out")
            if name in LOOKED_AT and not units:
                structure = f" {', '.join(LOOKED_AT[name])}" if self.structure else ""
                raise RecipeError(f"{name} needs --structure{structure}", hint="leave it out")
            if name == "reconstruct" and self.structure and (not units or units - {*RECONSTRUCTS, "auto"}):
                raise RecipeError(f"reconstruct needs --structure {', '.join(RECONSTRUCTS)}", hint="leave it out")
            if name in single and self.structure:
                asked = "structure" if self.budget is None else "budget"
                raise RecipeError(f"{name} has no meaning with --{asked}", hint="leave it out")
            if name in ("method", "method_options") and self.structure and not units:
                raise RecipeError(
                    f"{name} has no meaning where only whole blocks go", hint="leave it out; --depth-by chooses blocks"
                )

    @property
    def unused(self) -> list[str]:
        """Fields that were changed and that none of these structures looks at, though another would."""
        units = {*self.structure} - {"depth"}
        changed = {"round_to": self.round_to != 32, "update": not self.update}
        looking = {name: units & {*LOOKED_AT[name], "auto"} for name in LOOKED_AT}
        if len(units) > 1:  # channels beside heads go in steps of a head
            looking["round_to"] -= {"hidden"}
        return [name for name in LOOKED_AT if changed[name] and units and not looking[name]]

    def _check_budget(self) -> None:
        parse_budget(self.budget or "")
        if self.sparsity is not None:
            raise RecipeError("budget and sparsity say two things about one size", hint="give one of them")
        for name in self.structure:
            if name in STRUCTURES and name not in BUDGET_STRUCTURES:
                raise RecipeError(
                    f"a budget cannot be split with structure {name} yet",
                    hint=f"it can among {', '.join(BUDGET_STRUCTURES)}",
                )
        if {"kv-groups", "heads"} <= {*self.structure}:
            raise RecipeError(
                "kv-groups and heads are units of the same matrices", hint="name one of them with --budget"
            )
        if self.depth_by not in ("auto", "greedy"):
            raise RecipeError(
                f"depth_by {self.depth_by} has no meaning with a budget",
                hint="there blocks are chosen by measured loss",
            )

    @property
    def parsed_pattern(self) -> Pattern:
        return parse_pattern(self.pattern)

    @property
    def permutes(self) -> bool:
        """Whether inputs whose order is free are put in another one first."""
        return not self.parsed_pattern.unstructured and (DEFAULT_PERMUTE if self.permute is None else self.permute)

    @property
    def effective_sparsity(self) -> float:
        """The sparsity asked for, the one the pattern implies, or the default."""
        if self.sparsity is not None:
            return self.sparsity
        implied = self.parsed_pattern.sparsity
        return DEFAULT_SPARSITY if implied is None else implied

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON or YAML; `Recipe.from_dict` reads it back."""
        data = dataclasses.asdict(self)
        for key in ("structure", "targets", "ignore", "overrides"):
            data[key] = list(data[key])
        for key in ("method_options", "allocation_options", "reconstruct_options"):
            data[key] = dict(data[key])
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
        """Build a recipe from plain data; flags that were not given are simply absent.

        Raises:
            RecipeError: for an unknown key or a value of the wrong kind.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for raw_key, value in data.items():
            key = str(raw_key).replace("-", "_")
            if key not in known:
                close = difflib.get_close_matches(key, sorted(known), n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(sorted(known))}"
                raise RecipeError(f"{where}: unknown key '{raw_key}'", hint=hint)
            values[key] = _overrides(value, where) if key == "overrides" else checked(key, value, where)
        return cls(**values)


def is_default(entry: dataclasses.Field[Any], value: Any) -> bool:
    """Whether a field of a recipe asks for nothing, a named method given: then no error correction is its default."""
    default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
    return bool(value == default or (entry.name == "error_correction" and value == "off"))


def _overrides(value: Any, where: str) -> tuple[Override, ...]:
    if not isinstance(value, list | tuple):
        raise RecipeError(f"{where}: overrides is {value!r}", hint="overrides must be a list of {match, sparsity}")
    return tuple(_override(item, where) for item in value)


def _override(item: Any, where: str) -> Override:
    if isinstance(item, Override):
        return item
    if not isinstance(item, Mapping) or set(item) != {"match", "sparsity"}:
        raise RecipeError(
            f"{where}: an override is {item!r}", hint='each override is {match: "*down_proj*", sparsity: 0.6}'
        )
    sparsity = item["sparsity"]
    if not isinstance(item["match"], str) or isinstance(sparsity, bool) or not isinstance(sparsity, int | float):
        raise RecipeError(f"{where}: an override is {item!r}", hint="match is a text, sparsity a number")
    return Override(match=item["match"], sparsity=float(sparsity))


def load_recipe(path: str | Path) -> dict[str, Any]:
    """Read a recipe file as plain data, so that flags can be laid over it before it is checked.

    Raises:
        RecipeError: when the file is missing, is not YAML, or is not a mapping.
    """
    import yaml

    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"no recipe file {path}", hint="check the path given to --recipe") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} is not a readable YAML file: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise RecipeError(
            f"{path} holds a {type(data).__name__}, not keys and values", hint="for example: sparsity: 0.6"
        )
    return data
