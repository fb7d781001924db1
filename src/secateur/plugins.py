"""What a method is, and how methods are found: one file per method, named after it.

The folders are listed, never imported as a whole, so `secateur methods` needs no torch; an import error in a method is
raised where the method is used, it does not make the method vanish.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from secateur.errors import UnknownNameError, UsageError
from secateur.patterns import UNSTRUCTURED, Pattern, check_sparsity

if TYPE_CHECKING:
    import torch

    from secateur.least_squares import Quadratic
    from secateur.statistics import InputStatistics

StatisticsKind = Literal["none", "norms", "gram"]


@dataclass(frozen=True)
class Target:
    """What one matrix must look like afterwards.

    ``count``, when given, is the exact number of zeros in the whole matrix and replaces ``sparsity``.
    """

    sparsity: float
    pattern: Pattern = UNSTRUCTURED
    count: int | None = None

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)


@dataclass
class Solved:
    """A pruned matrix, (out_features, in_features) like its input, and what must be told about it."""

    weight: torch.Tensor
    mask: torch.Tensor
    """True where the weight is kept; same shape as ``weight``."""
    loss: float | None = None
    """Estimated squared output error summed over the calibration tokens, when the method knows it."""
    notes: list[str] = field(default_factory=list)
    """Anything that must not stay silent: raised damping, dead inputs. The engine prints and records it."""
    loss_before_refit: float | None = None
    """``loss`` before the kept weights were solved anew, where they were."""
    loss_before_rounding: float | None = None
    """``loss`` before the kept weights were rounded to few bits, where they were."""


@runtime_checkable
class Method(Protocol):
    """The whole contract of a pruning method.

    One that never draws from ``generator`` says so by a class attribute ``draws``, False: see `draws`.
    """

    statistics: StatisticsKind

    def solve(
        self, weight: torch.Tensor, stats: InputStatistics | None, target: Target, *, generator: torch.Generator
    ) -> Solved: ...


@dataclass(frozen=True)
class Units:
    """The units of one matrix, of which a criterion chooses some to remove."""

    weight: torch.Tensor
    """The matrix as it is, (out, in)."""
    columns: torch.Tensor
    """(units, n): the inputs that belong to each unit."""
    feeding: torch.Tensor
    """(units,): sum of squares of the other weights that go with each unit."""
    gram: torch.Tensor
    """X^T X of the inputs, (in, in)."""
    sums: torch.Tensor
    """Sum of the inputs over the tokens, (in,)."""
    tokens: float
    """Number of tokens, or the sum of their weights: those of ``gram`` and ``sums``."""
    problem: Quadratic
    """The least-squares problem of the matrix; it may have one more input, of ones, for a bias."""
    parts: int = 1
    """The same number of units goes from each of this many equal, consecutive parts."""
    salience: torch.Tensor | None = None
    """(units,): what a criterion with ``salience`` makes of weights and gradients, summed over all that goes with each
    unit; None for other criteria."""


@runtime_checkable
class Criterion(Protocol):
    """The whole contract of a criterion for units. ``data`` says whether it looks at inputs at all.

    A criterion that wants gradients has two more methods: `GradientCriterion`.
    """

    data: bool

    def choose(self, units: Units, remove: int) -> torch.Tensor:
        """Numbers of the units that stay, ascending."""


@runtime_checkable
class GradientCriterion(Criterion, Protocol):
    """A criterion that looks at gradients of the loss, which take the model in memory and a backward pass."""

    sequences: int
    """Calibration sequences that the loss is taken on, one backward for each."""
    length: int
    """Tokens of each, at most."""
    second: bool
    """Whether ``salience`` needs the squares of the gradients."""

    def salience(self, weight: torch.Tensor, gradient: torch.Tensor, squares: torch.Tensor | None) -> torch.Tensor:
        """The part of each single weight, in its shape.

        Args:
            weight: any shape.
            gradient: mean of the gradients over the sequences.
            squares: mean of their squares; None unless ``second``.
        """


def make_criterion(name: str, options: Mapping[str, Any] | None = None) -> Criterion:
    """Build a criterion from its name and plain options.

    Raises:
        UnknownNameError: for an unknown criterion or option.
        UsageError: for an option with a value it refuses.
    """
    cls = load_class("criteria", name, "method for --structure")
    criterion: Criterion = build(cls, options or {}, f"method {name}")
    return criterion


@dataclass(frozen=True)
class Experts:
    """The routed experts of one block, of which a criterion scores each. All are (experts,), float64."""

    tokens: torch.Tensor
    """Calibration tokens that were routed to each; 0 where none came."""
    outputs: torch.Tensor
    """Sum over these tokens of router weight times the norm of the expert's output."""
    squares: torch.Tensor
    """Sum of squares of the weights of each."""


