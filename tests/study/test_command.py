"""The printed command, read back by the command line itself, asks for the very recipe and settings of the trial."""

from __future__ import annotations

import shlex
from types import SimpleNamespace

import pytest

from secateur.cli.app import main
from secateur.plugins import describe
from secateur.recipe import Override, Recipe
from secateur.study.command import command_line
from secateur.study.conversion import read_conversions
from secateur.training import Training
from secateur.verbs.convert import SETTINGS, make_conversion

RECIPES = {
    "weights": Recipe(method="wanda", sparsity=0.1 + 0.2, samples=8, sequence_length=64),
    "pattern": Recipe(method="sparsegpt", pattern="2:4", method_options={"damping": 0.05}, calibration="my text.txt"),
    "trained": Recipe(method="sparsegpt", refit=False, error_correction="0.5", reconstruct="half-block",
                      reconstruct_options={"passes": 2, "learning_rate": 1e-4}),
    "units": Recipe(structure=("depth", "ffn"), sparsity=0.25, update=False, round_to=8, depth_by="angular", seed=3),
    "blocks": Recipe(structure=("depth",), sparsity=0.25, samples=4),
    "names": Recipe(targets=("*q_proj*", "re:.*[0-3].*"), ignore=("a b",), dtype="bfloat16",
                    overrides=(Override(match="*x=y*", sparsity=0.125),)),
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    import sys

    found = {}
    for name in ("prune", "convert", "recover"):

        def verb(*args, name=name, **kwargs):
            found[name] = (args, kwargs)
            raise KeyboardInterrupt

        monkeypatch.setitem(sys.modules, f"secateur.verbs.{name}", SimpleNamespace(**{name: verb}))
    return found


def run(line: str) -> None:
    for part in line.split(" && "):
        words = shlex.split(part)
        assert words[0] == "secateur"
        main(words[1:])


def typed(recipe: Recipe) -> dict:
    """Options of a method are texts on the command line; the method turns them back into numbers."""
    data = recipe.to_dict()
    for name in ("method_options", "reconstruct_options"):
        data[name] = {key: float(value) for key, value in data[name].items()}
    return data


@pytest.mark.parametrize("name", RECIPES)
def test_prune_is_asked_for_the_same_recipe(name, calls):
    run(command_line("my model", RECIPES[name], None, "out & about"))
    args, kwargs = calls["prune"]
    assert args[0] == "my model"
    assert str(args[1]) == "out & about"
    assert typed(kwargs["recipe"]) == typed(RECIPES[name])
    assert kwargs["evaluate"] is False
    assert kwargs["verify"] is True


def test_recover_is_asked_for_the_same_settings_on_what_prune_made(calls):
    training = Training(
        mode="lora", loss="kd", tokens=4096, learning_rate=1e-4 / 3, trainer={"lr_scheduler_type": "linear"}
    )
    line = command_line("demo", RECIPES["weights"], training, "out")
    run(line)
    assert str(calls["prune"][0][1]) == "out-pruned"
    args, kwargs = calls["recover"]
    assert (args[0], str(args[1])) == ("out-pruned", "out")
    assert kwargs["settings"] == training


CONVERSIONS = {
    "factors": {"to": "factorized", "budget": "parameters=0.8", "weighting": "none"},
    "chains": {"to": "factorized", "cores": 3, "rank": "full", "share-central": True},
    "experts": {"to": "moe", "experts": 48, "top-k": 12, "router": "similarity", "split": "activations"},
    "tied": {"to": "shared", "groups": 10},
    "steps": {"to": "shared", "iterations": 20, "step": 0.1},
}  # fmt: skip


@pytest.mark.parametrize(("name", "recipe"), [*((name, "weights") for name in CONVERSIONS), ("factors", "names")])
def test_convert_is_asked_for_the_same_conversion(name, recipe, calls):
    (conversion,) = read_conversions(CONVERSIONS[name], "x").values()
    run(command_line("my model", RECIPES[recipe], Training(mode="full"), "out", conversion=conversion))
    args, kwargs = calls["convert"]
    assert (args[0], str(args[1])) == ("my model", "out-converted")
    assert (kwargs["evaluate"], kwargs["verify"]) == (False, True)
    known = {"to", *(option.name for option in describe("conversions", conversion["to"], "").options)}
    given = {key: value for key, value in kwargs.items() if key in known}
    assert read_conversions(given, "x") == read_conversions(CONVERSIONS[name], "x")
    make_conversion(given.pop("to"), given)  # which takes texts for numbers, as the flags have them
    looked_at = [
        {key: value for key, value in one.items() if key in SETTINGS} for one in (kwargs, RECIPES[recipe].to_dict())
    ]
    assert Recipe.from_dict(looked_at[0]) == Recipe.from_dict(looked_at[1])
    args, kwargs = calls["recover"]
    assert (args[0], str(args[1]), kwargs["dense"]) == ("out-converted", "out", True)
    assert "prune" not in calls


def test_flags_that_would_have_no_effect_are_left_out():
    plain = command_line("demo", Recipe(method="magnitude", samples=8, sequence_length=64), None, "o", reads_text=False)
    assert plain == "secateur prune demo -o o --method magnitude --no-evaluate"
