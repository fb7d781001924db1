"""A `python` that starts at once: a server has the large libraries imported, and forks a process for each command.

Each command still runs in a process of its own, with its own arguments, folder, environment and standard streams, and
ends with its own status; only the seconds of importing are saved, which are most of what work on a tiny model takes.
Unless told to, the server does not import secateur: what a worker reports still comes from the stock libraries.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Self

LIBRARIES = (
    "torch", "transformers", "transformers.models.llama.modeling_llama", "transformers.models.bert.modeling_bert",
    "transformers.models.auto.modeling_auto", "transformers.trainer", "safetensors.torch", "tokenizers", "psutil",
)  # fmt: skip

CLIENT = """#!{python} -SE
import array, json, os, signal, socket, sys, time
said = {before!r} + sys.argv[1:]
code = len(said) > 1 and said[0] == "-c" and "multiprocessing" not in said[1]  # which hands over files by their numbers
if not (code or said[:1] == ["-m"] or said[:1] == ["-P"] and said[1:] and os.path.isfile(said[1])):
    os.execv({python!r}, [{python!r}, *said])
for _ in range(6000):
    link = socket.socket(socket.AF_UNIX)
    try:
        link.connect({address!r})
        break
    except OSError:  # it still imports
        if os.path.exists({address!r} + ".failed"):
            sys.exit(open({address!r} + ".failed").read())
        time.sleep(0.05)
body = json.dumps([said, os.getcwd(), dict(os.environ)]).encode()
link.sendmsg([len(body).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
link.sendall(body)
status = int(link.recv(8) or b"70")
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


class Forking:
    """The server, started when it is first asked for, and ended with the ``with`` statement or with this process.

    Args:
        folder: where its socket and its commands lie; a socket wants a short path.
        more: modules that it imports beside the libraries.
        python: what commands take for `sys.executable`; the server itself, when not said.
    """

    def __init__(self, folder: Path, more: Sequence[str] = (), python: Path | None = None) -> None:
        self._address = str(folder / "server")
        self._folder = folder
        self._modules = [*LIBRARIES, *more]
        # What tests set later is for their commands alone.
        self._environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self._process: subprocess.Popen[bytes] | None = None
        self._python = python or self._write("python")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def executable(self) -> str:
        """The command ``python``."""
        self._start()
        return str(self._folder / "python")

    def command(self, name: str, *before: str) -> Path:
        """A command of its own that calls ``python`` with some arguments ``before`` those it is given."""
        self._start()
        return self._write(name, *before)

    def _write(self, name: str, *before: str) -> Path:
        script = self._folder / name
        script.write_text(CLIENT.format(python=sys.executable, address=self._address, before=list(before)))
        script.chmod(0o755)
        return script

    def _start(self) -> None:
        if self._process is None:
            command = [sys.executable, "-P", __file__, self._address, str(self._python), *self._modules]
            # The end of its stdin is the end of this process.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, env=self._environment, cwd=self._folder, start_new_session=True
            )


def serve(address: str, python: str, modules: Sequence[str]) -> None:
    """Answer commands until killed or left alone."""
    try:
        for module in modules:
            importlib.import_module(module)
    except BaseException:
        Path(address + ".failed").write_text(traceback.format_exc())
        raise
    sys.executable = python
    for path in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        while path in sys.path:
            sys.path.remove(path)
    gc.freeze()  # what is here stays shared
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address + ".new")
        door.listen(64)
        Path(address + ".new").rename(address)
        while door in select.select([door, 0], [], [])[0]:
            link, _ = door.accept()
            if os.fork() == 0:  # a process that waits for the command, so that the next one need not
                door.close()
                _answer(link)
                os._exit(0)
            link.close()
            _bury()


def _bury() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _answer(link: socket.socket) -> None:
    size, streams, _, _ = socket.recv_fds(link, 8, 3)
    said = b""
    while len(said) < int.from_bytes(size, "big"):
        said += link.recv(1 << 16)
    end, open_while_it_runs = os.pipe()
    child = os.fork()
    if child == 0:
        link.close()
        os.close(end)
        os._exit(_run(streams, *json.loads(said)))
    for file in (*streams, open_while_it_runs):
        os.close(file)
    if link in select.select([link, end], [], [])[0]:  # who asked has gone
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):
        link.sendall(b"%d" % code)


def _run(streams: Sequence[int], arguments: list[str], folder: str, environment: dict[str, str]) -> int:
    status = 0
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
        kind, what, *rest = arguments
        sys.argv = [what if kind != "-c" else kind, *rest]
        if kind == "-P":
            runpy.run_path(what, run_name="__main__")
        elif kind == "-m":
            sys.path.insert(0, folder)
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, "")
            main = types.ModuleType("__main__")
            sys.modules["__main__"] = main
            exec(compile(what, "<string>", "exec"), main.__dict__)
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            sys.stderr.write(leaving.code + "\n")
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter itself ends
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], sys.argv[3:])
