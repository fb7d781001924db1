import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.budgets import parse_budget, parse_size
from secateur.errors import BudgetError, RecipeError, SecateurError, UnknownNameError
from secateur.recipe import Recipe


@pytest.mark.parametrize(
    ("text", "whole", "limit"),
    [
        ("parameters=0.75", 1000, 750),
        ("parameters = .5", 1000, 500),
        ("bytes=0.25", 1000, 250),
        ("bytes=150MB", 1e9, 150e6),
        ("bytes=1.5 GiB", 1e10, 1.5 * 2**30),
        ("bytes=700b", 1000, 700),
        ("decode=1.5x", 3.0, 2.0),
        ("decode=2", 3.0, 1.5),
    ],
)
def test_what_may_stay(text, whole, limit):
    assert parse_budget(text).limit(whole) == pytest.approx(limit)


@given(st.sampled_from([("KB", 1000), ("MB", 10**6), ("KiB", 1024), ("", 1)]), st.integers(1, 10**6))
def test_sizes_are_numbers_times_units(unit, number):
    assert parse_size(f"{number}{unit[0]}") == number * unit[1]


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (BudgetError, "", "not KEY=VALUE"),
        (BudgetError, "0.75", "not KEY=VALUE"),
        (BudgetError, "parameters=", "not KEY=VALUE"),
        (BudgetError, "=0.5", "not KEY=VALUE"),
        (UnknownNameError, "parameter=0.5", "did you mean 'parameters'"),
        (UnknownNameError, "dekode=1.5x", "did you mean 'decode'"),
        (BudgetError, "parameters=1", "share of the block parameters that may stay"),
        (BudgetError, "parameters=0", "no share"),
        (BudgetError, "parameters=-0.5", "no share"),
        (BudgetError, "parameters=75%", "no share"),
        (BudgetError, "parameters=nan", "no share"),
        (BudgetError, "parameters=100MB", "no share"),
        (BudgetError, "bytes=150", "with a unit"),
        (BudgetError, "bytes=150MX", "with a unit"),
        (BudgetError, "bytes=0MB", "no size"),
        (BudgetError, "bytes=1.0", "no size"),
        (BudgetError, "decode=1x", "more than 1"),
        (BudgetError, "decode=0.5", "more than 1"),
        (BudgetError, "decode=fast", "more than 1"),
    ],
)
def test_refused(kind, text, words):
    with pytest.raises(kind) as caught:
        parse_budget(text)
    assert words in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("budget and sparsity", {"sparsity": 0.2}),
        ("pattern has no meaning with --budget", {"pattern": "2:4"}),
        ("targets has no meaning with --budget", {"targets": ("*",)}),
        ("same matrices", {"structure": ("kv-groups", "heads")}),
        ("blocks are chosen by measured loss", {"depth_by": "influence"}),
        ("did you mean 'depth'", {"structure": ("deth",)}),
        ("depth_by needs --structure depth", {"structure": ("ffn",), "depth_by": "greedy"}),
    ],
)
def test_a_recipe_that_contradicts_itself(words, values):
    with pytest.raises(SecateurError) as caught:
        Recipe(budget="parameters=0.5", **values)
    assert words in f"{caught.value} {caught.value.hint}"


def test_a_recipe_is_read_back():
    recipe = Recipe(budget="bytes=10MB", round_to=8)
    assert recipe.method == "mixed"
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict({"budget": "decode=1.5x", "structure": "ffn,depth"}).structure == ("ffn", "depth")
    with pytest.raises(RecipeError, match="budget is 0.5"):
        Recipe.from_dict({"budget": 0.5})
    with pytest.raises(UnknownNameError, match="structure 'auto'"):
        Recipe(structure=("auto",))
