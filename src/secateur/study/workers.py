"""Who runs trials: this process, processes beside it, or a Ray cluster; one small interface for all"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import re
import signal
import socket
import threading
import traceback
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from secateur.errors import StudyError
from secateur.progress import Reporter
from secateur.study.trial import Outcome, Task, run_trial

QUIT_SECONDS = 5
REACH_SECONDS = 10
"""For which a Ray cluster may stay silent."""


@dataclass(frozen=True)
class Died:
    """The process that ran a trial is gone."""

    how: str


Answer = tuple[int, Outcome | Died]
"""Number of a trial, and what became of it."""


class Pool(Protocol):
    """Runs trials; at most ``capacity`` at once are submitted."""

    capacity: int
    threads: int
    """Threads of each trial."""

    def submit(self, task: Task) -> None:
        """Take on a trial."""

    def wait(self) -> list[Answer]:
        """Block until at least one trial has ended, in whatever way."""

    def close(self) -> None:
        """Stop whatever still runs."""


class Inline:
    """One trial at a time in this process: torch is loaded once, and progress is seen."""

    capacity = 1

    def __init__(self, reporter: Reporter) -> None:
        import torch

        self._reporter = reporter
        self.threads = torch.get_num_threads()
        self._tasks: deque[Task] = deque()

    def submit(self, task: Task) -> None:
        self._tasks.append(task)

    def wait(self) -> list[Answer]:
        task = self._tasks.popleft()
        return [(task.number, run_trial(task, Named(f"trial {task.number}", self._reporter)))]

    def close(self) -> None:
        self._tasks.clear()


class Named(Reporter):
    """Passes progress on under the name of a trial. Its warnings are kept with the trial."""

    def __init__(self, name: str, inner: Reporter) -> None:
        self._name, self._inner = name, inner

    def stage(self, name: str, total: int) -> None:
        self._inner.stage(f"{self._name}: {name}", total)

    def advance(self, detail: str = "") -> None:
        self._inner.advance(detail)


class Processes:
    """So many spawned processes, each with its share of the cores. Settings go in and outcomes come out as JSON."""

    def __init__(self, count: int) -> None:
        self.capacity = count
        self._context = multiprocessing.get_context("spawn")
        self.threads = max(1, (os.cpu_count() or 1) // count)
        self._idle: list[tuple[Any, Connection]] = []
        self._busy: dict[int, tuple[Any, Connection]] = {}

    def submit(self, task: Task) -> None:
        process, connection = self._idle.pop() if self._idle else self._start()
        self._busy[task.number] = process, connection
        with contextlib.suppress(OSError):  # it died while idle: `wait` finds out
            connection.send_bytes(task.to_json().encode())

    def _start(self) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self.threads), daemon=False)
        process.start()
        theirs.close()
        return process, ours

    def wait(self) -> list[Answer]:
        answers: list[Answer] = []
        while not answers:
            ready = wait([connection for _, connection in self._busy.values()])
            for number, (process, connection) in list(self._busy.items()):
                if connection not in ready:
                    continue
                del self._busy[number]
                try:
                    answers.append((number, Outcome.from_json(connection.recv_bytes().decode())))
                    self._idle.append((process, connection))
                except (EOFError, OSError):
                    process.join()
                    connection.close()
                    answers.append((number, Died(how_it_ended(process.exitcode))))
        return answers

    def close(self) -> None:
        for process, connection in [*self._idle, *self._busy.values()]:
            connection.close()
            process.terminate()
        for process, _ in [*self._idle, *self._busy.values()]:
            process.join(QUIT_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        self._idle, self._busy = [], {}


def how_it_ended(code: int | None) -> str:
    """The end of a process in words."""
    if code is not None and code < 0:
        named = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"killed by {named}" + (" (perhaps for want of memory)" if named == "SIGKILL" else "")
    return f"ended with status {code}"


def _end_with_parent() -> None:
    """Do not work on when the parent was killed: the next run tries the same trial in the same folder."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _serve(connection: Connection, threads: int) -> None:
    """A worker process: one trial after the other until the parent goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    os.dup2(2, 1)  # stdout is the parent's, for its result
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    try:
        while True:
            task = Task.from_json(connection.recv_bytes().decode())
            connection.send_bytes(run_trial(task).to_json().encode())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except BaseException:
        traceback.print_exc()
        raise


class Cluster:
    """Trials as tasks of a Ray cluster, each with the CPUs, GPUs and memory that the study asks for.

    All machines must see the folders of the study under the same paths.

    Args:
        address: as `ray.init` takes it: auto, HOST:PORT, or local for a cluster on this machine.

    Raises:
        MissingExtraError: without Ray.
        StudyError: when there is no such cluster, or no machine of it has what a trial asks for.
    """

    def __init__(self, address: str, *, cpus: float, gpus: float, memory: int | None) -> None:
        self._ray = ray = import_ray()
        self._busy: dict[Any, int] = {}
        self._ours = not ray.is_initialized()
        if self._ours:
            _connect(ray, address)
        try:
            _check_room(ray, {"CPU": cpus, "GPU": gpus, "memory": memory or 0})
        except StudyError:
            self.close()
            raise
        # Retries are counted by the study, which has a limit of its own.
        options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": 0}
        if memory:
            options["memory"] = memory
        self._run = ray.remote(**options)(_run_as_json)  # it runs in as many threads as it has CPUs
        total = ray.cluster_resources()
        fits = [total.get("CPU", 0) / cpus if cpus else 1, total.get("GPU", 0) / gpus if gpus else float("inf")]
        fits += [total.get("memory", 0) / memory] if memory else []
        self.capacity = max(1, int(min(fits)))
        self.threads = max(1, int(cpus))

    def submit(self, task: Task) -> None:
        self._busy[self._run.remote(task.to_json())] = task.number

    def wait(self) -> list[Answer]:
        done, _ = self._ray.wait(list(self._busy), num_returns=1)
        answers: list[Answer] = []
        for reference in done:
            number = self._busy.pop(reference)
            try:
                answers.append((number, Outcome.from_json(self._ray.get(reference))))
            except self._ray.exceptions.RayError as error:
                answers.append((number, Died(f"its Ray worker is gone ({type(error).__name__})")))
        return answers

    def close(self) -> None:
        for reference in self._busy:
            self._ray.cancel(reference, force=True)
        self._busy = {}
        if self._ours:
            self._ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    """Join the cluster; Ray itself would try for minutes where nobody answers.

    Raises:
        StudyError: when there is none.
    """
    hint = "start it with `ray start --head`, or take --ray local or --workers"
    place = re.fullmatch(r"(?:ray://)?\[?([^/\[\]]+)\]?:(\d{1,5})", address)
    try:
        if place is not None:
            socket.create_connection((place[1], int(place[2])), timeout=REACH_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False
                 if address == "local" else None)  # fmt: skip
    except Exception as error:
        reason = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
        raise StudyError(f"no Ray cluster at {address}: {reason}", hint=hint) from error


def _check_room(ray: Any, asked: Mapping[str, float]) -> None:
    """Refuse trials that would wait for ever: no machine has what one of them asks for.

    Raises:
        StudyError: with the most that a machine has.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(machine.get(kind, 0) >= amount for kind, amount in asked.items()) for machine in machines):
        return
    told = _told(asked)
    there = "; ".join(_told({kind: machine.get(kind, 0) for kind in asked}) for machine in machines)
    raise StudyError(
        f"no machine of the Ray cluster can run a trial that asks for {told} (there are: {there or 'none'})",
        hint="give the study smaller resources, or add such a machine first",
    )


def _told(resources: Mapping[str, float]) -> str:
    return ", ".join(
        f"{amount / 1e9:.3g} GB" if kind == "memory" else f"{amount:g} {kind}"
        for kind, amount in resources.items() if amount
    )  # fmt: skip


def _run_as_json(text: str) -> str:
    return run_trial(Task.from_json(text)).to_json()


def import_ray() -> Any:
    """Ray.

    Raises:
        MissingExtraError: when it is not installed.
    """
    from secateur.errors import MissingExtraError

    try:
        import ray
    except ImportError:
        raise MissingExtraError("--ray needs Ray", hint="pip install 'secateur[ray]'") from None
    return ray
