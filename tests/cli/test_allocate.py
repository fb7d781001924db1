"""``secateur allocate``: flags to the recipe, and the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from secateur.recipe import Override, Recipe
from tests.models import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "llama", "llama")


def test_flags_become_the_recipe(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = []

    def stand_in(model, out, **kwargs):
        given.append((model, out, kwargs["recipe"], kwargs["overwrite"]))
        raise SystemExit(0)

    monkeypatch.setattr("secateur.verbs.allocate.allocate", stand_in)
    with pytest.raises(SystemExit):
        run("allocate", "demo", "-o", "a.yaml")
    assert given.pop() == ("demo", Path("a.yaml"), Recipe(allocation="sensitivity"), False)
    flags = ["--allocation", "owl", "--allocation-option", "spread=0.1", "--sparsity", "0.7", "--ignore", "*o_proj*"]
    with pytest.raises(SystemExit):
        run("allocate", "demo", "-o", "a.yaml", *flags, "--override", "*k_proj*=0.2", "--samples", "4", "--overwrite")
    wanted = Recipe(
        allocation="owl", allocation_options={"spread": "0.1"}, sparsity=0.7, ignore=("*o_proj*",), samples=4,
        overrides=(Override(match="*k_proj*", sparsity=0.2),),
    )  # fmt: skip
    assert given.pop() == ("demo", Path("a.yaml"), wanted, True)
    (tmp_path / "recipe.yaml").write_text("allocation: alpha\nsparsity: 0.4\n")
    with pytest.raises(SystemExit):
        run("allocate", "demo", "-o", "a.yaml", "--recipe", str(tmp_path / "recipe.yaml"))
    assert given.pop()[2] == Recipe(allocation="alpha", sparsity=0.4)


def test_the_table_and_the_json(run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "alloc.yaml"
    shown = run("allocate", str(model), "-o", str(out), "--allocation", "alpha", "--sparsity", "0.6")
    assert shown.status == 0, shown.err
    assert "60.00 % of all weights, divided by alpha" in shown.out
    assert "model.layers.*.mlp.down_proj.weight" in shown.out
    assert "alloc.yaml" in shown.out
    told = run("allocate", str(model), "-o", str(out), "--allocation", "alpha", "--json", "--overwrite")
    data = json.loads(told.out)
    assert data["sparsity"] == pytest.approx(0.5)
    assert {one["name"] for one in data["matrices"]} >= {"model.layers.0.self_attn.q_proj.weight"}
    refused = run("allocate", str(model), "-o", str(out), "--allocation", "alpha")
    assert refused.status == 2
    assert "exists" in refused.err
