"""A `secateur` that starts at once: a server has everything imported, and forks a process for each command.

Each command still runs in a process of its own, with its own arguments, folder, environment and standard streams; only
the seconds of importing are saved, which are most of what commands on a tiny model take.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.docs.fences import ROOT

Main = Callable[[Sequence[str]], int]

CLIENT = """#!{python} -SE
import array, json, os, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect({address!r})
said = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
link.sendmsg([len(said).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
link.sendall(said)
code = link.recv(1)
sys.exit(code[0] if code else 70)
"""


@contextlib.contextmanager
def server(folder: Path) -> Iterator[Path]:
    """Start the server, and write the command ``folder/secateur`` that asks it."""
    address = str(folder / "server")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, "-m", "tests.docs.forking", address], cwd=ROOT, env=environment)
    try:
        for _ in range(600):
            if Path(address).exists():
                break
            assert process.poll() is None
            time.sleep(0.1)
        script = folder / "secateur"
        script.write_text(CLIENT.format(python=sys.executable, address=address))
        script.chmod(0o755)
        yield script
    finally:
        process.kill()
        process.wait()


def serve(address: str) -> None:
    """Answer commands, one after the other, until killed."""
    import torch  # noqa: F401 - imported here for all that are forked
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: F401

    from secateur.cli.app import main

    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address + ".new")
        door.listen()
        Path(address + ".new").rename(address)
        while True:
            link, _ = door.accept()
            with link:
                size, streams, _, _ = socket.recv_fds(link, 8, 3)
                said = b""
                while len(said) < int.from_bytes(size, "big"):
                    said += link.recv(1 << 16)
                if os.fork() == 0:  # a process that waits for the command, so that the next one need not
                    os._exit(_answer(main, link, streams, *json.loads(said)))
                for stream in streams:
                    os.close(stream)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def _answer(main: Main, link: socket.socket, streams: list[int], *command: Any) -> int:
    child = os.fork()
    if child == 0:
        os._exit(_run(main, streams, *command))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    link.sendall(bytes([code if code >= 0 else 128 - code]))
    return 0


def _run(
    main: Main, streams: list[int], arguments: list[str], folder: str, environment: dict[str, str]
) -> int:  # fmt: skip
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["secateur", *arguments]
        return int(main(arguments) or 0)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:  # noqa: BLE001 - the parent must hear of it
        traceback.print_exc()
        return 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
