"""The correction of earlier errors against a direct solve, and the choice of its share against a search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.correction import DAMPING, Drift
from secateur.errors import CalibrationError
from secateur.statistics import InputStatistics


def inputs(seed: int, tokens: int, width: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What arrives, and what the dense model has."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator)
    dense = torch.randn(tokens, width, generator=generator) @ mixed
    return dense + noise * torch.randn(tokens, width, generator=generator) @ mixed.roll(1, 0), dense


def gathered(x: torch.Tensor, dense: torch.Tensor, held: int) -> tuple[InputStatistics, Drift]:
    stats, drift = InputStatistics(x.shape[1], "gram"), Drift(x.shape[1], held_out=held > 0)
    stats.update(x)
    cut = len(x) - held
    drift.update(x[:cut], dense[:cut])
    if held:
        drift.update(x[cut:], dense[cut:], held_out=True)
    return stats, drift


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(3, 60), st.integers(1, 9), st.integers(1, 7), st.sampled_from([0.0, 0.3, 1.0]))
def test_the_weights_are_those_of_a_direct_solve(seed: int, tokens: int, width: int, rows: int, noise: float) -> None:
    x, dense = inputs(seed, tokens, width, noise)
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed + 1))
    stats, drift = gathered(x, dense, 0)
    made, beta = drift.corrected(weight, stats, 1.0)
    assert beta == 1.0
    # Ridge regression as one least-squares problem in float64: rows of sqrt(lambda)·I pull towards W.
    X, wanted = x.double(), (dense.double() @ weight.double().t())
    pull = (DAMPING * (X.t() @ X).diagonal().mean()).sqrt() * torch.eye(width, dtype=torch.float64)
    best = torch.linalg.lstsq(torch.cat([X, pull]), torch.cat([wanted, pull @ weight.double().t()])).solution.t()
    torch.testing.assert_close(made.double(), best, rtol=2e-3, atol=2e-3 * float(best.abs().max()))


def test_without_drift_nothing_changes() -> None:
    x, _ = inputs(0, 64, 8, 0.0)
    stats, drift = gathered(x, x, 16)
    weight = torch.randn(5, 8)
    for beta in (None, 0.0, 0.5, 1.0):
        assert torch.equal(drift.corrected(weight, stats, beta)[0], weight)


def test_no_share_is_the_dense_weight() -> None:
    stats, drift = gathered(*inputs(1, 64, 8, 0.5), 0)
    weight = torch.randn(5, 8)
    assert torch.equal(drift.corrected(weight, stats, 0.0)[0], weight)


@pytest.mark.parametrize("seed", range(6))
def test_the_share_is_the_best_of_many_on_tokens_held_out(seed: int) -> None:
    tokens, held = 40, 12
    x, dense = inputs(seed, tokens + held, 16, 0.7)
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))
    stats, drift = gathered(x, dense, held)
    _, beta = drift.corrected(weight, stats, None)
    fitted, drift_of_fitted = gathered(x[:tokens], dense[:tokens], 0)
    wanted = dense[tokens:] @ weight.t()
    errors = {}
    for hundredths in range(101):
        made, _ = drift_of_fitted.corrected(weight, fitted, hundredths / 100)
        errors[hundredths / 100] = float((x[tokens:] @ made.t() - wanted).square().sum())
    assert beta == pytest.approx(min(errors, key=errors.__getitem__), abs=0.011)


def test_a_share_that_harms_is_none() -> None:
    """Where the drift of the tokens held out is the opposite of the others', nothing is taken."""
    x, dense = inputs(3, 64, 8, 0.5)
    flipped = torch.cat([dense[:48], 2 * x[48:] - dense[48:]])
    stats, drift = gathered(x, flipped, 16)
    assert drift.corrected(torch.randn(5, 8), stats, None)[1] < 0.2


def test_matrices_with_one_input_do_not_hang_on_order() -> None:
    stats, drift = gathered(*inputs(4, 64, 8, 0.5), 16)
    first, second = torch.randn(5, 8), torch.randn(3, 8)
    one = drift.corrected(first, stats, None)[0]
    drift.corrected(second, stats, None)
    assert torch.equal(one, drift.corrected(first, stats, None)[0])


def test_more_tokens_after_a_solve_count() -> None:
    x, dense = inputs(5, 64, 8, 0.5)
    stats, drift = gathered(x[:32], dense[:32], 0)
    weight = torch.randn(5, 8)
    drift.corrected(weight, stats, 1.0)
    stats.update(x[32:])
    drift.update(x[32:], dense[32:])
    whole = gathered(x, dense, 0)
    torch.testing.assert_close(drift.corrected(weight, stats, 1.0)[0], whole[1].corrected(weight, whole[0], 1.0)[0])


def test_what_does_not_fit_is_refused() -> None:
    drift = Drift(4, held_out=False)
    with pytest.raises(ValueError, match="inputs are"):
        drift.update(torch.zeros(3, 4), torch.zeros(2, 4))
    drift.update(torch.ones(3, 4), torch.ones(3, 4))
    with pytest.raises(ValueError, match="kind 'gram'"):
        drift.corrected(torch.ones(2, 4), InputStatistics(4, "norms"), 1.0)
    stats = InputStatistics(4, "gram")
    stats.update(torch.ones(3, 4))
    with pytest.raises(ValueError, match="no tokens were held out"):
        drift.corrected(torch.ones(2, 4), stats, None)


def test_a_gram_matrix_of_nan_is_an_error() -> None:
    stats, drift = gathered(*inputs(6, 16, 4, 0.5), 0)
    assert stats.gram is not None
    stats.gram.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="cannot be factorised"):
        drift.corrected(torch.ones(2, 4), stats, 1.0)


@pytest.mark.parametrize("kind", ["one token", "dead inputs", "bfloat16"])
def test_odd_inputs_give_finite_weights(kind: str) -> None:
    x, dense = inputs(7, 1 if kind == "one token" else 32, 8, 0.5)
    if kind == "dead inputs":
        x[:, :3] = 0
        dense[:, :3] = 0
    if kind == "bfloat16":
        x, dense = x.bfloat16(), dense.bfloat16()
    stats, drift = gathered(x, dense, 0)
    made, _ = drift.corrected(torch.randn(5, 8), stats, 1.0)
    assert bool(made.isfinite().all())
