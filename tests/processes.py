"""Several processes on this machine that find each other as a launcher would have them, without its start-up time."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

from secateur.errors import SecateurError
from secateur.processes import leave_group

WAIT = 400


_turn = itertools.count()


def free_port() -> int:
    """A port that nobody else takes in the seconds until the children open it.

    It is below those that the system gives out by itself, in ten that belong to this process.
    """
    first = 10_000 + os.getpid() % 2_000 * 10
    for _ in range(10):
        port = first + next(_turn) % 10
        with socket.socket() as server, contextlib.suppress(OSError):
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no free port from {first} on")


def _child(rank: int, count: int, port: int, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    status = 0
    try:
        target(*args)
        leave_group()
    except SecateurError as error:
        if not error.told:
            sys.stderr.write(f"process {rank} told: {error.message}\n")
        status = error.exit_code
    except BaseException:  # noqa: BLE001 - a child has nobody else to tell
        traceback.print_exc()
        status = 1
    sys.exit(status)


def run_together(count: int, target: Callable[..., None], *args: Any) -> list[int | None]:
    """Run ``target`` in ``count`` processes; their exit statuses, None for one that did not end in time.

    They start anew: a fork of a process that has trained before crashes now and then.
    """
    context, port = multiprocessing.get_context("spawn"), free_port()
    children = [context.Process(target=_child, args=(rank, count, port, target, args)) for rank in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join(WAIT)
    statuses = [child.exitcode for child in children]
    for child in children:
        child.kill()
    return statuses


def divide_on_cpu() -> None:
    """Lift the one condition that keeps accelerate from FSDP here: it turns it on for devices other than CPUs only."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init
