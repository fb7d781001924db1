import dataclasses
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur import plugins
from secateur.errors import PatternError, RecipeError, SecateurError, SparsityError
from secateur.recipe import DEFAULT_SPARSITY, Override, Recipe, load_recipe

texts = st.text("abcdefgh_.*:", min_size=1, max_size=8)
shares = st.floats(0, 1, exclude_max=True)
recipes = st.builds(
    Recipe,
    method=texts,
    method_options=st.dictionaries(texts, st.integers() | st.booleans() | texts, max_size=2),
    sparsity=st.none() | shares,
    samples=st.none() | st.integers(1, 1000),
    sequence_length=st.none() | st.integers(1, 1000),
    targets=st.lists(texts, max_size=2).map(tuple),
    ignore=st.lists(texts, max_size=2).map(tuple),
    overrides=st.lists(st.builds(Override, match=texts, sparsity=shares), max_size=2).map(tuple),
    seed=st.integers(0, 2**32),
)


@settings(deadline=None)
@given(recipes)
def test_survives_json_and_yaml(recipe):
    data = recipe.to_dict()
    assert Recipe.from_dict(data) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(data))) == recipe
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(data))) == recipe


def test_every_field_has_a_help_text():
    fields = {field.name for field in dataclasses.fields(Recipe)}
    described = plugins.option_help(Recipe)
    assert set(described) == fields
    assert all(described.values())


def test_flags_with_dashes_are_the_same_keys():
    assert Recipe.from_dict({"sequence-length": 64}).sequence_length == 64
    assert Recipe.from_dict({"ignore": "*down*"}).ignore == ("*down*",)


def test_file_is_read_as_plain_data(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        'sparsity: 0.6\npattern: unstructured\noverrides: [{match: "*down_proj*", sparsity: 0.7}]\n', encoding="utf-8"
    )
    recipe = Recipe.from_dict(load_recipe(file) | {"sparsity": 0.4})
    assert recipe.sparsity == 0.4
    assert recipe.overrides == (Override(match="*down_proj*", sparsity=0.7),)
    file.write_text("", encoding="utf-8")
    assert load_recipe(file) == {}


@pytest.mark.parametrize("content", [b"- a\n- b\n", b"just text", b"a: [1", b"\xff\xfe\x00", b"a: b: c"])
def test_file_that_is_no_recipe_is_refused(tmp_path, content):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        load_recipe(file)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="no recipe file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="not a readable"):
        load_recipe(tmp_path)


def test_unknown_key_names_the_nearest():
    with pytest.raises(RecipeError, match="unknown key 'sparsty'") as caught:
        Recipe.from_dict({"sparsty": 0.5})
    assert "'sparsity'" in caught.value.hint


@pytest.mark.parametrize(
    "data",
    [
        {"method": 3},
        {"method": None},
        {"sparsity": "half"},
        {"sparsity": True},
        {"samples": 1.5},
        {"samples": True},
        {"samples": 0},
        {"sequence_length": -1},
        {"seed": "zero"},
        {"seed": None},
        {"targets": 7},
        {"targets": [1]},
        {"method_options": ["a"]},
        {"overrides": {"match": "a", "sparsity": 0.5}},
        {"overrides": ["*down*=0.6"]},
        {"overrides": [{"match": "a"}]},
        {"overrides": [{"match": "a", "sparsity": "0.6"}]},
        {"overrides": [{"match": 1, "sparsity": 0.6}]},
        {"overrides": [{"match": "a", "sparsity": None}]},
        {"overrides": [{"match": "a", "sparsity": [0.6]}]},
        {"pattern": 124},  # 2:4 without quotes in YAML 1.1
        {"pattern": None},
    ],
)
def test_values_of_the_wrong_kind_are_refused(data):
    with pytest.raises(RecipeError):
        Recipe.from_dict(data)


def test_none_means_the_default_where_there_is_one():
    recipe = Recipe.from_dict({"sparsity": None, "samples": None, "sequence_length": None})
    assert recipe == Recipe()


