"""Documents stay true: generated parts are current, links lead somewhere, examples are found and work."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from secateur.plugins import Target
from tests.docs.fences import DOCUMENTS, ROOT, fences


def load_module(path: Path, name: str):
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generator():
    sys.path.append(str(ROOT / "docs"))  # as when it is run as a script
    return load_module(ROOT / "docs" / "generate.py", "generate_docs")


def test_the_generated_parts_are_current():
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_stale_part_is_noticed(generator):
    text = "<!-- generated: x -->\nold\n<!-- end: x -->"
    assert generator.filled(text, {"x": lambda: "new"}, "doc") == text.replace("old", "new")
    with pytest.raises(SystemExit, match="x"):
        generator.filled("no marks", {"x": lambda: "new"}, "doc")


def test_every_flag_of_the_help_is_in_the_reference(run_help):
    reference = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for command in ("inspect", "prune", "evaluate", "export", "generate", "report", "methods"):
        section = reference.split(f"## secateur {command}\n")[1].split("\n## ")[0]
        flags = set(re.findall(r"--[a-z][a-z-]+", run_help(command))) - {"--help"}
        assert flags
        assert all(f"`{flag}" in section for flag in flags), command


@pytest.fixture
def run_help(capsys):
    from secateur.cli.app import main

    def text(command: str) -> str:
        capsys.readouterr()
        assert main([command, "--help"]) == 0
        return capsys.readouterr().out

    return text


def test_there_are_documents():
    names = {document.name for document in DOCUMENTS}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "methods.md", "cli.md", "getting-started.md"} <= names


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_inside_the_project_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://", "#")):
            continue
        assert (document.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_fence_says_its_language(document):
    text = document.read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(fences(document))
    assert all(fence.language for fence in fences(document))


def test_the_example_method_works_as_written(tmp_path):
    (example,) = [f.body for f in fences(ROOT / "docs" / "add-a-method.md") if f.language == "python"]
    file = tmp_path / "diagonal.py"
    file.write_text(example, encoding="utf-8")
    module = load_module(file, "diagonal")
    weight = torch.arange(1.0, 17.0).reshape(4, 4)
    solved = module.Diagonal(bonus=100.0).solve(weight, None, Target(0.5), generator=torch.Generator())
    assert (solved.weight == 0).sum(1).tolist() == [2, 2, 2, 2]
    assert solved.mask.diagonal().all()
