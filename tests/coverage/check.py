"""Whether a written result is what it claims to be: the stock loader, counts, and the dense model with units at zero.

Nothing that planned, cut or wrote the result is asked. The only thing taken from the product is which modules are
blocks and how their matrices are stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from secateur.engine.blocks import find_structure
from secateur.result import PruneResult
from tests.coverage.narrower import NotAtZeroError, answers
from tests.coverage.tiny import answer

TOLERANCE = 1e-4
"""Largest difference of an output, as a share of the largest."""


class WrongResultError(Exception):
    """A result is not what it was reported to be."""


@dataclass
class Stock:
    """A folder's model by the stock class, and what its loader complained of."""

    model: transformers.PreTrainedModel
    complaints: set[str]


def load(folder: Path) -> Stock:
    """Load a folder by the class its config names.

    Raises:
        WrongResultError: when it cannot be loaded.
    """
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    try:
        model, info = getattr(transformers, name).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    except Exception as error:
        raise WrongResultError(f"the stock class does not load it: {_line(error)}") from error
    complaints = {
        f"{kind} {key}" for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        for key in info.get(kind) or ()
    }  # fmt: skip
    return Stock(model.eval(), complaints)


def check(
    source: Path, out: Path, result: PruneResult, inputs: dict[str, torch.Tensor], pattern: str = "unstructured",
    dense: Stock | None = None,
) -> None:  # fmt: skip
    """Compare a result with its source.

    Args:
        pattern: unstructured (half of every matrix) or 2:4, for a result without structure.
        dense: the source's model, which is changed; loaded when it is not given.

    Raises:
        WrongResultError: with the first thing that is wrong.
    """
    dense, small = dense or load(source), load(out)
    if len(small.complaints) > len(dense.complaints):
        raise WrongResultError(f"the stock loader complains: {min(small.complaints - dense.complaints)}")
    structure = result.recipe["structure"]
    if "hidden" in structure:
        _check_narrower(dense.model, small.model, result, inputs)
        return
    if not structure:
        _check_zeros(dense.model, small.model, pattern)
        expected = _with_weights(dense.model, small.model, inputs)
    elif structure == ["depth"]:
        expected = _without_blocks(dense.model, small.model, result, inputs)
    else:
        expected = _with_units_at_zero(dense.model, small.model, result, inputs)
    _check_same(answer(small.model, inputs), expected)


def _check_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    if found.shape != expected.shape:
        raise WrongResultError(f"outputs are {tuple(found.shape)}, not {tuple(expected.shape)}")
    difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not difference <= TOLERANCE:
        raise WrongResultError(f"the reloaded model differs from the dense one so changed, by {difference:.2g}")


def _check_narrower(dense: nn.Module, small: nn.Module, result: PruneResult, inputs: dict[str, torch.Tensor]) -> None:
    """The dense model with hidden channels and heads at zero answers as the smaller one, in some order of rows."""
    if sum(p.numel() for p in small.parameters()) >= sum(p.numel() for p in dense.parameters()):
        raise WrongResultError("the model did not become smaller")
    found = answer(small, inputs)
    problem = WrongResultError("no order of rows fits")
    try:
        for expected in answers(dense, small, result, inputs):
            try:
                _check_same(found, expected)
            except WrongResultError as error:
                problem = error
            else:
                return
    except NotAtZeroError as error:
        raise WrongResultError(str(error)) from error
    raise problem


def _check_zeros(dense: nn.Module, small: nn.Module, pattern: str) -> None:
    """Exact zeros in every matrix of the blocks, everything else as it was."""
    before, after = dense.state_dict(), small.state_dict()
    specs = {spec.name: spec for spec in find_structure(dense).matrices}
    shared = {after[name].data_ptr() for name in specs}
    for name, tensor in after.items():
        if tensor.shape != before[name].shape:
            raise WrongResultError(f"{name} is {tuple(tensor.shape)}, not {tuple(before[name].shape)}")
        if name in specs:
            for matrix in specs[name].slices(tensor):
                _check_matrix(name, matrix, pattern)
        elif not torch.equal(tensor, before[name]) and tensor.data_ptr() not in shared:
            raise WrongResultError(f"{name} was not to be pruned, but changed")


