"""Tables of tensors for property tests: any mix of number formats, shapes (also empty and scalar) and names."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors import safe_open

DTYPES = [
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool,
]  # fmt: skip
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda name: name != "__metadata__"
)


def random_tensor(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    names = draw(st.lists(NAMES, min_size=1, max_size=6, unique=True))
    shapes = st.lists(st.integers(0, 4), max_size=3)
    return {name: random_tensor(draw(st.sampled_from(DTYPES)), draw(shapes), i) for i, name in enumerate(names)}


def stock_tensors(path: Path) -> dict[str, torch.Tensor]:
    """What safetensors itself reads."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )
