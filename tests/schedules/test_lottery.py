"""Lottery tickets: exact counts in each round, weights and learning rate rewound, a new optimiser."""

from __future__ import annotations

import itertools

import pytest
import torch

from secateur.errors import SparsityError, UsageError
from secateur.schedules import make_schedule
from secateur.schedules.lottery import Lottery, repeat, round_sparsity


def test_rounds_prune_the_smallest_and_rewind_the_rest(loop):
    run = loop(Lottery(sparsity=0.8, rounds=4, rewind=2), shapes=((6, 10), (4, 5)), steps=40)
    saved = None
    for step in range(1, 41):
        before = {n: p.detach().clone() for n, p in run.parameters.items()}
        # What the step will make of the weights, without the schedule.
        old = {n: m.clone() for n, m in run.pruner.pruned.items()}
        changed = run.advance()
        assert changed == (step in (10, 20, 30))
        if step == 2:
            saved = {n: p.detach().clone() for n, p in run.parameters.items()}
        if not changed:
            continue
        sparsity = 1 - 0.2 ** (step / 30)
        for name, parameter in run.parameters.items():
            mask = run.pruner.pruned[name]
            assert torch.equal(parameter.detach(), saved[name].masked_fill(mask, 0))
            assert int(mask.sum()) == round(sparsity * parameter.numel())
            assert bool((mask | ~old[name]).all())
            inputs, outputs = run.data(step)
            weight = before[name].clone().requires_grad_()
            ((inputs[name] @ weight.T - outputs[name]) ** 2).mean().backward()
            trained = before[name] - run.optimizer.param_groups[0]["lr"] * weight.grad.masked_fill(old[name], 0)
            assert trained[mask].abs().max() <= trained[~mask].abs().min()
    assert {n: int(m.sum()) for n, m in run.pruner.pruned.items()} == {"w0": 48, "w1": 16}


def test_the_same_share_goes_each_round_and_the_last_is_exact():
    shares = [1 - round_sparsity(0.2, 0.9, r / 5) for r in range(6)]
    ratios = [after / before for before, after in itertools.pairwise(shares)]
    assert ratios == pytest.approx([ratios[0]] * 5)
    assert shares[0] == pytest.approx(0.8)
    assert round_sparsity(0.2, 0.9, 1.0) == 0.9


def test_the_optimiser_starts_anew(loop):
    run = loop(Lottery(sparsity=0.5, rounds=2, rewind=0), steps=6)
    run.optimizer.param_groups[0]["momentum"] = 0.9
    run.advance()
    assert "momentum_buffer" in run.optimizer.state[run.parameters["w0"]]
    run.advance()
    run.advance()
    assert len(run.optimizer.state) == 0


def test_every_round_sees_the_whole_learning_rate_schedule(loop):
    run = loop(Lottery(sparsity=0.5, rounds=3), steps=12)
    seen = []
    for _ in range(12):
        seen.append(run.optimizer.param_groups[0]["lr"])
        run.advance()
        run.scheduler.step()
    assert seen == pytest.approx([0.1 * factor for factor in (1.0, 0.75, 0.5, 0.25)] * 3)
    run.pruner.finish()
    run.scheduler.last_epoch = 3
    assert run.scheduler.get_lr() == pytest.approx([0.1 * 0.75])  # as the user made it


def test_rounds_of_unequal_length_begin_at_the_start_of_the_schedule():
    repeated = repeat(lambda step: step / 10, [0, 3, 6], 10)
    assert [repeated(step) for step in range(10)] == [0, 0.3, 0.6, 0, 0.3, 0.6, 0, 0.2, 0.5, 0.7]


def test_another_learning_rate_schedule_goes_on_with_a_warning(loop):
    run = loop(Lottery(sparsity=0.5, rounds=2), steps=6)
    object.__setattr__(run.training, "scheduler", torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.9))
    with pytest.warns(UserWarning, match="ExponentialLR"):
        Lottery(sparsity=0.5, rounds=2).start(run.training)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sparsity": 1},
        {"sparsity": 0.5, "rounds": 0},
        {"sparsity": 0.5, "rounds": 1},
        {"sparsity": 0.5, "rewind": -1},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(UsageError):
        make_schedule("lottery", options)


def test_what_does_not_fit_the_training_is_refused(loop):
    with pytest.raises(UsageError, match="too few"):
        loop(Lottery(sparsity=0.5, rounds=20), steps=10)
    with pytest.raises(UsageError, match="too few"):
        loop(Lottery(sparsity=0.5, rounds=5, rewind=3), steps=10)
    with pytest.raises(SparsityError, match="sparser"):
        loop(Lottery(sparsity=0.5), zeros={"w0": torch.ones(4, 6, dtype=torch.bool)})
