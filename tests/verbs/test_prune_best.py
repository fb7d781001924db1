"""Pruning by the default: what the result says it was, and that it is nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import secateur
from secateur.result import RESULT_FILE
from tests.models import calibration_for, save_tiny
from tests.reporters import Notes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "llama", "llama")


def pruned(model: Path, out: Path, **settings: Any) -> secateur.PruneResult:
    values = {"calibration": calibration_for("llama", rows=16), "verify": False, "evaluate": False, **settings}
    return secateur.prune(model, out, **values)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_the_default_is_what_it_says(model: Path, tmp_path: Path, pattern: str) -> None:
    reporter = Notes()
    result = pruned(model, tmp_path / "best", pattern=pattern, reporter=reporter)
    pruned(model, tmp_path / "named", pattern=pattern, method="alps", error_correction="auto")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("best", "named")]
    assert files[0] == files[1]
    written = json.loads((tmp_path / "best" / RESULT_FILE).read_text())
    assert (written["recipe"]["method"], written["recipe"]["error_correction"]) == ("alps", "auto")
    said = "Method best stood for alps with --error-correction auto."
    assert said in result.verdict
    assert said in (tmp_path / "best" / "README.md").read_text()
    assert said not in json.loads((tmp_path / "named" / RESULT_FILE).read_text())["verdict"]
    assert any(note.startswith("method best: alps with --error-correction auto") for note in reporter.told)


def test_options_and_flags_go_with_it(model: Path, tmp_path: Path) -> None:
    result = pruned(
        model, tmp_path / "out", method="best", method_options={"iterations": "7"}, error_correction="off", bits=8
    )
    assert result.recipe["method_options"]["iterations"] == 7
    assert result.recipe["error_correction"] == "off"
    assert all(matrix.beta is None for matrix in result.matrices)
    assert "Method best stood for alps with --error-correction off." in result.verdict


def test_a_method_object_is_no_combination(model: Path, tmp_path: Path) -> None:
    result = pruned(model, tmp_path / "out", method=secateur.SparseGPT(), recipe=secateur.Recipe(sparsity=0.25))
    assert (result.recipe["method"], result.recipe["error_correction"]) == ("sparsegpt", "off")
    assert not any("stood for" in sentence for sentence in result.verdict)
