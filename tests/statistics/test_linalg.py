import pytest
import torch

from secateur import linalg
from secateur.errors import CalibrationError


def gram(tokens, width, seed=0, dtype=torch.float32):
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x.T @ x).to(dtype)


def nobody(width):
    return torch.zeros(width, dtype=torch.bool)


@pytest.mark.parametrize("width", [1, 3, 16, 40])
@pytest.mark.parametrize("block", [1, 4, 16, 64])
def test_reverse_cholesky_multiplies_back_to_the_matrix(width, block):
    a = gram(2 * width, width, dtype=torch.float64)
    r = a.clone()
    assert linalg.reverse_cholesky_(r, block)
    assert torch.equal(r, r.triu())
    torch.testing.assert_close(r @ r.T, a)


def test_only_the_upper_half_is_read():
    a = gram(20, 12, dtype=torch.float64)
    r, half = a.clone(), a.triu()
    assert linalg.reverse_cholesky_(r, 5)
    assert linalg.reverse_cholesky_(half, 5)
    torch.testing.assert_close(half, r)


@pytest.mark.parametrize("block", [2, 16])
def test_a_matrix_that_is_not_positive_definite_is_reported(block):
    a = gram(20, 6, dtype=torch.float64)
    a[2, 2] = -1.0
    assert not linalg.reverse_cholesky_(a, block)
    assert not linalg.reverse_cholesky_(torch.full((4, 4), float("nan")), block)


@pytest.mark.parametrize("double_limit", [2048, 0])
def test_inverse_blocks_are_those_of_the_factor_of_the_inverse(monkeypatch, double_limit):
    monkeypatch.setattr(linalg, "DOUBLE_LIMIT", double_limit)
    h = gram(60, 30)
    factor = linalg.damped_factor(h, nobody(30), 0.01)
    assert factor.notes == []
    damped = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(30, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)  # U^T U = H^-1
    for start, stop in [(0, 30), (0, 7), (7, 19), (29, 30)]:
        block = linalg.inverse_block(factor, start, stop)
        torch.testing.assert_close(block.double(), u[start:stop, start:stop], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("double_limit", [2048, 0])
def test_damping_is_raised_tenfold_and_reported(monkeypatch, double_limit):
    monkeypatch.setattr(linalg, "DOUBLE_LIMIT", double_limit)
    h = torch.ones(40, 40)
    h[0, 1] = h[1, 0] = 1.5  # eigenvalue near -0.5: damping 0.1 is too little, 1 is enough
    before = h.clone()
    factor = linalg.damped_factor(h, nobody(40), 0.01)
    assert factor.damping == 1.0
    assert factor.notes == ["damping raised from 0.01 to 1: the Gram matrix was not positive definite"]
    assert torch.equal(h, before)
    expected = before + torch.eye(40)
    torch.testing.assert_close(factor.upper @ factor.upper.T, expected)


def test_damping_zero_starts_at_one_hundredth():
    factor = linalg.damped_factor(torch.zeros(3, 3) + 1.0, nobody(3), 0.0)
    assert factor.damping == 0.01


def test_single_precision_is_tried_again_in_double(monkeypatch):
    monkeypatch.setattr(linalg, "DOUBLE_LIMIT", 0)
    # Positive definite in the numbers stored, by less than float32 arithmetic resolves.
    h = torch.full((64, 64), 1.0)
    h.diagonal().add_(2e-7)
    factor = linalg.damped_factor(h, nobody(64), 0.0)
    assert factor.damping == 0.0
    assert factor.notes == []


def test_hopeless_matrix_is_refused():
    with pytest.raises(CalibrationError, match="cannot be factorised"):
        linalg.damped_factor(torch.tensor([[1.0, 9.0], [9.0, 1.0]]), nobody(2), 0.01)


def test_dead_inputs_are_set_apart():
    h = gram(60, 10)
    h[3], h[:, 3] = 0.0, 0.0
    dead = h.diagonal() == 0
    factor = linalg.damped_factor(h, dead, 0.01)
    assert factor.notes == ["1 of 10 inputs are dead (always zero in the calibration data)"]
    others = ~dead
    alone = linalg.damped_factor(h[others][:, others], nobody(9), 0.01)
    torch.testing.assert_close(factor.upper[others][:, others], alone.upper)
    row = factor.upper[3].clone()
    row[3] = 0.0
    assert not row.any()


def test_fewer_tokens_than_inputs_need_no_more_damping():
    factor = linalg.damped_factor(gram(5, 50), nobody(50), 0.01)
    assert factor.damping == 0.01
