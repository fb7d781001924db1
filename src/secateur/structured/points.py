"""Forwards that pause where a module gets its input."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

from greenlet import getcurrent
from torch import nn

from secateur.engine.capture import AtMatrix, Lane, first_states, pause


class PointLane(Lane):
    """A forward that pauses at blocks and at points."""


class Points:
    """Puts pauses at the entry of modules into a model, and takes them out again: a context manager.

    A lane's event there is an `AtMatrix` with the path of the module. At those in ``last`` it pauses only once it has
    been in all blocks.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str], last: Iterable[str] = ()) -> None:
        self._model, self._paths, self._last = model, [*paths, *last], set(last)
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for path in dict.fromkeys(self._paths):
            module = self._model.get_submodule(path)
            self._handles.append(module.register_forward_pre_hook(self._hook(path), with_kwargs=True))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            lane = getcurrent()
            if isinstance(lane, PointLane) and (path not in self._last or lane.saw_all_blocks):
                pause(AtMatrix(path, 0, first_states(args, kwargs)))

        return hook
