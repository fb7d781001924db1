"""Blocks and prunable matrices, found by structure: no list of model names.

A model is an embedding, one or more rows of repeated blocks, and a head. transformers marks the blocks by the class
`GradientCheckpointingLayer`; where nothing is marked, the longest module list of one class is taken, and the lists
beside it. What is a stage of several blocks, as the config's list of their numbers says, is taken apart. Any Linear,
Conv1D or fused 3-D expert tensor inside a block is a prunable matrix, seen as (out_features, in_features).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from secateur.engine.skeleton import tensors_of, tied_names
from secateur.errors import UnsupportedModelError
from secateur.layers.spec import is_converted


@dataclass(frozen=True)
class MatrixSpec:
    """One prunable tensor of a block.

    ``transposed`` says that the stored tensor is (in, out) rather than (out, in); ``experts`` counts the matrices that
    are stacked along a first dimension, 0 for an ordinary matrix.
    """

    name: str
    module: str
    out_features: int
    in_features: int
    transposed: bool = False
    experts: int = 0

    @property
    def shape(self) -> list[int]:
        """(out, in), or (experts, out, in)."""
        base = [self.out_features, self.in_features]
        return [self.experts, *base] if self.experts else base

    @property
    def size(self) -> int:
        return self.out_features * self.in_features * max(self.experts, 1)

    def slices(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Views of a stored tensor as (out, in) matrices: one, or one for each expert."""
        parts = list(tensor) if self.experts else [tensor]
        return [part.T for part in parts] if self.transposed else parts


@dataclass
class Block:
    """One repeated block: its module path, its prunable matrices, and every tensor it holds."""

    index: int
    name: str
    matrices: list[MatrixSpec] = field(default_factory=list)
    tensors: list[str] = field(default_factory=list)
    reached: bool = False
    """Whether a forward has run through it."""
    returns: list[int | str | None] | None = None
    """Of a block that returns a tuple: for each entry behind the states, the argument that it hands on, by position or
    name, or None for what it makes itself. None while the block has not run, or when it returns the states alone."""

    as_list: bool = False
    """Whether it returns a list where others return a tuple."""

    @property
    def row(self) -> str:
        """Path of the list that holds the block: a model may have several rows, an encoder and a decoder."""
        return self.name.rpartition(".")[0]


@dataclass
class Structure:
    """Blocks of a model in order, and what cannot be pruned: tensor name -> (shape, reason)."""

    blocks: list[Block]
    unprunable: dict[str, tuple[list[int], str]]

    @property
    def matrices(self) -> list[MatrixSpec]:
        return [matrix for block in self.blocks for matrix in block.matrices]


def signature(block: Block, model: nn.Module) -> tuple[Any, ...]:
    """Equal for blocks that are built alike: the classes of their modules, and names and shapes of their tensors."""
    module = model.get_submodule(block.name)
    classes = tuple(type(part).__name__ for part in module.modules())
    return classes, tuple((name, tuple(tensor.shape)) for name, tensor in module.state_dict(keep_vars=True).items())


def find_structure(model: nn.Module) -> Structure:
    """Find blocks and matrices.

    Raises:
        UnsupportedModelError: when the model has no repeated blocks.
    """
    names = _inside_stages(model, _block_names(model))
    if not names:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no repeated blocks",
            hint="secateur prunes models that are a row of Transformer blocks",
        )
    unprunable: dict[str, tuple[list[int], str]] = {}
    blocks = []
    inside: set[str] = set()
    shared: dict[str, str] = {}
    ties = tied_names(model) if isinstance(model, PreTrainedModel) else {}
    for index, name in enumerate(names):
        block_module = model.get_submodule(name)
        block = Block(index, name, tensors=list(tensors_of(block_module, name)))
        inside.update(block.tensors)
        for path, module in block_module.named_modules(prefix=name):
            for matrix, reason in _matrices_of(module, path):
                owner = shared.setdefault(_root(matrix.name, ties), matrix.name)
                if owner != matrix.name:
                    reason = f"shares its weights with {owner}"
                if reason:
                    unprunable[matrix.name] = (matrix.shape, reason)
                else:
                    block.matrices.append(matrix)
        blocks.append(block)
    prunable = {matrix.name for block in blocks for matrix in block.matrices}
    converted = isinstance(model, PreTrainedModel) and is_converted(model.config.to_dict())
    if not prunable and not converted:  # of chains of small tensors nothing can be pruned, and everything else is there
        raise UnsupportedModelError(f"the blocks of {type(model).__name__} hold no Linear, Conv1D or expert matrices")
    for name, tensor in tensors_of(model).items():
        if tensor.ndim >= 2 and name not in prunable and name not in unprunable:
            where = "inside a block, but not" if name in inside else "outside the blocks"
            unprunable[name] = (list(tensor.shape), _reason(model, name, where))
    return Structure(blocks, unprunable)


