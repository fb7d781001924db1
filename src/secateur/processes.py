"""The processes of one run, as torchrun and accelerate start them: one works and tells, all learn how each part ended.

They speak through the launcher's key-value store and not through collectives: it needs no device, a wait in it has no
time limit (others may train for hours, or make a cache), and a process that waits there hears that another has failed.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from secateur import errors
from secateur.errors import RunError, SecateurError, UsageError

_POLL = 0.05
_PATIENCE = 10.0
"""Seconds that a failing process waits for word of the others."""
_runs = itertools.count()
"""Runs of this Python process: the store outlives them, so each has keys of its own."""


def launched() -> int:
    """How many processes the launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE") or "1")


def is_first() -> bool:
    """Whether this process is the one that prints; known before the processes have met."""
    return launched() == 1 or os.environ.get("RANK", "0") == "0"


def leave_group() -> None:
    """Close what training has opened between the processes; it would complain at the end of Python."""
    if launched() > 1:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()


class Processes:
    """The processes of this run. Without a launcher there is one, which is the first.

    Args:
        rank: number of this process, from 0.
        count: how many there are.
        store: a ``torch.distributed.Store`` that all of them reach; None when there is one process.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None) -> None:
        self.rank, self.count, self._store = rank, count, store
        self._number = itertools.count()

    @classmethod
    def meet(cls) -> Processes:
        """Find the others that the launcher has started.

        Raises:
            UsageError: when they cannot be found.
        """
        count = launched()
        if count == 1:
            return cls()
        from torch import distributed
        from torch.distributed.rendezvous import rendezvous

        try:
            store, rank, count = next(rendezvous("env://"))
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                f"WORLD_SIZE is {count}, but the other processes cannot be found: {str(error).splitlines()[0]}",
                hint="start with torchrun or accelerate launch, or unset WORLD_SIZE",
            ) from None
        own = distributed.PrefixStore(f"secateur/{next(_runs)}", store)  # type: ignore[attr-defined]
        found = cls(rank, count, own)
        if found.first:
            # A launcher stops all processes as soon as one has ended: the others wait until this one has told why.
            atexit.register(found._leave)
        return found

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, tells and measures."""
        return self.rank == 0

    def on_first(self, work: Callable[[], Any]) -> Any:
        """What ``work`` gives in the first process, to all of them. It must be plain data for JSON.

        Raises:
            SecateurError: in the others too, when another process has failed.
        """
        if self._store is None:
            return work()
        key = f"done/{next(self._number)}"
        if self.first:
            value = work()
            self._store.set(key, json.dumps(value))
            return value
        self._wait([key])
        return json.loads(self._store.get(key))

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, plain data, to all of them; nobody goes on before all have come.

        Raises:
            SecateurError: when another process has failed.
        """
        if self._store is None:
            return [value]
        number = next(self._number)
        self._store.set(f"value/{number}/{self.rank}", json.dumps(value))
        keys = [f"value/{number}/{rank}" for rank in range(self.count)]
        self._wait(keys)
        return [json.loads(self._store.get(key)) for key in keys]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A run: an error in one process ends it in all, with the same class and status, and one of them tells it.

        Raises:
            SecateurError: the error of the process that failed.
        """
        if self._store is None:
            yield
            return
        try:
            yield
        except FailedElsewhere as heard:
            if self.first:
                self._store.set("failed/0", json.dumps(heard.told))
            raise self._ended(heard.told) from None
        except BaseException as error:
            with contextlib.suppress(RuntimeError):  # the host of the store may be gone
                self._store.set(f"failed/{self.rank}", json.dumps(_described(error, self.rank)))
                self._store.add("failed", 1)
            elsewhere = self._failed_elsewhere(error)
            if elsewhere is not None:
                raise self._ended(elsewhere) from error
            self._part()
            if isinstance(error, SecateurError) and not self.first:
                raise _rebuilt(_described(error, self.rank)) from error
            raise
        self._part()

    def _ended(self, told: dict[str, Any]) -> SecateurError:
        """The error of another process, as this one raises it; only the first tells it."""
        error = _rebuilt(told)
        if not self.first and (told["rank"] == 0 or self._wait_for("failed/0")):
            error.told = True
        self._part()
        if error.told:
            self._wait_for("left")
        return error

    def _part(self) -> None:
        """The last word. Where the first holds the store, it goes only when the others have read what is in it."""
        if not self.first:
            with contextlib.suppress(RuntimeError):
                self._store.add("read", 1)
        elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            until = time.monotonic() + _PATIENCE
            while self._store.add("read", 0) < self.count - 1 and time.monotonic() < until:
                time.sleep(_POLL)

    def _failed_elsewhere(self, error: BaseException) -> dict[str, Any] | None:
        """The failure that this one is a part or consequence of: that of the first, or one that broke a connection."""
        if self.first and isinstance(error, SecateurError | KeyboardInterrupt):
            return None
        key = self._wait_for(*[f"failed/{rank}" for rank in (range(1, self.count) if self.first else [0])])
        found: dict[str, Any] | None = json.loads(self._store.get(key)) if key else None
        return found

    def _wait(self, keys: list[str]) -> None:
        """Wait for keys as long as it takes.

        Raises:
            FailedElsewhere: when another process has failed, or the first cannot be reached any more.
        """
        try:
            while not self._store.check(keys):
                if self._store.check(["failed"]):
                    for rank in range(self.count):
                        if rank != self.rank and self._store.check([f"failed/{rank}"]):
                            raise FailedElsewhere(json.loads(self._store.get(f"failed/{rank}")))
                time.sleep(_POLL)
        except RuntimeError:
            raise FailedElsewhere(_described(RunError("the first process has ended"), self.rank)) from None

    def _wait_for(self, *keys: str) -> str | None:
        """Wait a while for one of the keys, and say for which; None without one, or when the store has gone."""
        until = time.monotonic() + _PATIENCE
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < until:
                for key in keys:
                    if self._store.check([key]):
                        return key
                time.sleep(_POLL)
        return None

    def _leave(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.set("left", "")


class FailedElsewhere(BaseException):
    """Another process has failed: not an error of this one's work, so nothing that handles those may catch it."""

    def __init__(self, told: dict[str, Any]) -> None:
        super().__init__(told)
        self.told = told


def _described(error: BaseException, rank: int) -> dict[str, Any]:
    if isinstance(error, SecateurError):
        return {"rank": rank, "kind": type(error).__name__, "message": error.message, "hint": error.hint}
    if isinstance(error, KeyboardInterrupt):
        return {"rank": rank, "kind": "Interrupted", "message": "interrupted", "hint": ""}
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return {"rank": rank, "kind": "RunError", "message": text, "hint": ""}


def _rebuilt(told: dict[str, Any]) -> SecateurError:
    where = f"process {told['rank']}: " if told["rank"] else ""
    kind = getattr(errors, told["kind"], RunError)
    error: SecateurError = kind.__new__(kind)
    SecateurError.__init__(error, where + told["message"], hint=told["hint"])
    return error
