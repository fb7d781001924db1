"""Least squares on a mask, against direct solves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.refit import masked_least_squares


def problem(rows, columns, seed, density=0.5, tokens=None):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 4 * columns, columns, generator=generator, dtype=torch.float64)
    x = x @ (torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator) / columns**0.5).double()
    gram = x.T @ x
    gram += 0.01 * gram.diagonal().mean() * torch.eye(columns)
    scale = gram.diagonal().sqrt()
    dense = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, columns, generator=generator) < density
    return gram / scale / scale[:, None], dense, mask


def directly(matrix, dense, mask):
    """The best values of each row, one solve a row."""
    best = torch.zeros_like(dense)
    for row in range(len(dense)):
        kept = mask[row].nonzero().squeeze(1)
        if len(kept):
            best[row, kept] = torch.linalg.solve(matrix[kept][:, kept], (matrix @ dense[row])[kept])
    return best


def objective(matrix, difference):
    return float(((difference @ matrix) * difference).sum())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 32), st.integers(0, 99), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_enough_steps_give_the_direct_solution(rows, columns, seed, density):
    matrix, dense, mask = problem(rows, columns, seed, density)
    found = masked_least_squares(matrix, dense @ matrix, mask, dense, 4 * columns, 1e-12)
    torch.testing.assert_close(found, directly(matrix, dense, mask), rtol=1e-6, atol=1e-7)
    assert not found[~mask].any()


@pytest.mark.parametrize("seed", range(3))
def test_no_step_raises_the_objective(seed):
    matrix, dense, mask = problem(8, 40, seed)
    errors = [
        objective(matrix, dense - masked_least_squares(matrix, dense @ matrix, mask, dense * mask, steps))
        for steps in range(12)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(objective(matrix, dense * ~mask))
    assert errors[-1] < 0.8 * errors[0]


def test_rows_do_not_touch_each_other():
    matrix, dense, mask = problem(6, 30, 0)
    mask[2] = True  # done at once: the dense row itself
    together = masked_least_squares(matrix, dense @ matrix, mask, dense * mask, 7)
    alone = [
        masked_least_squares(matrix, dense[i : i + 1] @ matrix, mask[i : i + 1], (dense * mask)[i : i + 1], 7)
        for i in range(6)
    ]
    torch.testing.assert_close(together, torch.cat(alone))
    assert torch.equal(together[2], dense[2])


def test_the_arguments_stay_as_they_were():
    matrix, dense, mask = problem(4, 16, 1)
    wanted = dense @ matrix
    copies = [one.clone() for one in (matrix, wanted, mask, dense)]
    masked_least_squares(matrix, wanted, mask, dense, 5)
    assert all(torch.equal(a, b) for a, b in zip((matrix, wanted, mask, dense), copies, strict=True))
