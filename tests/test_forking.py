"""What stands in for `python` in tests runs a command as a process of its own would."""

from __future__ import annotations

import os
import subprocess
import time

import psutil


def test_a_forked_command_is_a_process_of_its_own(forking, tmp_path):
    def run(code, **options):
        command = [forking.executable, "-c", code, "word"]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, **options)

    code = "import os, sys; print(sys.argv, os.getcwd(), os.environ['MARK'], input()); sys.exit(3)"
    done = run(code, input="said", env={**os.environ, "MARK": "set"})
    assert (done.returncode, done.stdout) == (3, f"['-c', 'word'] {tmp_path} set said\n")
    done = run("raise ValueError('broken')")
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: broken\n")
    assert run("import os; os.kill(os.getpid(), 9)").returncode == -9
    assert run("import sys; print('torch' in sys.modules, 'secateur' in sys.modules)").stdout == "True False\n"


def test_a_forked_command_ends_with_whoever_asked(forking):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    asked = subprocess.Popen([forking.executable, "-c", code], stdout=subprocess.PIPE)
    with asked.stdout:
        number = int(asked.stdout.readline())
    assert psutil.pid_exists(number)
    asked.kill()
    asked.wait()
    for _ in range(600):
        if not psutil.pid_exists(number):
            return
        time.sleep(0.1)
    raise AssertionError("it goes on")
