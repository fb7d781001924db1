"""Groups of blocks, which of them are run, and means."""

from __future__ import annotations

import pytest
import torch

from secateur.conversions.shared import Shared, mean
from secateur.errors import UsageError


def test_groups_are_of_consecutive_blocks_and_equal():
    assert Shared(groups=3).group_map(6) == [0, 0, 1, 1, 2, 2]
    assert Shared(groups=1).group_map(4) == [0] * 4
    assert Shared(groups=4).group_map(4) == [0, 1, 2, 3]
    with pytest.raises(UsageError, match="4 groups do not divide 6 blocks") as caught:
        Shared(groups=4).group_map(6)
    assert caught.value.hint == "give --groups 1, 2, 3, 6"


@pytest.mark.parametrize(("groups", "iterations", "kept"), [
    ([0] * 6, 6, [0, 1, 2, 3, 4, 5]), ([0] * 6, 3, [0, 2, 4]), ([0] * 6, 1, [0]), ([0] * 5, 2, [0, 2]),
    ([0, 0, 0, 1, 1, 1], 2, [0, 3]), ([0, 0, 0, 1, 1, 1], 4, [0, 1, 3, 4]),
])  # fmt: skip
def test_of_each_group_as_many_blocks_run(groups, iterations, kept):
    assert Shared(iterations=iterations).kept(groups) == kept


def test_a_step_makes_up_for_what_is_not_run():
    assert Shared(iterations=3).step_of(6, 1.0) == 2.0
    assert Shared(iterations=6).step_of(6, 1.0) == 1.0
    assert Shared(iterations=2).step_of(4, 0.25) == 0.5  # of a model that was trained with small steps
    assert Shared(iterations=3, step="1").step_of(6, 1.0) == 1.0


def test_the_mean_is_that_of_float64():
    tensors = [torch.randn(5, 3, generator=torch.Generator().manual_seed(n)).to(torch.bfloat16) for n in range(7)]
    torch.testing.assert_close(mean(tensors), torch.stack(tensors).double().mean(0).float(), atol=0, rtol=0)


@pytest.mark.parametrize(("options", "words"), [
    ({}, "needs --groups or --iterations"),
    ({"groups": 2, "iterations": 2}, "not both"),
    ({"groups": 0}, "--groups 0"),
    ({"iterations": "few"}, "--iterations few"),
    ({"groups": 2, "step": 2.0}, "--step is for --iterations"),
    ({"iterations": 2, "step": "large"}, "--step large"),
    ({"iterations": 2, "step": "-1"}, "--step -1"),
])  # fmt: skip
def test_options_that_make_no_sense_are_refused(options, words):
    with pytest.raises(UsageError, match=words) as caught:
        Shared(**options)
    assert caught.value.hint


@pytest.mark.parametrize(("groups", "iterations"), [([0] * 4, 5), ([0, 0, 1, 1], 3), ([0, 0, 1, 1], 1)])
def test_iterations_that_do_not_divide_are_refused(groups, iterations):
    with pytest.raises(UsageError, match=f"{iterations} iterations of 4 blocks"):
        Shared(iterations=iterations).kept(groups)
