"""Several processes on this machine that find each other as a launcher would have them, without its start-up time."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from secateur.errors import SecateurError
from secateur.processes import leave_group

ROOT = Path(__file__).parents[1]
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


def run_as_one_of_them() -> NoReturn:
    """Run in a child what comes in on stdin."""
    target, args = pickle.loads(sys.stdin.buffer.read())
    torch.set_num_threads(1)
    status = 0
    try:
        target(*args)
        leave_group()
    except SecateurError as error:
        if not error.told:
            sys.stderr.write(f"process {os.environ['RANK']} told: {error.message}\n")
        status = error.exit_code
    except BaseException:  # noqa: BLE001 - a child has nobody else to tell
        traceback.print_exc()
        status = 1
    sys.exit(status)


def run_together(python: str, count: int, target: Callable[..., None], *args: Any) -> list[int | None]:
    """Run ``target`` in ``count`` processes; their exit statuses, None for one that did not end in time.

    They start anew: a fork of a process that has trained before crashes now and then.

    Args:
        python: the interpreter, or what stands in for it (`forking.executable`).
    """
    code = "from tests.processes import run_as_one_of_them; run_as_one_of_them()"
    common = {
        **os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",
    }  # fmt: skip
    children = []
    for rank in range(count):
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        child = subprocess.Popen([python, "-c", code], stdin=subprocess.PIPE, env=environment)
        assert child.stdin is not None
        with child.stdin as stdin:
            stdin.write(pickle.dumps((target, args)))
        children.append(child)
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(WAIT)
    statuses = [child.poll() for child in children]
    for child in children:
        child.kill()
        child.wait()
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