@runtime_checkable
class ExpertCriterion(Protocol):
    """The whole contract of a criterion for experts. ``data`` says whether it looks at calibration tokens at all."""

    data: bool

    def score(self, experts: Experts) -> torch.Tensor:
        """One number for each expert, (experts,): the lowest go, of equal ones the lower number first."""


def make_expert_criterion(name: str, options: Mapping[str, Any] | None = None) -> ExpertCriterion:
    """Build a criterion for experts from its name and plain options.

    Raises:
        UnknownNameError: for an unknown criterion or option.
        UsageError: for an option with a value it refuses.
    """
    cls = load_class("expert_criteria", name, "method for --structure experts")
    criterion: ExpertCriterion = build(cls, options or {}, f"method {name}")
    return criterion


Chooser = Method | Criterion | ExpertCriterion
"""What says which weights or units go."""


def make_chooser(name: str, structure: Sequence[str], options: Mapping[str, Any] | None = None) -> Chooser:
    """Build what chooses for these structures; without any, a method of single weights.

    Raises:
        UnknownNameError: for an unknown name or option.
        UsageError: for an option with a value it refuses.
    """
    if not structure:
        return make_method(name, options)
    return make_expert_criterion(name, options) if "experts" in structure else make_criterion(name, options)


def check_chooser(chooser: Chooser, structure: Sequence[str]) -> None:
    """Refuse what chooses something else than these structures.

    Raises:
        UsageError: saying what it is for.
    """
    name = getattr(chooser, "name", type(chooser).__name__)
    hint = "`secateur methods` lists them by what they are for"
    if not structure and not hasattr(chooser, "solve"):
        needed = "--structure experts" if hasattr(chooser, "score") else "--structure"
        raise UsageError(f"method {name} needs {needed}", hint=hint)
    if structure and not hasattr(chooser, "score" if "experts" in structure else "choose"):
        raise UsageError(f"method {name} has no meaning with --structure {','.join(structure)}", hint=hint)


def draws(method: Method) -> bool:
    """Whether the seed of a run may change what a method makes; one that does not say is taken for one that draws."""
    return bool(getattr(method, "draws", True))


def sees_dense_block(method: Method, pattern: Pattern) -> bool:
    """Whether a method wants the statistics of the dense block, which takes a second forward through each block.

    A method says so by a method ``sees_dense_block(pattern)``; without one, each matrix sees the inputs that its pruned
    predecessors make.
    """
    asked = getattr(method, "sees_dense_block", None)
    return asked is not None and bool(asked(pattern))


def available(kind: str) -> dict[str, str]:
    """Names in the folder ``kind`` (``methods``, ``allocation``) with the first line of each docstring."""
    found: dict[str, str] = {}
    for path in sorted((Path(__file__).parent / kind).glob("*.py")):
        if path.stem.startswith("_"):
            continue
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem.replace("_", "-")] = doc.strip().split("\n")[0]
    return found


def load_class(kind: str, name: str, noun: str) -> type:
    """The plug-in class of a file: the one class that names itself ``name``.

    Raises:
        UnknownNameError: when there is no such file; the nearest name is suggested.
    """
    known = available(kind)
    if name not in known:
        raise UnknownNameError(noun, name, known)
    module = importlib.import_module(f"secateur.{kind}.{name.replace('-', '_')}")
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__ and getattr(value, "name", None) == name
    )