def _block_names(model: nn.Module) -> list[str]:
    marked = [name for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    outermost: list[str] = []
    for name in marked:
        if not any(name.startswith(other + ".") for other in outermost):
            outermost.append(name)
    if outermost:
        return outermost
    rows = [
        (name, module) for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
        and any(_matrices_of(part, "") for part in module.modules())
    ]  # fmt: skip
    if not rows:
        return []
    longest = max(rows, key=lambda row: len(row[1]))[1]
    if len(rows) > 1 and all(isinstance(child, nn.ModuleList) for child in longest):
        rows = [row for row in rows if row[1] is not longest]  # a list of stages, each a list of blocks
        longest = max(rows, key=lambda row: len(row[1]))[1]
    kind = type(longest[0])
    nested = {id(part) for _, row in rows for child in row if type(child) is kind for part in child.modules()}
    chosen = {name: row for name, row in rows if type(row[0]) is kind and id(row) not in nested}
    for name, row in rows:  # such as a decoder of another class, or feed-forward networks beside the attentions
        own = type(row[0]).__module__.startswith("torch.nn") or isinstance(row[0], nn.ModuleList)
        if not own and all(_apart(name, other) for other in chosen):
            chosen[name] = row
    return _in_turn(chosen)


def _apart(one: str, other: str) -> bool:
    return one != other and not one.startswith(other + ".") and not other.startswith(one + ".")


def _in_turn(rows: Mapping[str, nn.ModuleList]) -> list[str]:
    """Paths of all blocks. Lists side by side, of one length but of other classes, run in turn: an entry of each."""
    together: list[list[str]] = []
    for name, row in rows.items():
        for others in together:
            first = rows[others[0]]
            beside = name.rpartition(".")[0] == others[0].rpartition(".")[0]
            if beside and len(row) == len(first) and type(row[0]) not in {type(rows[other][0]) for other in others}:
                others.append(name)
                break
        else:
            together.append([name])
    return [f"{name}.{index}" for names in together for index in range(len(rows[names[0]])) for name in names]


def _inside_stages(model: nn.Module, names: list[str]) -> list[str]:
    """The blocks inside, where these are stages: each holds one list, and the config has a list of these lengths."""
    if not isinstance(model, PreTrainedModel) or not names:
        return names
    stages = [dict(model.get_submodule(name).named_children()) for name in names]
    for leaf, first in stages[0].items():
        lists = [stage.get(leaf) for stage in stages]
        if isinstance(first, nn.ModuleList) and all(isinstance(part, nn.ModuleList) for part in lists):
            counts = [len(part) for part in lists if isinstance(part, nn.ModuleList)]
            if counts in _depths(model.config.to_dict()):
                return [f"{name}.{leaf}.{i}" for name, count in zip(names, counts, strict=True) for i in range(count)]
    return names


def _depths(config: Any) -> Iterator[list[int]]:
    """Lists in a config, and in the configs in it, that say how many blocks the stages have."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _depths(value)
        elif isinstance(value, list | tuple) and key.endswith(("depths", "layers", "blocks", "block_sizes")):
            yield list(value)


def _matrices_of(module: nn.Module, path: str) -> list[tuple[MatrixSpec, str]]:
    """The matrices a module itself owns, each with a reason when it cannot be pruned."""
    if isinstance(module, nn.Linear) or _like_linear(module):
        sizes: Any = module
        return [(MatrixSpec(f"{path}.weight", path, sizes.out_features, sizes.in_features), "")]
    if isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape
        return [(MatrixSpec(f"{path}.weight", path, out_features, in_features, transposed=True), "")]
    if type(module).__module__.startswith("torch.nn"):
        return []
    found = []
    transposed = bool(getattr(module, "is_transposed", False))
    counts = {getattr(module, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")}
    for leaf, parameter in module.named_parameters(recurse=False):
        # Other 3-D parameters exist (mixing coefficients, per-head projections): only a module that counts its experts
        # has expert matrices.
        if parameter.ndim == 3 and "bias" not in leaf and parameter.shape[0] in counts and min(parameter.shape[1:]) > 1:
            experts, first, second = parameter.shape
            out_features, in_features = (second, first) if transposed else (first, second)
            spec = MatrixSpec(f"{path}.{leaf}", path, out_features, in_features, transposed, experts)
            found.append((spec, ""))
    return found


def _like_linear(module: nn.Module) -> bool:
    """Whether a class of its own has the weight of a Linear and calls its sizes the same."""
    weight = module._parameters.get("weight")
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return weight is not None and weight.ndim == 2 and tuple(weight.shape) == sizes


def _root(name: str, ties: dict[str, str]) -> str:
    """The name whose tensor this one is in the end. A skeleton's tied parameters are not the same object."""
    seen = {name}
    while (name := ties.get(name, name)) not in seen:
        seen.add(name)
    return name


def _reason(model: nn.Module, name: str, where: str) -> str:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return f"an embedding ({where.split(',')[0]})"
    if isinstance(module, nn.Linear | Conv1D):
        return f"a {kind} {where}: heads and input projections stay dense"
    if where.startswith("inside"):
        return f"{where} a Linear, Conv1D or expert tensor ({leaf} of {kind})"
    return f"{leaf} of {kind}, {where}"


def expert_order(matrices: Sequence[MatrixSpec]) -> dict[tuple[str, int], tuple[int, int, int]]:
    """Sort key of every single matrix: the order of the modules, and inside a module expert by expert."""
    modules = list(dict.fromkeys(matrix.module for matrix in matrices))
    order = {}
    for position, matrix in enumerate(matrices):
        for expert in range(max(matrix.experts, 1)):
            order[matrix.name, expert] = (modules.index(matrix.module), expert, position)
    return order
