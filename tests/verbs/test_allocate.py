"""Allocations from the rule to the file to the pruned model, and files that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import secateur
from secateur.errors import (
    AllocationError,
    OutputError,
    RecipeError,
    SecateurError,
    SparsityError,
    UnsupportedModelError,
    UsageError,
)
from secateur.progress import Reporter
from secateur.recipe import Recipe
from secateur.result import PruneResult
from secateur.verbs import dividing
from tests.models import calibration_for, save_tiny

RULES = ["owl", "alpha", "sensitivity"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "llama", "llama", num_hidden_layers=3)


def pruned(model: Path, out: Path, **settings: Any) -> PruneResult:
    values = {"method": "magnitude", "calibration": calibration_for("llama"), "compute_dtype": "float32", **settings}
    return secateur.prune(model, out, verify=False, evaluate=False, **values)


def allocated(model: Path, out: Path, **settings: Any) -> Any:
    values = {"calibration": calibration_for("llama"), "compute_dtype": "float32", **settings}
    return secateur.allocate(model, out, **values)


@pytest.mark.parametrize("rule", RULES)
def test_the_file_of_a_rule_prunes_as_the_rule_does(model: Path, tmp_path: Path, rule: str) -> None:
    options = {} if rule == "alpha" else {"spread": "0.12"}
    made = allocated(
        model, tmp_path / "alloc.yaml", allocation=rule, allocation_options=options, sparsity=0.6, ignore=["*o_proj*"]
    )
    settings = {"ignore": ["*o_proj*"]}
    direct = pruned(model, tmp_path / "direct", allocation=rule, allocation_options=options, sparsity=0.6, **settings)
    pruned(model, tmp_path / "read", allocation=str(tmp_path / "alloc.yaml"), **settings)
    assert (tmp_path / "direct" / "model.safetensors").read_bytes() == (
        tmp_path / "read" / "model.safetensors"
    ).read_bytes()
    assert made.sparsity == pytest.approx(0.6, abs=1e-6)
    shares = {one.name: one.sparsity for one in made.matrices}
    assert len(set(shares.values())) > 1
    assert not any("o_proj" in name for name in shares)
    for matrix in direct.matrices:
        assert matrix.zeros == round(shares[matrix.name] * matrix.shape[0] * matrix.shape[1])
    assert any(sentence.startswith(f"Allocation {rule}: from") for sentence in direct.verdict)
    assert direct.allocation == shares


def test_a_file_is_moved_to_another_sparsity_where_that_is_asked_for(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "alloc.yaml"
    made = allocated(model, file, allocation="owl", sparsity=0.5)
    result = pruned(model, tmp_path / "out", allocation=str(file), sparsity=0.8)
    zeros, size = (sum(one) for one in zip(*((m.zeros, m.shape[0] * m.shape[1]) for m in result.matrices), strict=True))
    assert zeros / size == pytest.approx(0.8, abs=1e-3)
    before = [one.sparsity for one in made.matrices]
    after = [one.sparsity for one in result.matrices]
    assert [round(b - before[0], 2) for b in before] == [round(a - after[0], 2) for a in after]
    (shown,) = secateur.report([tmp_path / "out"], run=False).allocations
    assert (shown.name, shown.sparsity) == ("alloc.yaml, moved to 80.0%", pytest.approx(0.8))
    assert [shown.least.sparsity, shown.most.sparsity] == pytest.approx([min(after), max(after)], abs=1e-2)
    even = pruned(model, tmp_path / "even", sparsity=0.8)
    assert even.allocation == {}


def test_overrides_stay_out_of_what_is_divided(model: Path, tmp_path: Path) -> None:
    made = allocated(
        model, tmp_path / "a.yaml", allocation="sensitivity", sparsity=0.5,
        overrides=[{"match": "*layers.0*", "sparsity": 0.1}],
    )  # fmt: skip
    free = [one for one in made.matrices if "layers.0" not in one.name]
    assert {one.sparsity for one in made.matrices if "layers.0" in one.name} == {0.1}
    total = sum(one.shape[0] * one.shape[1] for one in free)
    assert sum(one.sparsity * one.shape[0] * one.shape[1] for one in free) / total == pytest.approx(0.5, abs=1e-6)
    assert all(0.35 - 1e-9 <= one.sparsity <= 0.65 + 1e-9 for one in free)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "qwen3_moe"])
def test_other_families(tmp_path: Path, family: str) -> None:
    folder = save_tiny(tmp_path / "model", family)
    for rule in ("owl", "alpha"):
        made = secateur.allocate(
            folder, tmp_path / f"{rule}.yaml", allocation=rule, sparsity=0.6, calibration=calibration_for(family)
        )
        assert made.sparsity == pytest.approx(0.6, abs=1e-6)
    result = secateur.prune(
        folder, tmp_path / "out", method="magnitude", allocation=str(tmp_path / "owl.yaml"), verify=False,
        evaluate=False,
    )  # fmt: skip
    assert result.sparsity == pytest.approx(0.6, abs=0.002)
    if family in ("bert", "qwen3_moe"):
        with pytest.raises(UnsupportedModelError, match="stacked experts|next tokens"):
            secateur.allocate(folder, tmp_path / "s.yaml", calibration=calibration_for(family))
        assert not (tmp_path / "s.yaml").exists()


def test_a_resumed_run_does_not_measure_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Reporter):
        def advance(self, what: str = "") -> None:
            if what == "model.layers.1" and self.pruning:
                raise KeyboardInterrupt

        def stage(self, name: str, total: int) -> None:
            self.pruning = name == "pruning"

    settings = {"allocation": "sensitivity", "method": "wanda"}
    pruned(model, tmp_path / "whole", **settings)
    with pytest.raises(SecateurError):
        pruned(model, tmp_path / "out", reporter=Stop(), **settings)
    monkeypatch.setattr(dividing.Survey, "run", lambda *args: pytest.fail("measured again"))
    pruned(model, tmp_path / "out", resume=True, **settings)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda m: m.update({"other.weight": m.popitem()[1]}), AllocationError, "no matrix other.weight"),
        (lambda m: m["model.layers.1.mlp.up_proj.weight"].update(shape=[4, 4]), AllocationError,
         "model.layers.1.mlp.up_proj.weight is 4 x 4 there, and 48 x 32 here"),
        (lambda m: m.pop("model.layers.2.self_attn.k_proj.weight"), AllocationError,
         "no sparsity for model.layers.2.self_attn.k_proj.weight"),
        (lambda m: m["model.layers.0.mlp.up_proj.weight"].update(sparsity=1.0), SparsityError, "up_proj.weight is 1.0"),
        (lambda m: m["model.layers.0.mlp.up_proj.weight"].update(sparsity="half"), AllocationError, "up_proj"),
        (lambda m: m.clear(), AllocationError, "has no matrices"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_suit_is_refused(model: Path, tmp_path: Path, change: Any, kind: Any, words: str) -> None:
    file = tmp_path / "alloc.yaml"
    allocated(model, file, allocation="alpha")
    data = yaml.safe_load(file.read_text())
    change(data["matrices"])
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(kind, match=words):
        pruned(model, tmp_path / "out", allocation=str(file))
    assert not (tmp_path / "out").exists()


def test_files_that_are_none(model: Path, tmp_path: Path) -> None:
    with pytest.raises(AllocationError, match="no allocation file"):
        pruned(model, tmp_path / "out", allocation=str(tmp_path / "missing.yaml"))
    (tmp_path / "odd.yaml").write_text("a: [1")
    with pytest.raises(AllocationError, match="not a readable YAML"):
        pruned(model, tmp_path / "out", allocation=str(tmp_path / "odd.yaml"))
    with pytest.raises(RecipeError, match="no options"):
        pruned(model, tmp_path / "out", allocation="a.yaml", allocation_options={"spread": 1})


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"allocation": "owl", "sparsity": 0.97}, SparsityError, "0.97 cannot be met"),
        ({"allocation": "sensitivity", "sparsity": 0.97}, SparsityError, "0.97 cannot be met"),
        ({"allocation": "owl", "pattern": "2:4"}, SparsityError, "no meaning with pattern 2:4"),
        ({"allocation": "alpha", "method_options": {"scope": "global"}}, UsageError, "compares all weights"),
        ({"allocation": "owl", "allocation_options": {"sprd": 1}}, UsageError, "option of allocation owl"),
        ({"allocation": "owl", "structure": "ffn", "method": "auto"}, RecipeError, "no meaning with --structure"),
    ],
)  # fmt: skip
def test_what_cannot_be_divided_is_refused(
    model: Path, tmp_path: Path, settings: dict[str, Any], kind: Any, words: str
) -> None:
    with pytest.raises(kind, match=words):
        pruned(model, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_the_output_is_checked_before_any_work(model: Path, tmp_path: Path) -> None:
    for out, words in (("alloc.txt", "does not end in"), ("no/alloc.yaml", "no folder")):
        with pytest.raises(OutputError, match=words):
            secateur.allocate(tmp_path / "nowhere", tmp_path / out)
    (tmp_path / "alloc.yaml").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        allocated(model, tmp_path / "alloc.yaml", allocation="uniform")
    allocated(model, tmp_path / "alloc.yaml", allocation="uniform", overwrite=True)
    assert "uniform" in (tmp_path / "alloc.yaml").read_text()
    with pytest.raises(UsageError, match="method has no meaning"):
        allocated(model, tmp_path / "b.yaml", method="wanda")
    with pytest.raises(UsageError, match="--structure"):
        allocated(model, tmp_path / "b.yaml", recipe=Recipe(structure=("ffn",)))


def test_data_that_are_not_looked_at_are_named(model: Path, tmp_path: Path) -> None:
    made = allocated(model, tmp_path / "a.yaml", allocation="alpha", calibration=torch.zeros(2, 8, dtype=torch.long))
    assert any("calibration" in warning for warning in made.warnings)


def test_a_seed_that_changes_nothing_is_named(model: Path, tmp_path: Path) -> None:
    for number, (options, named) in enumerate(
        [
            ({"allocation": "alpha", "seed": 0}, True),
            ({"allocation": "alpha"}, False),
            ({"recipe": Recipe(allocation="alpha", seed=3)}, False),
            ({"allocation": "sensitivity", "allocation_options": {"solver": "random", "levels": 2}, "seed": 3}, False),
            ({"allocation": "sensitivity", "allocation_options": {"solver": "wanda", "levels": 2}, "seed": 3}, True),
        ]
    ):
        told = allocated(model, tmp_path / f"{number}.yaml", **options).warnings
        assert any(line.startswith("--seed has no effect: allocation") for line in told) == named, options
