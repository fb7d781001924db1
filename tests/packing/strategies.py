"""Matrices and settings for property tests of the sparse format."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from secateur.packing.pack import Setting

SETTINGS = [
    Setting(16), Setting(16, 0, "float16"), Setting(8), Setting(8, 64), Setting(8, 128), Setting(4), Setting(4, 64),
]  # fmt: skip


@st.composite
def matrices(draw: st.DrawFn, most_rows: int = 9) -> torch.Tensor:
    """1 to 130 columns, any density with the ends often, sometimes 2:4, sometimes rows or columns that are all zero."""
    rows, columns = draw(st.integers(1, most_rows)), draw(st.integers(1, 130))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    density = draw(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)))
    matrix = torch.randn(rows, columns, generator=generator) * draw(st.sampled_from([1.0, 1e-3, 1e4, 1e-30]))
    matrix *= torch.rand(rows, columns, generator=generator) < density
    if draw(st.booleans()) and columns % 4 == 0:
        order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1)
        matrix = matrix * (order < 2).reshape(rows, columns)
    if draw(st.booleans()):
        matrix[draw(st.integers(0, rows - 1))] = 0
    return matrix


settings_of_values = st.sampled_from(SETTINGS)
