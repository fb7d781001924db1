import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import PatternError, SparsityError
from secateur.patterns import UNSTRUCTURED, Pattern, check_sparsity, parse_pattern


@given(st.integers(1, 500), st.integers(1, 500))
def test_texts_and_patterns_are_the_same_thing(keep, more):
    pattern = Pattern(keep, keep + more)
    assert parse_pattern(str(pattern)) == pattern
    assert not pattern.unstructured
    assert pattern.sparsity == pytest.approx(more / (keep + more))


def test_unstructured_implies_nothing():
    assert parse_pattern("unstructured") is UNSTRUCTURED
    assert str(UNSTRUCTURED) == "unstructured"
    assert UNSTRUCTURED.sparsity is None
    UNSTRUCTURED.check_divides("anything", 7)


@pytest.mark.parametrize(
    "text", ["", "4:2", "0:4", "4:4", "2:", ":4", "2:4:8", "-2:4", "2.0:4", " 2:4", "two:four", "2:4\n"]
)
def test_anything_else_is_refused(text):
    with pytest.raises(PatternError):
        parse_pattern(text)


def test_a_matrix_that_does_not_divide_is_named():
    parse_pattern("2:4").check_divides("q_proj", 8)
    with pytest.raises(PatternError, match="q_proj: its 10 inputs do not divide by 4") as caught:
        parse_pattern("2:4").check_divides("q_proj", 10)
    assert "--ignore" in caught.value.hint


@given(st.floats(0, 1, exclude_max=True))
def test_sparsity_in_range(value):
    assert check_sparsity(value) == value


@pytest.mark.parametrize("value", [-1e-9, 1, 1.0, 50, float("nan"), float("inf")])
def test_sparsity_out_of_range(value):
    with pytest.raises(SparsityError, match="override"):
        check_sparsity(value, "sparsity of override 'x'")
