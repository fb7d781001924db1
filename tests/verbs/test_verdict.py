"""What the verdict says must follow from the numbers, for zeros and for units that were removed."""

from __future__ import annotations

import dataclasses

import pytest

from secateur.measure.compare import Ratio
from secateur.result import Measured
from secateur.verbs.verdict import sentences

WHOLE = Measured(1000, 1000, 0.0, 4000, "float32", bytes_resident=10_000)
LIKE_BEFORE = Ratio(1.0, 0.98, 1.02, 0.97)


def test_zeros_are_the_cause_where_weights_became_zero() -> None:
    said = " ".join(sentences(WHOLE, dataclasses.replace(WHOLE, nonzero=500, sparsity=0.5), LIKE_BEFORE))
    assert "Zeros alone do not shrink a dense file" in said
    assert "a zero is stored like any other number" in said
    assert "dense kernels multiply zeros" in said


def test_zeros_are_no_cause_where_units_were_removed() -> None:
    after = dataclasses.replace(WHOLE, parameters=999, nonzero=999)
    said = " ".join(sentences(WHOLE, after, LIKE_BEFORE, removed=0.001)).lower()
    assert "zero" not in said
    assert "not smaller" in said
    assert "same memory" in said
    assert "not faster beyond noise" in said


@pytest.mark.parametrize(("median", "word"), [(0.5, "slower"), (1.5, "faster")])
def test_what_was_measured_is_what_is_said(median: float, word: str) -> None:
    after = dataclasses.replace(WHOLE, parameters=500, nonzero=500, bytes_disk=2000, bytes_resident=5000)
    said = sentences(WHOLE, after, Ratio(median, median, median, 0.97), removed=0.5)
    assert any(f"Decoding is {word}" in line for line in said)
    assert any("0.50 times the bytes" in line for line in said)
    assert any("0.50 times the memory" in line for line in said)
    assert not any("faster" in line for line in said) or word == "faster"
