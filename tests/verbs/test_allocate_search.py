"""``--allocation evolve`` on a model: the file, the pruned model, what it is judged by, and what it costs."""

from __future__ import annotations

import random
import re
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur.engine import levels as levels_module
from secateur.engine.blocks import find_structure
from secateur.engine.levels import Leveled, LevelStore
from secateur.errors import DiskSpaceError, UnsupportedModelError
from secateur.progress import Reporter
from secateur.verbs import searching
from tests.models import calibration_for, save_tiny, tiny_model
from tests.reporters import Notes

OPTIONS = {"generations": 4, "offspring": 6, "windows": 4, "sequences": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "llama", "llama", num_hidden_layers=3)


def allocated(model: Path, out: Path, **settings: Any) -> Any:
    values = {"calibration": calibration_for("llama"), "compute_dtype": "float32", "sparsity": 0.6, **settings}
    return secateur.allocate(model, out, **values)


def shares(result: Any) -> dict[str, float]:
    return {one.name: one.sparsity for one in result.matrices}


def test_the_file_prunes_as_the_rule_does_and_a_seed_gives_it_again(model: Path, tmp_path: Path) -> None:
    settings = {"allocation": "evolve", "allocation_options": OPTIONS}
    reporter = Notes()
    made = allocated(model, tmp_path / "one.yaml", reporter=reporter, **settings)
    assert made.sparsity == pytest.approx(0.6, abs=1e-9)
    assert all(0.45 - 1e-9 <= share <= 0.75 + 1e-9 for share in shares(made).values())
    assert any("4 generations, at most 44 forwards" in note for note in reporter.told)
    (told,) = filter(None, (re.search(r"from (\d+\.\d+) to (\d+\.\d+) nats a token", note) for note in reporter.told))
    assert float(told[2]) <= float(told[1])
    common = {"calibration": calibration_for("llama"), "compute_dtype": "float32", "method": "wanda",
              "verify": False, "evaluate": False}  # fmt: skip
    direct = secateur.prune(model, tmp_path / "direct", sparsity=0.6, **settings, **common)
    secateur.prune(model, tmp_path / "read", allocation=str(tmp_path / "one.yaml"), **common)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("direct", "read")]
    assert files[0] == files[1]
    assert any(sentence.startswith("Allocation evolve: from") for sentence in direct.verdict)
    start = allocated(model, tmp_path / "start.yaml", allocation="sensitivity", allocation_options={"sequences": 2})
    none = allocated(
        model, tmp_path / "none.yaml", allocation="evolve", allocation_options={**OPTIONS, "generations": 0}
    )
    assert shares(none) == shares(start)


def test_the_loss_is_the_divergence_from_the_dense_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "CLASSES", 128)  # all there are, so that it is the whole divergence
    dense, pruned = tiny_model("gpt2"), tiny_model("gpt2")
    specs = {spec.name: spec for spec in find_structure(dense).matrices}
    store = LevelStore(tmp_path, [0.25, 0.5])
    for name, spec in specs.items():
        (weight,) = spec.slices(dense.get_parameter(name).data)
        store.keep(name, 0.25, weight)
        store.keep(name, 0.5, weight * (weight.abs() > weight.abs().median()))
    windows = [row[None] for row in calibration_for("gpt2", rows=3, length=9)]
    answers = searching.ask_dense(dense, windows, torch.float32)
    bench = searching._Bench(Leveled(pruned, specs, store), answers, torch.float32, random.Random(0), Reporter())
    at = dict.fromkeys(specs, 1)
    found = bench.loss(at, [0, 2])
    with torch.no_grad():
        logits = [torch.cat([one(windows[k]).logits[0] for k in (0, 2)]).double() for one in (dense, pruned)]
    p, q = (one.log_softmax(-1) for one in logits)
    assert found == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found > 0
    read: list[str] = []
    load = store.load
    monkeypatch.setattr(store, "load", lambda name, level: read.append(name) or load(name, level))
    first = next(iter(specs))
    bench.loss({**at, first: 0}, [1])
    assert read == [first]
    (kept,) = specs[first].slices(dense.get_parameter(first).data)
    assert torch.equal(specs[first].slices(pruned.get_parameter(first).data)[0], kept.bfloat16().float())


def test_a_disk_that_is_too_small_is_refused_before_the_measuring(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(levels_module.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    monkeypatch.setattr("secateur.verbs.dividing.Survey", lambda *_, **__: pytest.fail("matrices are measured"))
    with pytest.raises(DiskSpaceError, match="the search keeps"):
        allocated(model, tmp_path / "out.yaml", allocation="evolve", allocation_options=OPTIONS)
    assert not (tmp_path / "out.yaml").exists()


def test_models_without_next_tokens_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "bert")
    with pytest.raises(UnsupportedModelError, match="next tokens"):
        allocated(folder, tmp_path / "out.yaml", allocation="evolve", calibration=calibration_for("bert"))
