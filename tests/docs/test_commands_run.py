"""The commands of the documents run as they are written, on a tiny model that stands where `demo` is said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.docs.fences import DOCUMENTS, ROOT, Fence, fences
from tests.docs.forking import server
from tests.models import byte_tokenizer, save_tiny

RUN = {"bash", "python"}
STAND_IN = "models/demo"
"""A folder with the name of the demo model, so that folders named after the model keep their names."""


def runnable(document: Path) -> list[Fence]:
    return [fence for fence in fences(document) if fence.language in RUN and not fence.not_run]


def with_stand_in(text: str) -> str:
    """``demo`` as an argument (a word of its own, or a text of its own in Python) becomes the stand-in."""
    return re.sub(r'(?<=[ "])demo(?=[ "\n])', STAND_IN, text)


def test_the_stand_in_replaces_the_model_and_nothing_else():
    assert with_stand_in("secateur inspect demo\n") == f"secateur inspect {STAND_IN}\n"
    assert with_stand_in('prune("demo", "out")') == f'prune("{STAND_IN}", "out")'
    assert with_stand_in("make demo-pruned; test -f demo-wanda-0.5/x") == "make demo-pruned; test -f demo-wanda-0.5/x"


def test_the_readme_has_commands_that_are_run():
    bodies = [fence.body for fence in runnable(ROOT / "README.md")]
    assert any("secateur prune demo" in body for body in bodies)
    assert any("import secateur" in body for body in bodies)


@pytest.fixture(scope="module")
def command():
    """The file `secateur`, which runs each command line in a process of its own."""
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as script:  # a socket wants a short path
        yield script


def test_a_command_that_fails_is_seen_to_fail(command, tmp_path):
    done = subprocess.run([command, "inspect", "nowhere"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "nowhere" in done.stderr


@pytest.fixture
def workplace(tmp_path, command):
    """A folder with the stand-in, and commands `secateur` and `python` that are those of this test run."""
    save_tiny(tmp_path / STAND_IN, "llama")
    byte_tokenizer().save_pretrained(tmp_path / STAND_IN)  # one that every format can hold
    commands = tmp_path / "commands"
    commands.mkdir()
    (commands / "secateur").symlink_to(command)
    (commands / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (commands / "python").chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    "document", [document for document in DOCUMENTS if runnable(document)], ids=lambda path: path.name
)
def test_the_commands_run_as_written(document, workplace):
    environment = {
        **os.environ,
        "PATH": f"{workplace / 'commands'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "HF_HUB_OFFLINE": "1",
    }
    for fence in fences(document):
        body = with_stand_in(fence.body)
        if fence.language == "yaml" and (named := re.match(r"# (\S+\.yaml)\n", body)):
            (workplace / named[1]).write_text(body, encoding="utf-8")
        if fence.language not in RUN or fence.not_run:
            continue
        command = ["bash", "-euo", "pipefail", "-c", body] if fence.language == "bash" else [sys.executable, "-c", body]
        done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{body}\n{done.stdout}\n{done.stderr}"
