"""Forwards that pause: at the entry of every block and at every prunable matrix.

Each calibration batch runs the model's own forward in a coroutine (a greenlet). When the forward reaches a matrix, the
coroutine hands over the input and waits; when all have arrived, the matrix is solved from the inputs that really came,
and each coroutine goes on with the pruned weights. So one forward is enough, and nothing here knows how an architecture
passes masks, positions or caches around.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.overrides
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn
from transformers.cache_utils import Cache

from secateur.engine.activations import Watcher
from secateur.engine.blocks import Block, MatrixSpec
from secateur.engine.inputs import output_tensor
from secateur.errors import UnsupportedModelError
from secateur.statistics import InputStatistics


@dataclass(frozen=True)
class AtBlock:
    """A forward is about to enter a block."""

    index: int


@dataclass(frozen=True, eq=False)
class AtMatrix:
    """A forward is about to multiply ``input`` (..., in_features) with a matrix (expert 0 for an ordinary one)."""

    name: str
    expert: int
    input: torch.Tensor


@dataclass(frozen=True)
class Finished:
    """A forward has nothing more to show; ``output`` is the model's, unless it was cut off after the last block."""

    output: Any = None


Event = AtBlock | AtMatrix | Finished


class Lane(greenlet):
    """One batch on its way through the model. ``observed`` lanes pause at matrices, others only at blocks."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, torch.Tensor], *, observed: bool, blocks: int) -> None:
        super().__init__(self._forward)
        self._model = model
        self._inputs = dict(inputs)
        self.observed = observed
        self.watcher = Watcher()
        self.event: Event | None = None
        self.last_input: tuple[torch.Tensor, int, InputStatistics] | None = None
        """Input of the latest matrix, its version and the statistics it went into: the next matrix may get the same."""
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        """Arguments of the block at whose entry the forward stands."""
        self.skip: frozenset[int] = frozenset()
        """Blocks that hand on what they get."""
        self.met: set[tuple[str, int]] = set()
        """Matrices and experts whose inputs were counted on this way."""
        self.keep_output = False
        self.output: Any = None
        """What the latest block gave, when ``keep_output`` is set."""
        self._blocks_left = set(range(blocks))

    def _forward(self) -> Finished:
        with self.watcher:
            return Finished(self._model(**self._inputs))

    def advance(self) -> Event:
        """Run until the next event."""
        event: Event = self.switch()
        self.event = event
        return event

    def stop(self) -> None:
        """Unwind the forward where it stands and free what it holds."""
        if self.gr_frame is not None:  # paused: neither unstarted nor over
            self.throw(GreenletExit)
        self.last_input = self.call = None

    def entered(self, index: int) -> bool:
        """Note a block; False when it was entered before, which means that blocks share weights."""
        if index not in self._blocks_left:
            return False
        self._blocks_left.discard(index)
        return True

    @property
    def saw_all_blocks(self) -> bool:
        return not self._blocks_left


class BlockLane(Lane):
    """One batch on its way through one block only, with the arguments with which its own lane has come there."""

    def __init__(self, module: nn.Module, lane: Lane) -> None:
        super().__init__(module, {}, observed=True, blocks=0)
        assert lane.call is not None
        self._args, self._kwargs = copied_call(*lane.call)
        self.watcher.remember_copies((self._args, self._kwargs))

    def _forward(self) -> Finished:
        with self.watcher:
            self._model(*self._args, **self._kwargs)
        return Finished()

    def entered(self, index: int) -> bool:
        return True


def copied_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for one more run of a block: it may work in place, or add to a cache that the model made itself."""
    with torch._C.DisableTorchFunction():
        return _copied(args), _copied(kwargs)


def _copied(value: Any) -> Any:
    if isinstance(value, Cache):
        return copy.deepcopy(value)
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_copied(item) for item in value)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value


def pause(event: Event) -> None:
    """Hand an event to the loop and wait. The stack of torch function modes is the coroutine's own: it goes along."""
    modes = []
    while torch._C._len_torch_function_stack():
        modes.append(torch.overrides._pop_mode())
    parent = getcurrent().parent
    assert parent is not None
    try:
        parent.switch(event)
    finally:
        for mode in reversed(modes):
            torch.overrides._push_mode(mode)


def _refuse_absent(name: str, args: Any, kwargs: Any) -> None:
    """A model that looks at a weight before the weight's module runs has moved its inputs to where nothing is."""
    if any(isinstance(value, torch.Tensor) and value.is_meta for value in (*args, *kwargs.values())):
        raise UnsupportedModelError(
            f"the inputs of {name} depend on where a weight lies that is not loaded yet",
            hint="this model cannot be streamed block by block yet",
        )


