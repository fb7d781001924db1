"""The refit of the rows before a cut, against the normal equations written out and solved directly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur import bilinear
from secateur.bilinear import refit_rows


def problem(seed: int, tokens: int, width: int, units: int, outputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    inputs = torch.randn(tokens, width) @ torch.randn(width, width)
    return (
        inputs, torch.randn(tokens, units), torch.randn(outputs, units), torch.randn(tokens, outputs),
        torch.randn(units, width),
    )  # fmt: skip


def lambda_of(inputs: Tensor, factors: Tensor, following: Tensor, damping: float) -> float:
    scale = (following**2).sum(dim=0) * (factors**2).mean(dim=0)
    return damping * float(scale.mean()) * float((inputs.t() @ inputs).diagonal().mean())


def objective(u: Tensor, problem: tuple[Tensor, ...], pull: float) -> float:
    inputs, factors, following, wanted, start = (part.double() for part in problem)
    error = (factors * (inputs @ u.double().t())) @ following.t() - wanted
    return float(error.square().sum() + pull * (u.double() - start).square().sum())


def directly(problem: tuple[Tensor, ...], pull: float) -> Tensor:
    """One row of the design matrix for each token and output: its coefficients are D_oj s_tj z_tc."""
    inputs, factors, following, wanted, start = (part.double() for part in problem)
    design = torch.einsum("oj,tj,tc->tojc", following, factors, inputs).reshape(-1, start.numel())
    left = design.t() @ design + pull * torch.eye(start.numel(), dtype=torch.float64)
    return torch.linalg.solve(left, design.t() @ wanted.reshape(-1) + pull * start.reshape(-1)).reshape(start.shape)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 1000), st.integers(1, 40), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4),
    st.sampled_from([0.01, 0.1, 1.0]),
)  # fmt: skip
def test_many_steps_solve_the_normal_equations(
    seed: int, tokens: int, width: int, units: int, outputs: int, damping: float
) -> None:
    made = problem(seed, tokens, width, units, outputs)
    pull = lambda_of(*made[:3], damping)
    best = objective(directly(made, pull), made, pull)
    found = objective(refit_rows(*made, damping=damping, steps=200), made, pull)
    assert found <= best * (1 + 1e-3) + 1e-6


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(5, 40))
def test_every_step_comes_closer(seed: int, tokens: int) -> None:
    made = problem(seed, tokens, 4, 5, 3)
    pull = lambda_of(*made[:3], 0.1)
    values = [objective(refit_rows(*made, damping=0.1, steps=steps), made, pull) for steps in range(6)]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in zip(values, values[1:], strict=False))
    assert values[5] < values[0]


def test_no_step_and_nothing_to_mend_leave_the_rows_as_they_are() -> None:
    inputs, factors, following, wanted, start = problem(0, 30, 4, 5, 3)
    assert torch.equal(refit_rows(inputs, factors, following, wanted, start, damping=0.1, steps=0), start)
    right = (factors * (inputs @ start.t())) @ following.t()
    found = refit_rows(inputs, factors, following, right, start, damping=0.1, steps=5)
    assert torch.allclose(found, start, atol=1e-4)


@pytest.mark.parametrize("dead", ["inputs", "factors", "following"])
def test_what_nothing_depends_on_stays(dead: str) -> None:
    names = ("inputs", "factors", "following", "wanted", "start")
    made = dict(zip(names, problem(0, 30, 4, 5, 3), strict=True))
    made[dead] = torch.zeros_like(made[dead])
    assert torch.equal(refit_rows(**made, damping=0.1, steps=5), made["start"])


def test_tokens_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made = problem(3, 50, 4, 5, 3)
    whole = refit_rows(*made, damping=0.1, steps=5)
    monkeypatch.setattr(bilinear, "AT_ONCE", 7)
    assert torch.allclose(refit_rows(*made, damping=0.1, steps=5), whole, rtol=1e-3, atol=1e-4)


def test_bfloat16_products_come_close_as_well() -> None:
    inputs, factors, following, wanted, start = problem(5, 200, 6, 8, 4)
    pull = lambda_of(inputs, factors, following, 0.1)
    exact, rough = (
        refit_rows(inputs.to(kind), factors.to(kind), following, wanted.to(kind), start, damping=0.1, steps=6)
        for kind in (torch.float32, torch.bfloat16)
    )
    made = (inputs, factors, following, wanted, start)
    before, after = objective(start, made, pull), objective(exact, made, pull)
    assert rough.dtype == torch.float32
    assert objective(rough, made, pull) < after + 0.05 * (before - after)
