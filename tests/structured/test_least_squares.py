"""The closed form against direct solutions, and the costs of removal against the objective itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import CalibrationError
from secateur.least_squares import greedy_removal, quadratic


def made(inputs: int, outputs: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Correlated inputs (tokens, in), wanted outputs (tokens, out), and a matrix (out, in), in float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mix
    return x, *(torch.randn(n, m, generator=generator, dtype=torch.float64) for n, m in
                ((tokens, outputs), (outputs, inputs)))  # fmt: skip


def objective(x, y, weight, start, damping):
    """|X W^T - Y|^2 + lambda |W - W0|^2, spelled out."""
    damp = damping * float((x.T @ x).diagonal().mean())
    return float((x @ weight.T - y).square().sum() + damp * (weight - start).square().sum())


sizes = st.tuples(st.integers(3, 9), st.integers(1, 5), st.integers(12, 40), st.integers(0, 1000))


@given(sizes, st.sampled_from([0.01, 0.1]), st.data())
@settings(max_examples=40, deadline=None)
def test_the_refit_is_the_ridge_solution_of_the_kept_columns(size, damping, data):
    inputs, outputs, tokens, seed = size
    x, y, start = made(inputs, outputs, tokens, seed)
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, inputs - 1), min_size=1, max_size=inputs))))
    problem = quadratic(x.T @ x, x.T @ y, start, damping)
    best = problem.best(kept).T
    # Ridge regression as ordinary least squares on stacked rows: no normal equations on this side.
    damp = (damping * float((x.T @ x).diagonal().mean())) ** 0.5
    rows = torch.cat([x[:, kept], damp * torch.eye(inputs, dtype=torch.float64)[:, kept]])
    wanted = torch.cat([y, damp * start.T])
    direct = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(best[:, kept], direct, rtol=1e-6, atol=1e-8)
    gone = [j for j in range(inputs) if j not in kept.tolist()]
    assert not best[:, gone].any()


@given(sizes)
@settings(max_examples=30, deadline=None)
def test_loss_differs_from_the_objective_by_a_constant(size):
    x, y, start = made(*size)
    problem = quadratic(x.T @ x, x.T @ y, start, 0.05)
    other = torch.randn(start.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = problem.loss(other.T) - problem.loss(start.T)
    assert ours == pytest.approx(objective(x, y, other, start, 0.05) - objective(x, y, start, start, 0.05), rel=1e-6)


@given(sizes, st.integers(1, 2), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_unit_that_costs_least_goes_first(size, width, own):
    """Brute force: leave each unit out, refit, and see what the objective becomes."""
    inputs, outputs, tokens, seed = size
    inputs = width * max(2, inputs // width)
    x, y, start = made(inputs, outputs, tokens, seed)
    cross = None if own else x.T @ y
    wanted = x @ start.T if own else y
    columns = torch.arange(inputs).reshape(-1, width)
    stays = greedy_removal(quadratic(x.T @ x, cross, start, 0.02), columns, 1)
    found = []
    for unit in range(len(columns)):
        kept = torch.cat([columns[i] for i in range(len(columns)) if i != unit])
        best = quadratic(x.T @ x, cross, start, 0.02).best(kept).T
        found.append(objective(x, wanted, best, start, 0.02))
    (gone,) = set(range(len(columns))) - set(stays.tolist())
    assert found[gone] == pytest.approx(min(found), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("at_once", [1, 3, 100])
@pytest.mark.parametrize(("parts", "remove"), [(1, 5), (2, 4), (4, 4)])
def test_counts_are_exact_in_every_part(parts, remove, at_once):
    x, y, start = made(12, 3, 60, 0)
    stays = greedy_removal(
        quadratic(x.T @ x, x.T @ y, start, 0.01), torch.arange(12)[:, None], remove, parts=parts, at_once=at_once
    )
    assert stays.tolist() == sorted(stays.tolist())
    left = torch.bincount(stays * parts // 12, minlength=parts)
    assert left.tolist() == [(12 - remove) // parts] * parts


def test_a_copy_of_a_neuron_goes_and_costs_nothing():
    x, _, start = made(6, 4, 50, 3)
    x[:, 4] = x[:, 1]
    problem = quadratic(x.T @ x, None, start, 1e-9)
    stays = greedy_removal(problem, torch.arange(6)[:, None], 1)
    assert set(range(6)) - set(stays.tolist()) <= {1, 4}
    best = problem.best(stays).T
    torch.testing.assert_close(x @ best.T, x @ start.T, rtol=1e-5, atol=1e-5)


def test_damping_is_raised_and_told_or_refused():
    x, y, start = made(6, 2, 30, 0)
    gram = x.T @ x
    shift = float(torch.linalg.eigvalsh(gram)[0]) + 0.005 * float(gram.diagonal().mean())
    problem = quadratic(gram - shift * torch.eye(6, dtype=torch.float64), x.T @ y, start, 0.001)
    assert any("damping raised" in note for note in problem.notes)
    with pytest.raises(CalibrationError, match="cannot be factorised"):
        quadratic(-gram, x.T @ y, start, 0.01)
