"""Every example runs as it stands, on a tiny encoder and a small file of labelled texts."""

from __future__ import annotations

import json
import os
import random
import re
import runpy
import subprocess
import sys

import pytest

from tests.docs.fences import ROOT
from tests.models import save_tiny

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SPARSITY = {"hold_masks": 0.5, "gradual": 0.8, "movement": 0.8, "lottery": 0.8}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    save_tiny(folder / "encoder", "bert")
    choose = random.Random(0)
    with (folder / "sst2-train.jsonl").open("w", encoding="utf-8") as file:
        for number in range(160):
            label = number % 2
            word = choose.choice(("good", "fine") if label else ("bad", "dull"))
            file.write(json.dumps({"text": f"a {word} film", "label": label}) + "\n")
    return folder


def test_there_is_an_example_of_every_schedule():
    assert {path.stem for path in EXAMPLES} == {"hold_masks", "gradual", "movement", "soft_movement", "lottery"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_is_short(example):
    assert len(example.read_text(encoding="utf-8").splitlines()) < 40


def check_output(text, name):
    found = re.search(r"^sparsity (0\.\d{3}), accuracy ([01]\.\d{3})$", text, re.MULTILINE)
    assert found, text
    if name in SPARSITY:
        assert float(found[1]) == SPARSITY[name]
    assert 0 <= float(found[2]) <= 1


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_runs(example, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "argv", [str(example), str(workplace / "encoder"), str(workplace / "sst2-train.jsonl")])
    runpy.run_path(str(example), run_name="__main__")
    check_output(capsys.readouterr().out, example.stem)


def test_an_example_runs_as_a_command_and_finds_its_data_by_the_environment(workplace):
    environment = {**os.environ, "SECATEUR_DATA": str(workplace), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "hold_masks.py"), "encoder"],
        cwd=workplace,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    check_output(done.stdout, "hold_masks")
