"""Activations of paused forwards: kept in memory up to a limit, beyond it in a file.

A paused forward holds tensors in its Python frames, where nobody can replace them. But their storages can be emptied
and filled again in place, so the frames never notice. Tensors are found by watching every torch function that the
forward calls and remembering its results weakly.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from secateur.errors import RunError

MINIMUM_BYTES = 16 * 1024
"""Smaller tensors stay in memory: a file access costs more than they do."""


class Watcher(TorchFunctionMode):
    """Remembers, weakly, the tensors that torch functions make while it is active.

    Views of tensors that came from elsewhere (weights, buffers, the inputs of all forwards) are not remembered: others
    may be using them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, weakref.ref[torch.Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        _refuse_absent(func, (args, kwargs), result)
        made = [tensor for tensor in _tensors(result) if id(tensor) not in self._seen]
        if made:
            foreign = {_address(tensor) for tensor in _tensors((args, kwargs)) if id(tensor) not in self._seen}
            for tensor in made:
                if tensor.device.type != "meta" and _address(tensor) not in foreign:
                    self.remember(tensor)
        return result

    def remember(self, tensor: torch.Tensor) -> None:
        """Note a tensor that nobody else uses."""
        seen, key = self._seen, id(tensor)
        seen[key] = weakref.ref(tensor, lambda _: seen.pop(key, None))

    def remember_copies(self, value: Any) -> None:
        """Note the floating tensors in arguments that were copied for one forward alone."""
        for tensor in _tensors(value):
            if tensor.is_floating_point():
                self.remember(tensor)

    def storages(self) -> dict[int, torch.UntypedStorage]:
        """Storages of the remembered tensors that are alive and large enough, by address."""
        found: dict[int, torch.UntypedStorage] = {}
        for reference in list(self._seen.values()):
            tensor = reference()
            if tensor is not None and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage.nbytes() >= MINIMUM_BYTES and storage.resizable():
                    found[storage.data_ptr()] = storage
        return found


_SHAPE_ONLY = {"expand_as", "view_as", "reshape_as"}


def _refuse_absent(func: Callable[..., Any], given: Any, result: Any) -> None:
    """Refuse a product with a tensor on the meta device: torch gives arbitrary memory for it, without a word."""
    name = getattr(func, "__name__", "")
    absent = [tensor.is_meta for tensor in _tensors(given)]
    mixed = any(absent) and not all(absent) and name not in _SHAPE_ONLY
    if mixed and any(not tensor.is_meta for tensor in _tensors(result)):
        raise RuntimeError(f"{name} was given a tensor on the meta device: a weight that is not loaded")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        # One inside a vmap stands for many: it has no storage of its own, and is gone when the function returns.
        if not torch._C._functorch.is_functorch_wrapped_tensor(value):
            yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _address(tensor: torch.Tensor) -> int:
    return -1 if tensor.device.type == "meta" else tensor.untyped_storage().data_ptr()


class SpillFile:
    """Fixed slots in one temporary file, deleted with the object. Reads and writes are positional."""

    def __init__(self, folder: Path) -> None:
        self._handle = tempfile.TemporaryFile(dir=folder, prefix="activations-")  # noqa: SIM115
        self._free: list[tuple[int, int]] = []
        self._end = 0

    def close(self) -> None:
        self._handle.close()

    def write(self, data: memoryview) -> tuple[int, int]:
        """Store bytes; returns (offset, size).

        Raises:
            RunError: when the disk is full.
        """
        size = len(data)
        slot = next((entry for entry in self._free if entry[1] == size), None)
        if slot is None:
            slot = (self._end, size)
            self._end += size
        else:
            self._free.remove(slot)
        try:
            written = 0
            while written < size:
                written += os.pwrite(self._handle.fileno(), data[written:], slot[0] + written)
        except OSError as error:
            raise RunError(
                f"activations could not be written to disk: {error.strerror}",
                hint="free some space, or use fewer --samples or more --activation-memory; then --resume",
            ) from error
        return slot

    def read(self, slot: tuple[int, int], into: memoryview) -> None:
        """Fill ``into`` from a slot and free the slot."""
        done = 0
        while done < slot[1]:
            count = os.preadv(self._handle.fileno(), [into[done:]], slot[0] + done)
            if count == 0:
                raise OSError("the activation file was cut short")
            done += count
        self.release(slot)

    def release(self, slot: tuple[int, int]) -> None:
        """What is in a slot is not wanted any more."""
        self._free.append(slot)


class ActivationStore:
    """Decides which paused forwards stay in memory: the first ones up to ``limit`` bytes, the others in a file.

    The forwards run in turn, so keeping the first ones is the best that a cyclic order allows.
    """

    def __init__(self, limit: int | None, folder: Path) -> None:
        self.limit = limit
        self.spilled_bytes = 0
        self._folder = folder
        self._file: SpillFile | None = None
        self._resident: dict[Watcher, int] = {}
        self._parked: dict[Watcher, list[tuple[torch.UntypedStorage, tuple[int, int]]]] = {}

    def close(self) -> None:
        """Drop everything. Parked forwards cannot be resumed afterwards."""
        self._resident.clear()
        self._parked.clear()
        if self._file is not None:
            self._file.close()

    def forget(self, watcher: Watcher) -> None:
        """The forward is over."""
        self._resident.pop(watcher, None)
        for _, slot in self._parked.pop(watcher, ()):
            assert self._file is not None
            self._file.release(slot)

    def park(self, watcher: Watcher) -> None:
        """A forward has paused."""
        if self.limit is None:
            return
        storages = watcher.storages()
        size = sum(storage.nbytes() for storage in storages.values())
        if sum(self._resident.values()) + size <= self.limit:
            self._resident[watcher] = size
            return
        if self._file is None:
            self._file = SpillFile(self._folder)
        parked = self._parked[watcher] = []
        for storage in storages.values():
            parked.append((storage, self._file.write(_bytes_of(storage))))
            storage.resize_(0)
        self.spilled_bytes += size

    def unpark(self, watcher: Watcher) -> None:
        """Bring a forward's tensors back before it goes on."""
        self._resident.pop(watcher, None)
        for storage, slot in self._parked.pop(watcher, ()):
            storage.resize_(slot[1])
            assert self._file is not None
            self._file.read(slot, _bytes_of(storage))


def _bytes_of(storage: torch.UntypedStorage) -> memoryview:
    # Not through numpy: a storage that numpy has seen can never be resized again.
    buffer = (ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())
    return memoryview(buffer).cast("B")