def _check_matrix(name: str, matrix: torch.Tensor, pattern: str) -> None:
    zeros = int((matrix == 0).sum())
    if pattern == "2:4":
        if matrix.shape[1] % 4 or not bool(((matrix != 0).reshape(-1, 4).sum(1) == 2).all()):
            raise WrongResultError(f"{name} does not have two of every four weights left")
    elif zeros != round(0.5 * matrix.numel()):
        raise WrongResultError(f"{name} has {zeros} zeros of {matrix.numel()}")


def _with_weights(dense: nn.Module, small: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The dense model's answer with the other's weights put in by name."""
    dense.load_state_dict(small.state_dict(), strict=True)
    return answer(dense, inputs)


def _without_blocks(
    dense: nn.Module, small: nn.Module, result: PruneResult, inputs: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The dense model's answer with the blocks that went handing on their input."""
    blocks = find_structure(dense).blocks
    left = len(find_structure(small).blocks)
    kept = set(result.blocks_kept or ())
    if left != len(kept) or not 0 < left < len(blocks):
        raise WrongResultError(f"{left} blocks are left of {len(blocks)}, the result says {len(kept)}")
    with _passing(dense, [block.name for block in blocks if block.index not in kept], inputs):
        return answer(dense, inputs)


@contextmanager
def _passing(model: nn.Module, names: Sequence[str], inputs: dict[str, torch.Tensor]) -> Iterator[None]:
    """While it lasts, these modules return what they get first, in the form of what they returned before."""
    modules = {name: model.get_submodule(name) for name in names}
    same: dict[str, list[Any] | None] = {}
    form: dict[str, type] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = {**dict(enumerate(args)), **kwargs}
            form[name] = type(output)
            same[name] = [
                next((key for key, value in given.items() if value is part and part is not None), None)
                for part in output[1:]
            ] if isinstance(output, tuple | list) else None  # fmt: skip

        return hook

    handles = [module.register_forward_hook(look(name), with_kwargs=True) for name, module in modules.items()]
    answer(model, inputs)
    for handle in handles:
        handle.remove()

    def pass_on(name: str) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            states = args[0] if args else kwargs["hidden_states"]
            if same[name] is None:
                return states
            given = {**dict(enumerate(args)), **kwargs}
            parts = (states, *(given.get(key) for key in same[name]))
            return list(parts) if form[name] is list else parts

        return forward

    for name, module in modules.items():
        module.forward = pass_on(name)
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def _with_units_at_zero(
    dense: nn.Module, small: nn.Module, result: PruneResult, inputs: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The dense model's answer with the refitted columns in their old places and zeros where units went."""
    specs = {spec.name: spec for spec in find_structure(dense).matrices}
    if sum(p.numel() for p in small.parameters()) >= sum(p.numel() for p in dense.parameters()):
        raise WrongResultError("the model did not become smaller")
    before, after = dense.state_dict(), small.state_dict()
    for matrix in result.matrices:
        name, units = matrix.name, matrix.units
        assert units is not None
        was, now = (specs[name].slices(state[name]) for state in (before, after))
        stacked = torch.tensor(units) if specs[name].experts else torch.tensor([units])
        for old, new, stay in zip(was, now, stacked, strict=True):
            each, rest = divmod(new.shape[1], len(stay))
            if rest or not 0 < new.shape[1] < old.shape[1] or old.shape[1] % each:
                raise WrongResultError(f"{name} has {new.shape[1]} of {old.shape[1]} columns, for {len(stay)} units")
            columns = (stay[:, None] * each + torch.arange(each)).reshape(-1)
            made = torch.zeros_like(old)
            made[:, columns] = new
            old.copy_(made)
        bias = f"{name.removesuffix('weight')}bias"
        if bias in after and bias in before and after[bias].shape == before[bias].shape:
            before[bias].copy_(after[bias])
    return answer(dense, inputs)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
