"""What a space can give, against what its models have; constraints that no trial can meet are refused at once."""

from __future__ import annotations

import math

import pytest

import secateur
from secateur.checkpoint.source import open_source
from secateur.engine.skeleton import build_skeleton
from secateur.errors import StudyError
from secateur.measure.flops import count_flops
from secateur.measure.model import load_model
from secateur.progress import Recorder
from secateur.recipe import Recipe
from secateur.study.read import load_study
from secateur.study.setup import converter, set_up
from secateur.study.trial import Task, run_trial
from secateur.verbs.convert import check_conversion
from tests.converting.models import tuned
from tests.study.studies import write_study

FACTORS = {"to": "factorized", "rank": 12, "weighting": "none"}
TIED = {"to": "shared", "groups": 1}
ADAPTERS = {"mode": "adapter-moe", "loss": "lm", "tokens": 64, "sequence_length": 32, "experts": 4, "dim": 3}


@pytest.mark.parametrize("one", [
    FACTORS, TIED, {"to": "factorized", "cores": 3, "rank": "full", "share_central": True, "weighting": "none"},
    {"to": "moe", "experts": 8, "top_k": 2}, {"to": "fused", "models": ("two",), "rank": 3},
    {"to": "factorized", "budget": "parameters=0.6", "weighting": "none"},
], ids=lambda one: " ".join(map(str, one.values())))  # fmt: skip
def test_sizes_are_known_before_anything_is_made(one, place):
    if one["to"] == "fused":
        one = {**one, "models": (str(tuned(place / "two", "llama", 2)),)}
    source = open_source(place / "model")
    least, most = check_conversion(converter(one), source, Recipe()).parameters
    settings = {"calibration": str(place / "calibration.txt"), "samples": 2, "sequence_length": 32}
    result = secateur.convert(
        place / "model", place / "out", **one, **(settings if one["to"] == "moe" else {}), verify=False, evaluate=False
    )
    assert least <= result.after.parameters <= most
    assert (least == most) == ("budget" not in one)


def reach(place, **changes):
    return set_up(load_study(write_study(place, **changes)), Recorder()).reach


def test_a_limit_that_no_conversion_can_meet_is_refused_and_one_that_some_can_is_not(place):
    dense = load_model(place / "model").num_parameters()
    tied = dense - sum(one.numel() for one in load_model(place / "model").model.layers[0].parameters())
    both = {"convert": [FACTORS, TIED]}
    for space, words in (
        (both, f"parameters is at least {tied:,}"), ([both, {"sparsity": 0.5}], f"parameters is at least {tied:,}"),
    ):  # fmt: skip
        with pytest.raises(StudyError) as raised:
            reach(place, space=space, constraints=[f"parameters <= {tied - 1}"])
        assert words in raised.value.message
        assert "conversions of the space" in raised.value.message
        reach(place, space=space, constraints=[f"parameters <= {tied}"])
    with pytest.raises(StudyError, match="bytes_disk is at least"):
        reach(place, space=both, constraints=[f"bytes_disk <= {tied * 4 - 1}"])
    reach(place, space={**both, "dtype": ["auto", "bfloat16"]}, constraints=[f"bytes_disk <= {tied * 4 - 1}"])
    with pytest.raises(StudyError, match="parameters is at most"):
        reach(place, space=both, constraints=[f"parameters >= {dense + 1}"])
    experts = {"convert": {"to": "moe", "experts": 8, "top_k": 2}}  # routers are added
    reach(place, space=experts, constraints=[f"parameters >= {dense + 1}"])


def test_adapters_lift_the_upper_limit(place):
    dense = load_model(place / "model").num_parameters()
    with pytest.raises(StudyError, match="at most"):
        reach(place, constraints=[f"parameters >= {dense + 1}"])
    space = {"sparsity": 0.5, "method": "magnitude", "recovery": [None, ADAPTERS]}
    assert reach(place, space=space)["parameters"].high == math.inf


def test_what_is_counted_after_adapters_came_is_what_is_in_the_model(place):
    setup = set_up(
        load_study(write_study(place, space={"sparsity": 0.5, "method": "magnitude", "recovery": ADAPTERS})), Recorder()
    )
    (settings,) = setup.spec.grid()
    recipe, _ = setup.recipe(settings)
    training = setup.spec.training(settings)
    assert training is not None
    outcome = run_trial(Task(
        number=0, model=str(place / "model"), dense=str(place / "model"), recipe=recipe.to_dict(),
        training=training.to_dict(), out=str(place / "trial"), choice=str(setup.exam("choice")),
    ))  # fmt: skip
    assert outcome.state == "complete", outcome.reason
    model = load_model(place / "trial")
    added = 2 * (2 * 4 * 3 * 32 + 4 * 32)
    assert outcome.values["parameters"] == model.num_parameters()
    assert model.num_parameters() == load_model(place / "model").num_parameters() + added
    # Of the four adapters of both networks, two are beside a token.
    assert outcome.values["active_parameters"] == model.num_parameters() - 2 * (4 - 2) * 2 * 3 * 32
    assert outcome.values["nonzero"] == sum(int(one.count_nonzero()) for one in model.parameters())
    assert outcome.values["bytes_disk"] == (place / "trial" / "model.safetensors").stat().st_size
    flops = count_flops(build_skeleton(place / "trial"), outcome.sparsity)
    assert outcome.values["flops_per_token"] == flops.per_token > count_flops(build_skeleton(place / "model")).per_token
    assert outcome.values["sparse_flops_per_token"] == flops.sparse_per_token
