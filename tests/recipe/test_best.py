"""``best``: what it stands for, what wins over it, and that a recipe shows what it meant."""

from __future__ import annotations

import json

import pytest

from secateur.combinations import best
from secateur.errors import RecipeError, UnknownNameError
from secateur.plugins import available, statistics_of
from secateur.recipe import STANDS_FOR, Recipe
from secateur.study.space import has_gram, read_space
from secateur.verbs.asked import merge


def test_it_is_the_default_and_is_resolved() -> None:
    assert Recipe() == Recipe(method="best") == Recipe(method=best.METHOD, error_correction=best.ERROR_CORRECTION)
    assert Recipe(pattern="2:4").method == best.METHOD
    data = Recipe(method="best", method_options={"iterations": 5}).to_dict()
    assert not any(name in json.dumps(data["method"]) for name in STANDS_FOR)
    assert data["method_options"] == {"iterations": 5}
    again = Recipe.from_dict(json.loads(json.dumps(data)))
    assert again.to_dict() == data
    assert again.combination is None  # what a result says does not change with the meaning of the name


def test_every_name_that_stands_for_something_is_one_file() -> None:
    assert {*STANDS_FOR} - {"auto"} == set(available("combinations"))
    assert statistics_of(best.METHOD) == "gram"
    assert best.METHOD in available("combinations")["best"]
    assert best.ERROR_CORRECTION in available("combinations")["best"]


@pytest.mark.parametrize(
    ("said", "meant"), [("off", "off"), (False, "off"), ("auto", "auto"), (0.5, "0.5"), ("0", "0")]
)
def test_what_is_said_beside_it_wins(said: object, meant: str) -> None:
    recipe = Recipe.from_dict({"method": "best", "error_correction": said, "bits": 8, "refit": False})
    assert (recipe.method, recipe.error_correction) == (best.METHOD, meant)
    assert (recipe.bits, recipe.refit, recipe.combination) == (8, False, "best")


@pytest.mark.parametrize("name", ["sparsegpt", "alps", "magnitude", "something of my own"])
def test_a_named_method_is_not_corrected_unless_asked(name: str) -> None:
    recipe = Recipe(method=name)
    assert (recipe.method, recipe.correction, recipe.combination) == (name, "off", None)
    assert Recipe(method=name, error_correction="auto").correction == "auto"


@pytest.mark.parametrize(
    ("structure", "method"),
    [
        (("ffn",), "mixed"),
        (("depth", "heads"), "mixed"),
        (("hidden", "heads"), "obs"),
        (("experts",), "reap"),
        (("depth",), "auto"),
    ],
)
def test_units_have_a_default_of_their_own(structure: tuple[str, ...], method: str) -> None:
    recipe = Recipe(structure=structure)
    assert (recipe.method, recipe.correction, recipe.combination) == (method, "off", None)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    if method != "auto":
        assert Recipe(method="best", structure=structure) == recipe
    with pytest.raises(RecipeError, match="error_correction has no meaning"):
        Recipe(structure=structure, error_correction="auto")


def test_only_blocks_have_no_method_at_all() -> None:
    with pytest.raises(RecipeError, match="method has no meaning where only whole blocks go"):
        Recipe(method="best", structure=("depth",))


def test_settings_are_laid_over_what_was_asked() -> None:
    _, named = merge(Recipe(sparsity=0.6), "wanda", {})
    assert named == Recipe(method="wanda", sparsity=0.6)
    _, kept = merge(Recipe(method="best", error_correction="0.5"), "sparsegpt", {})
    assert kept == Recipe(method="sparsegpt", error_correction="0.5")
    _, alone = merge(Recipe(method="best"), None, {"error_correction": "off"})
    assert alone == Recipe(method=best.METHOD)
    assert alone.combination == "best"
    _, units = merge(Recipe(), None, {"structure": ("ffn",)})
    assert units == Recipe(structure=("ffn",))


def test_a_study_knows_it() -> None:
    assert has_gram("best", None)
    assert has_gram("auto", None)
    options = {"method": ["best", "wanda"], "method-options": {"best": {"iterations": [5, 9]}}}
    drawn = list(read_space({**options, "sparsity": 0.5}, "space").grid())
    assert [(one["method"], one.get("best.iterations")) for one in drawn] == [("best", 5), ("best", 9), ("wanda", None)]
    with pytest.raises(UnknownNameError, match="block_size"):
        read_space({"method": "best", "method-options": {"best": {"block_size": 5}}}, "space")
