"""Starting is cheap: nothing heavy is imported until a verb runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import secateur

HEAVY = {"torch", "transformers", "numpy", "accelerate", "safetensors", "datasets", "huggingface_hub", "gguf"}
HEAVY |= {"optuna", "ray", "sqlalchemy", "jinja2", "codecarbon"}
SOURCE = Path(secateur.__file__).parent.parent

STARTS = {
    "import": "import secateur",
    "names": "import secateur; dir(secateur); secateur.Recipe; secateur.__version__",
    "help": "from secateur.cli.app import main; main(['--help'])",
    "help of prune": "from secateur.cli.app import main; main(['prune', '--help'])",
    "help of export": "from secateur.cli.app import main; main(['export', '--help'])",
    "help of study": "from secateur.cli.app import main; main(['study', 'run', '--help'])",
    "bad study": "from secateur.cli.app import main; main(['study', 'run', 'papper'])",
    "help of report": "from secateur.cli.app import main; main(['report', '--help'])",
    "methods": "from secateur.cli.app import main; main(['methods'])",
    "help of convert": "from secateur.cli.app import main; main(['convert', '--help'])",
    "method": "from secateur.cli.app import main; main(['methods', 'sparsegpt'])",
    "bad usage": "from secateur.cli.app import main; main(['prune', 'm', '--sparsity', '2'])",
}


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("start", STARTS)
def test_nothing_heavy_is_imported(start):
    code = f"import sys\n{STARTS[start]}\nprint('LOADED', *sorted({{n.partition('.')[0] for n in sys.modules}}))"
    done = python(code)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split()[1:])
    assert "secateur" in loaded
    assert not loaded & HEAVY


def test_the_module_is_the_command_and_its_status_is_the_status():
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-m", "secateur", "prune", "m", "--sparsity", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: sparsity is 2.0")


def test_a_reader_that_leaves_is_no_error():
    code = "import os, sys; r, w = os.pipe(); os.close(r); os.dup2(w, 1)\n"
    code += "from secateur.cli.app import main; sys.exit(main(['prune', '--help']))"
    done = python(code)
    assert done.stderr == ""
    assert done.returncode == 1


def test_every_public_name_is_there_and_listed():
    for name in secateur.__all__:
        assert getattr(secateur, name) is not None
        assert name in dir(secateur)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = secateur.no_such_name