class Capture:
    """Puts the pauses into a model, and takes them out again: a context manager."""

    def __init__(self, model: nn.Module, blocks: list[Block], on_outside: Callable[[str], None]) -> None:
        self._model = model
        self._blocks = blocks
        self._on_outside = on_outside
        self._handles: list[Any] = []
        self._overridden: list[nn.Module] = []

    def __enter__(self) -> Capture:
        inside: set[str] = set()
        for block in self._blocks:
            module = self._model.get_submodule(block.name)
            inside.update(name for name, _ in module.named_modules(prefix=block.name))
            self._handles.append(module.register_forward_pre_hook(self._enter_block(block), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave_block(block), with_kwargs=True))
            self._override(module, self._skippable(block, module.forward))
            for matrix in block.matrices:
                if not matrix.experts:
                    self._watch_linear(matrix)
        for name, module in self._model.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if name not in inside and own:
                self._handles.append(module.register_forward_pre_hook(self._enter_outside(name), with_kwargs=True))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._overridden:
            del module.__dict__["forward"]
        self._handles.clear()
        self._overridden.clear()

    def _enter_block(self, block: Block) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            _refuse_absent(block.name, args, kwargs)
            lane = getcurrent()
            if isinstance(lane, Lane):
                if not lane.entered(block.index):
                    raise UnsupportedModelError(
                        f"block {block.name} runs more than once in one forward (shared weights)",
                        hint="models that reuse a block cannot be pruned yet",
                    )
                lane.call = (args, kwargs)
                pause(AtBlock(block.index))
                lane.call = None

        return hook

    def _leave_block(self, block: Block) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            lane = getcurrent()
            if not isinstance(lane, Lane):
                return
            if block.index not in lane.skip:
                note_returns(block, args, kwargs, output)
            if lane.keep_output:
                with torch._C.DisableTorchFunction():  # a copy that the lane's watcher does not know and never empties
                    lane.output = output_tensor(output).clone()
            if (lane.observed or lane.keep_output) and lane.saw_all_blocks:
                pause(Finished())  # never resumed: what follows is the head, which nobody asked for

        return hook

    def _skippable(self, block: Block, forward: Callable[..., Any]) -> Callable[..., Any]:
        def passing(*args: Any, **kwargs: Any) -> Any:
            lane = getcurrent()
            if not isinstance(lane, Lane) or block.index not in lane.skip:
                return forward(*args, **kwargs)
            return handed_on(block, args, kwargs)

        return passing

    def _override(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        module.__dict__["forward"] = forward
        self._overridden.append(module)

    def _enter_outside(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            _refuse_absent(name, args, kwargs)
            self._on_outside(name)

        return hook

    def _watch_linear(self, matrix: MatrixSpec) -> None:
        module = self._model.get_submodule(matrix.module)
        forward = module.forward

        def paused(input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            lane = getcurrent()
            if isinstance(lane, Lane) and lane.observed:
                pause(AtMatrix(matrix.name, 0, input))
            return forward(input, *args, **kwargs)

        self._override(module, paused)


def first_states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The hidden states among the arguments of a block: the first floating tensor.

    Raises:
        UnsupportedModelError: when there is none.
    """
    for value in (*args, kwargs.get("hidden_states"), *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    raise UnsupportedModelError("a block gets no hidden states", hint="blocks of this model cannot be left out")


def note_returns(block: Block, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
    """Note in what form a block returns its states, and which of its arguments it hands on beside them."""
    block.reached = True
    if not isinstance(output, tuple | list):
        return
    block.as_list = isinstance(output, list)
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    block.returns = [
        next((place for place, argument in given if argument is value and value is not None), None)
        for value in output[1:]
    ]


def handed_on(block: Block, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a block that does nothing returns, in the form in which it returned when it ran."""
    states = first_states(args, kwargs)
    if block.returns is None:
        return states
    rest = [
        None if place is None else args[place] if isinstance(place, int) else kwargs.get(place)
        for place in block.returns
    ]
    return [states, *rest] if block.as_list else (states, *rest)


class ExpertTensor(torch.Tensor):
    """A fused expert tensor (experts, ...) that knows its matrix, so that a product with one slice can be observed."""

    spec: MatrixSpec
    expert: int | None

    @staticmethod
    def wrap(tensor: torch.Tensor, spec: MatrixSpec, expert: int | None = None) -> ExpertTensor:
        wrapped = tensor.as_subclass(ExpertTensor)
        wrapped.spec, wrapped.expert = spec, expert
        return wrapped

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weight = next((arg for arg in args if isinstance(arg, ExpertTensor)), None)
        name = getattr(func, "__name__", "")
        if weight is not None and weight.expert is not None:
            lane = getcurrent()
            if name in {"linear", "matmul", "mm", "__matmul__"} and isinstance(lane, Lane) and lane.observed:
                weight._check_layout(name)
                pause(AtMatrix(weight.spec.name, weight.expert, args[0]))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if weight is not None and weight.expert is None and name == "__getitem__" and weight is args[0]:
            index = args[1]
            if isinstance(index, int) or (isinstance(index, torch.Tensor) and index.ndim == 0):
                return ExpertTensor.wrap(result, weight.spec, int(index))
        return result

    def _check_layout(self, operation: str) -> None:
        assert self.spec is not None
        if (operation == "linear") == self.spec.transposed:
            raise UnsupportedModelError(f"the experts of {self.spec.name} are stored the other way round than declared")