def make_method(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """Build a method from its name and plain options.

    Raises:
        UnknownNameError: for an unknown method or option.
        UsageError: for an option with a value it refuses.
    """
    cls = load_class("methods", name, "method")
    method: Method = build(cls, options or {}, f"method {name}")
    return method


def build(cls: type, options: Mapping[str, Any], where: str) -> Any:
    """Make an options dataclass from plain data, texts turned into the types of its fields."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for raw_key, value in options.items():
        key = raw_key.replace("-", "_")
        if key not in fields:
            raise UnknownNameError(f"option of {where}", raw_key, fields or ["(none)"])
        # A text when the file postpones its annotations, else the class itself.
        kind = fields[key].type
        values[key] = _convert(value, kind if isinstance(kind, str) else kind.__name__, f"option {key} of {where}")
    return cls(**values)


def _convert(value: Any, type_name: str, where: str) -> Any:
    try:
        if type_name == "bool":
            if isinstance(value, bool):
                return value
            return {"true": True, "false": False}[str(value).lower()]
        if type_name == "int":
            if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
                raise ValueError
            return int(value)
        if type_name == "float":
            return float(value)
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{where} is {value!r}", hint=f"it must be of type {type_name}") from None
    return value


def option_help(cls: type) -> dict[str, str]:
    """Option name -> docstring written under the field; the one source of the help and of the docs."""
    import inspect
    import textwrap

    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    names = {f.name for f in dataclasses.fields(cls)}
    return {option.name: option.help for option in _options(tree.body[0]) if option.name in names}


@dataclass(frozen=True)
class Option:
    """One option of a plug-in as its source says it; ``default`` is empty when there is none."""

    name: str
    type: str
    default: str
    help: str


@dataclass(frozen=True)
class Description:
    """A plug-in as its source says it: the module docstring and the options."""

    name: str
    doc: str
    options: tuple[Option, ...]


def describe(kind: str, name: str, noun: str) -> Description:
    """What a plug-in says about itself, read from its source, so that no torch is imported.

    Raises:
        UnknownNameError: when there is no such file; the nearest name is suggested.
    """
    known = available(kind)
    if name not in known:
        raise UnknownNameError(noun, name, known)
    path = Path(__file__).parent / kind / f"{name.replace('-', '_')}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and _names_itself(node, name)]
    options = tuple(option for node in classes for option in _options(node))
    return Description(name, ast.get_docstring(tree) or "", options)


def statistics_of(name: str) -> str:
    """What statistics a method of single weights needs (none, norms or gram), read from its source.

    Raises:
        UnknownNameError: when there is no such method; the nearest name is suggested.
    """
    known = available("methods")
    if name not in known:
        raise UnknownNameError("method", name, known)
    path = Path(__file__).parent / "methods" / f"{name.replace('-', '_')}.py"
    classes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    for node in classes:
        for statement in node.body if _names_itself(node, name) else ():
            if isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == "statistics":
                assert isinstance(statement.value, ast.Constant)
                return str(statement.value.value)
    raise TypeError(f"method {name} does not say what statistics it needs")


def _names_itself(node: ast.ClassDef, name: str) -> bool:
    return any(
        isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and statement.target.id == "name"
        and isinstance(statement.value, ast.Constant)
        and statement.value.value == name
        for statement in node.body
    )


def _options(node: ast.stmt) -> list[Option]:
    """The fields of a dataclass with the docstring written under each."""
    body = node.body if isinstance(node, ast.ClassDef) else []
    found = []
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        annotation = ast.unparse(statement.annotation)
        if annotation.startswith("ClassVar"):
            continue
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = " ".join(str(following.value.value).split())
        default = ast.unparse(statement.value) if statement.value is not None else ""
        found.append(Option(statement.target.id, annotation, default, text))
    return found
