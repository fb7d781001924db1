"""What a space draws: every valid setting once in a grid, only valid ones, and refusals of what makes no sense."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from secateur.errors import SecateurError, SparsityError, StudyError, UnknownNameError
from secateur.plugins import available, make_method, statistics_of
from secateur.recipe import Recipe
from secateur.study.read import read_study
from secateur.study.space import Values, read_space, read_values
from tests.study.studies import plain


def grid(**space):
    return list(read_space(space, "space").grid())


def study(**changes):
    return read_study(plain(**changes), Path(), "s.yaml")


def test_a_grid_is_the_product_where_everything_goes_together():
    found = grid(method=["wanda", "magnitude"], sparsity=[0.1, 0.5], dtype=["float32", "bfloat16"])
    drawn = [(one["method"], one["sparsity"], one["dtype"]) for one in found]
    assert drawn == list(itertools.product(["wanda", "magnitude"], [0.1, 0.5], ["float32", "bfloat16"]))


def test_what_means_nothing_together_is_not_drawn():
    found = grid(
        method=["wanda", "sparsegpt"], sparsity=[0.3, 0.5], pattern=["unstructured", "2:4"],
        structure=["none", "ffn", "depth"],
    )  # fmt: skip
    assert len(found) == 2 * 2 + 2 + 2 + 2  # unstructured, 2:4, ffn by wanda alone, depth by no method
    for one in found:
        assert ("sparsity" in one) == (one.get("pattern") != "2:4")
        assert ("pattern" in one) == ("allocation" in one) == (one["structure"] == "none")
        assert ("method" in one) == (one["structure"] != "depth")
        assert one["structure"] != "ffn" or one["method"] == "wanda"


def test_every_drawn_setting_is_a_recipe_and_the_others_are_counted():
    spec = study(space={
        "method": ["wanda", "obs", "sparsegpt"], "sparsity": [0.3, 0.5], "pattern": ["unstructured", "2:4", "4:8"],
        "structure": ["none", "ffn", "depth", "depth,ffn", "hidden"],
    })  # fmt: skip
    valid = list(spec.grid())
    assert all(isinstance(spec.recipe(one), Recipe) for one in valid)
    assert spec.skipped == 3 * 2 * 3 * 5 - len(valid) > 0


def test_options_go_with_their_method_only():
    found = grid(
        method=["wanda", "sparsegpt"], sparsity=0.5, **{"method-options": {"sparsegpt": {"damping": [0.01, 0.1]}}}
    )
    assert [(one["method"], one.get("sparsegpt.damping")) for one in found] == [
        ("wanda", None), ("sparsegpt", 0.01), ("sparsegpt", 0.1),
    ]  # fmt: skip


def test_a_range_has_both_ends_and_no_noise():
    assert read_values({"low": 0.1, "high": 0.8, "step": 0.1}, "x").listed == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    assert read_values({"low": 0.0, "high": 0.5, "step": 0.2}, "x").listed == (0.0, 0.2, 0.4)
    with pytest.raises(StudyError, match="no end of values"):
        _ = Values((), 0.1, 0.8).listed


def test_recoveries_are_told_apart_by_what_they_change():
    found = grid(sparsity=0.5, recovery=["none", {"mode": "full", "tokens": 4096}, {"mode": "lora", "tokens": 4096}])
    assert [one["recovery"] for one in found] == ["none", "mode full, tokens 4096", "mode lora, tokens 4096"]
    spec = study(space={"sparsity": 0.5, "recovery": [None, {"mode": "full", "tokens": 4096}]})
    trainings = [spec.training(one) for one in spec.grid()]
    assert trainings[0] is None
    assert (trainings[1].mode, trainings[1].tokens, trainings[1].data) == ("full", 4096, spec.data.calibration)


def test_several_spaces_are_one_grid_without_repetitions():
    spec = study(space=[{"sparsity": [0.2, 0.4]}, {"sparsity": [0.4, 0.6]}])
    assert [one["sparsity"] for one in spec.grid()] == [0.2, 0.4, 0.6]
    assert spec.skipped == 1


def test_what_is_fixed_is_in_every_recipe_that_looks_at_it():
    spec = study(space={"structure": ["none", "ffn"], "sparsity": 0.5}, fixed={"ignore": "*lm_head*", "round-to": 8})
    weights, units = (spec.recipe(one) for one in spec.grid())
    assert (weights.ignore, weights.round_to, units.ignore, units.round_to) == (("*lm_head*",), 32, (), 8)


def test_error_correction_goes_with_a_gram_matrix_only():
    found = grid(method=["wanda", "sparsegpt"], refit=[True, False], **{"error-correction": [False, "auto", 0.5]})
    drawn = [(one["method"], one["refit"], one.get("error_correction")) for one in found]
    with_gram = [("wanda", True), ("sparsegpt", True), ("sparsegpt", False)]
    wanted = {(*pair, share) for pair in with_gram for share in ("off", "auto", "0.5")} | {("wanda", False, None)}
    assert set(drawn) == wanted
    assert len(drawn) == len(wanted)
    # Left to itself, a method is refitted where it has the matrix.
    found = grid(method=["magnitude", "alps"], **{"error-correction": ["off", 1]})
    assert [(one["method"], one.get("error_correction")) for one in found] == [
        ("magnitude", None), ("alps", "off"), ("alps", "1"),
    ]  # fmt: skip


def test_what_a_method_says_of_its_statistics_is_read_from_its_source():
    names = available("methods")
    assert len(names) > 5
    for name in names:
        assert statistics_of(name) == make_method(name).statistics
    with pytest.raises(UnknownNameError, match="sparsegp"):
        statistics_of("sparsegp")


def test_what_only_single_weights_have_is_drawn_for_them_alone():
    spec = study(space={
        "structure": ["none", "ffn"], "sparsity": 0.5, "refit": [True, False], "error-correction": ["off", "auto"],
        "reconstruct": ["none", "block", "half-block"],
    }, fixed={"reconstruct-options": {"passes": 2}})  # fmt: skip
    found = list(spec.grid())
    assert len(found) == 2 * 2 * 3 + 1
    assert spec.skipped == 2 * 2 * 2 * 3 - len(found)
    for one in found:
        recipe = spec.recipe(one)
        units = one["structure"] == "ffn"
        assert ("refit" in one) == ("error_correction" in one) == ("reconstruct" in one) == (not units)
        assert (recipe.refit, recipe.error_correction, recipe.reconstruct) == (
            (None, "off", "none") if units else (one["refit"], one["error_correction"], one["reconstruct"])
        )
        assert dict(recipe.reconstruct_options) == ({} if recipe.reconstruct == "none" else {"passes": 2})


def test_they_can_be_fixed():
    spec = study(space={"structure": ["none", "ffn"], "sparsity": 0.5},
                 fixed={"refit": False, "error-correction": "auto", "reconstruct": "block"})  # fmt: skip
    weights, units = (spec.recipe(one) for one in spec.grid())
    assert (weights.refit, weights.error_correction, weights.reconstruct) == (False, "auto", "block")
    assert (units.refit, units.error_correction, units.reconstruct) == (None, "off", "none")


BAD = {
    "refit that is no truth": ({"space": {"refit": ["auto"]}}, StudyError, "true or false"),
    "share beyond one": ({"space": {"error-correction": [1.5]}}, SecateurError, "from 0 to 1"),
    "share that is a truth": ({"space": {"error-correction": [True]}}, StudyError, "off, auto"),
    "correction without a Gram matrix": (
        {"space": {"method": "wanda", "error-correction": "auto"}}, StudyError, "which wanda does not gather",
    ),
    "correction without a refit": (
        {"space": {"method": "ria", "refit": [True, False], "error-correction": [0.5, 1]}}, StudyError, "which ria",
    ),
    "fixed correction without a Gram matrix": (
        {"space": {"method": ["alps", "magnitude"]}, "fixed": {"error-correction": "auto"}}, StudyError,
        "which magnitude does not gather",
    ),
    "unknown reconstruction": ({"space": {"reconstruct": "blok"}}, UnknownNameError, "did you mean 'block'"),
    "reconstruction of units": (
        {"space": {"structure": "ffn", "reconstruct": "block"}}, StudyError, "reconstruct has no meaning",
    ),
    "correction of units": (
        {"space": {"structure": "ffn", "sparsity": 0.5}, "fixed": {"error-correction": "auto", "structure": "ffn"}},
        SecateurError, "has no meaning",
    ),
    "reconstruction twice": ({"space": {"reconstruct": ["block", "block"]}}, StudyError, "twice"),
    "options of no reconstruction": (
        {"space": {"sparsity": 0.5}, "fixed": {"reconstruct-options": {"passes": 2}}}, StudyError, "need reconstruct",
    ),
    "unknown key": ({"space": {"methods": "wanda"}}, UnknownNameError, "did you mean 'method'"),
    "unknown method": ({"space": {"method": "wandaa"}}, UnknownNameError, "did you mean 'wanda'"),
    "unknown structure": ({"space": {"structure": "dept"}}, UnknownNameError, "did you mean 'depth'"),
    "unknown option": (
        {"space": {"method": "sparsegpt", "method-options": {"sparsegpt": {"dampin": 1}}}}, UnknownNameError, "damping",
    ),
    "option of an absent method": (
        {"space": {"method": "wanda", "method-options": {"sparsegpt": {"damping": 1}}}}, StudyError, "none of its",
    ),
    "pattern that YAML reads as a number": ({"space": {"pattern": [124]}}, StudyError, "quotes"),
    "sparsity beyond one": ({"space": {"sparsity": [0.5, 1.5]}}, SparsityError, "1.5"),
    "sparsity that is a text": ({"space": {"sparsity": ["half"]}}, StudyError, "number"),
    "empty list": ({"space": {"sparsity": []}}, StudyError, "empty"),
    "twice the same": ({"space": {"sparsity": [0.5, 0.5]}}, StudyError, "twice"),
    "range upside down": ({"space": {"sparsity": {"low": 0.5, "high": 0.1, "step": 0.1}}}, StudyError, "no range"),
    "key of a range": ({"space": {"sparsity": {"low": 0.5, "hig": 0.6}}}, UnknownNameError, "did you mean 'high'"),
    "range without step in a grid": ({"space": {"sparsity": {"low": 0.1, "high": 0.5}}}, StudyError, "step"),
    "method that nothing fits": ({"space": {"method": "sparsegpt", "structure": "ffn"}}, StudyError, "never be"),
    "pattern beside units": ({"space": {"structure": "ffn", "pattern": "2:4"}}, StudyError, "no meaning"),
    "sparsity beside 2:4": ({"space": {"pattern": "2:4", "sparsity": 0.3}}, StudyError, "no meaning"),
    "two kinds of units at once": ({"space": {"structure": ["ffn", "kv-groups,heads"], "sparsity": 0.5}}, SecateurError,
                                   "cannot go in one run"),
    "recovery with a wrong name": ({"space": {"recovery": {"token": 5}}}, UnknownNameError, "did you mean 'tokens'"),
    "recovery that contradicts itself": ({"space": {"recovery": {"tokens": 5, "minutes": 5}}}, StudyError, "both"),
    "fixed 2:4 with a sparsity": ({"fixed": {"pattern": "2:4", "sparsity": 0.3}, "space": {"method": "wanda"}},
                                  SparsityError, "0.5"),
    "fixed structure with a pattern": ({"fixed": {"structure": "ffn", "pattern": "2:4"}, "space": {"sparsity": 0.5}},
                                       SecateurError, "no meaning"),
    "fixed and varied": ({"fixed": {"method": "wanda"}}, StudyError, "fixed and in space"),
    "unknown fixed key": ({"fixed": {"sparsty": 0.5}}, UnknownNameError, "did you mean 'sparsity'"),
    "several spaces for a sampler": ({"space": [{"sparsity": 0.5}, {"sparsity": 0.6}], "sampler": "tpe",
                                      "budget": {"trials": 4}}, StudyError, "one space"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_spaces_are_refused(case):
    changes, kind, words = BAD[case]
    with pytest.raises(kind) as raised:
        study(**changes)
    assert words in raised.value.message + raised.value.hint
    assert raised.value.exit_code == 2


def test_how_a_model_is_stored_is_drawn_last_and_only_where_it_is_asked():
    assert "format" not in grid(sparsity=0.5)[0]
    found = grid(sparsity=[0.5, 0.7], format=["hf", "sparse-8"])
    assert [(one["sparsity"], one["format"]) for one in found] == [
        (0.5, "hf"), (0.5, "sparse-8"), (0.7, "hf"), (0.7, "sparse-8"),
    ]  # fmt: skip
    spec = study(space={"sparsity": 0.5, "recovery": ["none", {"tokens": 64}], "format": ["hf", "sparse-4"]})
    assert [(one["recovery"], one["format"]) for one in spec.grid()] == [
        ("none", "hf"), ("none", "sparse-4"), ("tokens 64", "hf"), ("tokens 64", "sparse-4"),
    ]  # fmt: skip
    assert len({str(spec.recipe(one)) for one in spec.grid()}) == 1
    assert spec.skipped == 0


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"format": "sparse8"}, "sparse-8"),
        ({"format": ["sparse-8", "sparse-8"]}, "names one twice"),
        ({"structure": "ffn", "format": "sparse-16"}, "leaves none"),
        (
            {"convert": {"to": "factorized", "budget": "parameters=0.8"}, "format": "sparse-8"},
            "no meaning beside convert",
        ),
    ],
)
def test_a_format_that_cannot_be_is_refused(space, words):
    with pytest.raises(SecateurError) as caught:
        study(space=space)
    assert words in f"{caught.value} {caught.value.hint}"
