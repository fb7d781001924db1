"""The commands of the documents run as they are written, on a tiny model that stands where `demo` is said."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.docs.fences import DOCUMENTS, ROOT, Fence, fences
from tests.forking import Forking
from tests.formats.tokenizers import ROWS, byte_level
from tests.models import save_tiny

RUN = {"bash", "python"}
STAND_IN = "models/demo"
"""A folder with the name of the demo model, so that folders named after the model keep their names."""

VERBS = ("allocate", "bench", "convert", "evaluate", "export", "generate", "inspect", "prune", "recover", "report")
IMPORTED = ["secateur.cli.app", *(f"secateur.verbs.{verb}" for verb in VERBS), "peft", "codecarbon"]
"""What the commands find imported, beside the libraries."""


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
def commands(forking):
    """`secateur` and `python`, which run each command line in a process of its own."""
    libraries = Path(forking.executable)
    with tempfile.TemporaryDirectory() as folder, Forking(Path(folder), IMPORTED, libraries) as server:
        yield {"secateur": server.command("secateur", "-m", "secateur"), "python": libraries}


def test_a_command_that_fails_is_seen_to_fail(commands, tmp_path):
    done = subprocess.run(
        [commands["secateur"], "inspect", "nowhere"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "nowhere" in done.stderr


@pytest.fixture
def workplace(tmp_path, commands):
    """A folder with the stand-in, and commands `secateur` and `python` that are those of this test run."""
    save_tiny(tmp_path / STAND_IN, "llama", vocab_size=ROWS)
    byte_level().save_pretrained(tmp_path / STAND_IN)  # one that every format can hold, and that makes texts short
    (tmp_path / "commands").mkdir()
    for name, command in commands.items():
        (tmp_path / "commands" / name).symlink_to(command)
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
        command = ["bash", "-euo", "pipefail", "-c"] if fence.language == "bash" else ["python", "-c"]
        done = subprocess.run(
            [*command, body], cwd=workplace, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{body}\n{done.stdout}\n{done.stderr}"
