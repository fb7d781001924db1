import pytest

from secateur.errors import TargetError
from secateur.targets import matches, select

NAMES = [
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.10.mlp.down_proj.weight",
]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*down_proj*", [1, 2]),
        ("*down_proj", [1, 2]),  # the name without .weight
        ("*.weight", [0, 1, 2]),
        ("model.layers.0.*", [0, 1]),
        ("model.layers.?.mlp.*", [1]),
        ("*layers.[1-9]*", [2]),
        (NAMES[0], [0]),
        (r"re:layers\.0\.", [0, 1]),
        (r"re:(q|k)_proj", [0]),
        (r"re:^model\.layers\.\d\d", [2]),
    ],
)
def test_select(pattern, found):
    assert select(pattern, NAMES, "target") == [NAMES[i] for i in found]


@pytest.mark.parametrize("pattern", ["down_proj", "*DOWN_PROJ*", "layers.0", "re:^layers", ""])
def test_a_pattern_that_matches_nothing_is_an_error(pattern):
    with pytest.raises(TargetError, match=r"override '.*' matches no prunable matrix") as caught:
        select(pattern, NAMES, "override")
    assert "secateur inspect" in caught.value.hint


def test_the_nearest_name_is_suggested():
    with pytest.raises(TargetError) as caught:
        select("model.layers.0.self_attn.p_proj.weight", NAMES, "target")
    assert NAMES[0] in caught.value.hint


def test_no_matrices_at_all():
    with pytest.raises(TargetError):
        select("*", [], "target")


def test_a_broken_regular_expression_is_an_error():
    with pytest.raises(TargetError, match="not a regular expression"):
        matches("re:(", NAMES[0])