def test_effective_sparsity():
    assert Recipe().effective_sparsity == DEFAULT_SPARSITY
    assert Recipe(sparsity=0.3).effective_sparsity == 0.3
    assert Recipe(pattern="1:4").effective_sparsity == 0.75
    assert Recipe(pattern="2:4", sparsity=0.5).effective_sparsity == 0.5
    assert Recipe(pattern="2:4", sparsity=0.0).effective_sparsity == 0.0
    assert Recipe(pattern="1:3", sparsity=2 / 3).parsed_pattern.group == 3


def test_contradictions_are_refused():
    with pytest.raises(SparsityError, match=r"2:4 means sparsity 0\.5, not 0\.6"):
        Recipe(pattern="2:4", sparsity=0.6)
    with pytest.raises(PatternError):
        Recipe(pattern="4:2")
    for value in (-0.1, 1.0, float("nan")):
        with pytest.raises(SparsityError):
            Recipe(sparsity=value)
        with pytest.raises(SparsityError, match=r"override '\*down\*'"):
            Override(match="*down*", sparsity=value)


@pytest.mark.parametrize("data", [{"sparsity": 2}, {"pattern": "4:2"}, {"sparsty": 1}, {"samples": 0}])
def test_every_refusal_is_one_line_and_exit_2(data):
    with pytest.raises(SecateurError) as caught:
        Recipe.from_dict(data)
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message + caught.value.hint
    assert caught.value.hint


UNUSED = [
    ({"round_to": 8}, "round_to needs --structure"),
    ({"update": False}, "update needs --structure"),
    ({"depth_by": "greedy"}, "depth_by needs --structure"),
    ({"structure": "ffn", "depth_by": "greedy"}, "depth_by needs --structure depth"),
    ({"structure": "ffn", "budget": "parameters=0.8", "depth_by": "greedy"}, "depth_by needs --structure depth"),
    ({"structure": "depth", "round_to": 8}, "round_to needs --structure ffn, hidden"),
    ({"structure": "depth", "update": False}, "update needs --structure ffn"),
    ({"structure": "depth", "method": "wanda"}, "method has no meaning where only whole blocks go"),
    ({"structure": "depth", "budget": "parameters=0.8", "method": "obs"}, "method has no meaning"),
    ({"structure": "depth", "method_options": {"damping": 1}}, "method_options has no meaning"),
    ({"structure": "ffn", "pattern": "2:4"}, "pattern has no meaning with --structure"),
    ({"budget": "parameters=0.8", "targets": ["*"]}, "targets has no meaning with --budget"),
]
USED = [
    {"structure": "ffn", "round_to": 8, "update": False, "method": "wanda"},
    {"structure": "hidden", "round_to": 8, "update": False},
    {"structure": "heads,hidden", "update": False},
    {"structure": "depth,heads", "method": "magnitude", "update": False, "depth_by": "angular"},
    {"structure": "depth,experts", "method": "frequency"},
    {"budget": "parameters=0.8", "round_to": 8, "update": False, "depth_by": "greedy", "method": "magnitude"},
]


@pytest.mark.parametrize(("data", "words"), UNUSED, ids=str)
def test_what_nothing_looks_at_is_refused(data, words):
    with pytest.raises(RecipeError, match=words) as caught:
        Recipe.from_dict(data)
    assert caught.value.hint


@pytest.mark.parametrize("data", [*USED, {"structure": "depth"}, {"structure": "experts"}, {}], ids=str)
def test_what_is_looked_at_is_not(data):
    recipe = Recipe.from_dict(data)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.unused == []


@pytest.mark.parametrize(
    ("data", "unused"),
    [
        ({"structure": "heads", "round_to": 8, "update": False}, ["round_to"]),
        ({"structure": "depth,kv-groups", "round_to": 8}, ["round_to"]),
        ({"structure": "experts", "round_to": 8, "update": False}, ["round_to", "update"]),
        ({"structure": "heads,ffn", "round_to": 8}, []),
        ({"structure": "heads,hidden", "round_to": 8}, ["round_to"]),
    ],
    ids=str,
)
def test_what_other_units_would_look_at(data, unused):
    assert Recipe.from_dict(data).unused == unused
