import pytest
import torch

from secateur.errors import UsageError
from secateur.methods import sparsegpt as module
from secateur.methods.sparsegpt import SparseGPT
from secateur.methods.wanda import Wanda
from secateur.patterns import parse_pattern
from secateur.plugins import Target
from secateur.statistics import InputStatistics
from tests.methods.problems import output_error, problem, solve
from tests.oracles import obs


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.8])
@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "block", "dead"),
    [
        (8, 24, 100, 8, ()),
        (8, 24, 100, 7, ()),  # the last block is smaller
        (5, 40, 200, 128, ()),  # a single block, with a second strip
        (16, 70, 300, 64, (0, 5, 69)),
        (12, 30, 10, 10, ()),  # fewer tokens than inputs
        (1, 16, 50, 4, (3,)),
    ],
)
def test_equals_surgery_column_by_column(rows, columns, tokens, block, dead, sparsity):
    for seed in range(3):
        weight, x, stats = problem(rows, columns, tokens, seed, dead)
        solved = solve(SparseGPT(block_size=block), weight, stats, Target(sparsity))
        expected, mask, loss = obs.sparsegpt(weight, x, sparsity=sparsity, block_size=block)
        assert torch.equal(solved.mask, mask)
        torch.testing.assert_close(solved.weight.double(), expected, rtol=1e-3, atol=1e-4)
        assert solved.loss == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize(("pattern", "columns"), [("2:4", 24), ("1:4", 24), ("4:8", 40), ("2:3", 30), ("9:12", 36)])
def test_groups_equal_surgery_column_by_column(pattern, columns):
    parsed = parse_pattern(pattern)
    for seed in range(3):
        weight, x, stats = problem(6, columns, 120, seed, dead=(2,))
        expected, mask, loss = obs.sparsegpt(weight, x, keep=parsed.keep, group=parsed.group)
        for block in (1, 16, 128, columns):  # groups choose their own mask, so the block changes nothing
            solved = solve(SparseGPT(block_size=block), weight, stats, Target(parsed.sparsity, parsed))
            assert torch.equal(solved.mask, mask)
            torch.testing.assert_close(solved.weight.double(), expected, rtol=1e-3, atol=1e-4)
            assert solved.loss == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("strip", [1, 5, 64])
def test_the_length_of_a_strip_changes_nothing(monkeypatch, strip):
    weight, x, stats = problem(8, 64, 200)
    monkeypatch.setattr(module, "_STRIP", strip)
    solved = solve(SparseGPT(block_size=48), weight, stats, Target(0.5))
    expected, mask, _ = obs.sparsegpt(weight, x, sparsity=0.5, block_size=48)
    assert torch.equal(solved.mask, mask)
    torch.testing.assert_close(solved.weight.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_loss_is_the_error_of_the_outputs(pattern):
    weight, x, stats = problem(20, 160, 500)
    solved = solve(SparseGPT(), weight, stats, Target(0.5, parse_pattern(pattern)))
    assert solved.loss == pytest.approx(output_error(x, weight, solved.weight), rel=1e-3)


def test_is_better_than_the_same_share_without_update():
    for seed in range(3):
        weight, x, stats = problem(40, 160, 500, seed)
        for pattern in ("unstructured", "2:4"):
            target = Target(0.5, parse_pattern(pattern))
            ours = solve(SparseGPT(), weight, stats, target)
            wanda = solve(Wanda(), weight, stats, target)
            error = output_error(x, weight, ours.weight)
            assert error < 0.8 * output_error(x, weight, wanda.weight)
            assert error < output_error(x, weight, weight * ours.mask)  # the update pays


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_independent_inputs_leave_the_kept_weights_alone(pattern):
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    stats = InputStatistics(32, "gram")
    stats.update(torch.diag(torch.rand(32) + 0.5))
    target = Target(0.5, parse_pattern(pattern))
    ours = solve(SparseGPT(damping=0.0), weight, stats, target)
    wanda = solve(Wanda(), weight, stats, target)  # a block of one row is a row
    assert torch.equal(ours.mask, wanda.mask)
    torch.testing.assert_close(ours.weight, wanda.weight)


def test_last_columns_of_a_duplicated_input_carry_what_was_pruned():
    # Inputs 0 and 1 are the same: pruning weight 0 is free when weight 1 takes it over.
    x = torch.randn(100, 1, generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    stats = InputStatistics(2, "gram")
    stats.update(x)
    solved = solve(SparseGPT(damping=1e-6), torch.tensor([[0.4, 0.6]]), stats, Target(0.5))
    torch.testing.assert_close(solved.weight, torch.tensor([[0.0, 1.0]]), rtol=1e-4, atol=0)
    assert solved.loss < 1e-3


def test_more_dead_inputs_than_zeros_keep_their_weights():
    weight, _, stats = problem(4, 16, 60, dead=range(12))
    solved = solve(SparseGPT(), weight, stats, Target(0.25))
    assert int((~solved.mask).sum()) == 16
    assert torch.equal(solved.weight[:, 12:], weight[:, 12:])
    assert torch.equal(solved.weight[solved.mask], weight[solved.mask])
    assert solved.loss == pytest.approx(0.0, abs=1e-6)


def test_raised_damping_is_told():
    weight, _, stats = problem(4, 16, 60)
    stats._lower[0, 1] = stats._lower[1, 0] = 1.2 * float(stats._lower[:2, :2].diagonal().mean())
    solved = solve(SparseGPT(), weight, stats, Target(0.5))
    assert any(note.startswith("damping raised from 0.01 to") for note in solved.notes)
    assert solved.weight.isfinite().all()


@pytest.mark.parametrize("options", [{"block_size": 0}, {"damping": -0.1}, {"damping": 1.5}, {"damping": float("nan")}])
def test_bad_options_are_refused(options):
    with pytest.raises(UsageError):
        SparseGPT(**options)
