"""Movement pruning against a hand-computed example and against autograd through a mask (straight-through)."""

from __future__ import annotations

import pytest
import torch

from secateur.errors import UsageError
from secateur.schedules import make_schedule
from secateur.schedules._scored import score_gradient
from secateur.schedules.movement import Movement, movement_mask
from secateur.schedules.soft_movement import SoftMovement


class StraightThrough(torch.autograd.Function):
    """A mask that passes the gradient on as if it were the score."""

    @staticmethod
    def forward(ctx, score, mask):
        return mask.to(score.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def naive_mask(score, sparsity):
    """Keep-mask by a stable sort: of equal scores the first goes first."""
    order = score.flatten().argsort(stable=True)
    keep = torch.ones(score.numel(), dtype=torch.bool)
    keep[order[: round(sparsity * score.numel())]] = False
    return keep.reshape(score.shape)


def test_scores_of_a_hand_computed_example():
    """One input (1, 2), target 0, loss y₁² + y₂²: y = (1·1 + 2·2, 3 - 2) = (5, 1), ∂L/∂W = 2·y·xᵀ."""
    weight = torch.tensor([[1.0, 2.0], [3.0, -1.0]], requires_grad=True)
    ((weight @ torch.tensor([1.0, 2.0])) ** 2).sum().backward()
    assert weight.grad.tolist() == [[10.0, 20.0], [2.0, 4.0]]
    assert (-score_gradient(weight.grad, weight.detach())).tolist() == [[-10.0, -40.0], [-6.0, 4.0]]
    assert movement_mask(torch.tensor([[-10.0, -40.0], [-6.0, 4.0]]), 0.5).tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_masks_and_weights_are_those_of_autograd_through_the_mask(loop, scope):
    steps, rate = 40, 0.05
    schedule = Movement(sparsity=0.6, begin=0.1, end=0.6, scope=scope)
    run = loop(schedule, shapes=((5, 6), (3, 4)), steps=steps, rate=rate)
    full = {n: p.detach().clone().requires_grad_() for n, p in run.parameters.items()}
    scores = {n: torch.zeros_like(p, requires_grad=True) for n, p in full.items()}
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in full.items()}
    returned = 0
    for step in range(1, steps + 1):
        run.loss({n: full[n] * StraightThrough.apply(scores[n], masks[n]) for n in full}, step).backward()
        with torch.no_grad():
            # The product with the mask has masked the gradient of the weights; the scores have all of theirs.
            for name in full:
                full[name] -= rate * full[name].grad
                scores[name] -= scores[name].grad
                full[name].grad = scores[name].grad = None
            sparsity = 0.6 - 0.6 * (1 - min(max((step - 4) / 20, 0), 1)) ** 3
            if scope == "global":
                joined = naive_mask(torch.cat([scores[n].flatten() for n in full]), sparsity)
                new = {
                    n: m.reshape(full[n].shape)
                    for n, m in zip(full, joined.split([p.numel() for p in full.values()]), strict=True)
                }
            else:
                new = {n: naive_mask(scores[n], sparsity) for n in full}
            returned += sum(int((new[n] & ~masks[n]).sum()) for n in full)
            masks = new
        run.advance()
        for name, parameter in run.parameters.items():
            assert torch.equal(run.pruner.pruned[name], ~masks[name]), (step, name)
            torch.testing.assert_close(parameter.detach(), full[name].detach() * masks[name], rtol=1e-5, atol=1e-6)
    assert returned > 0  # the example is one where weights come back


def test_soft_movement_is_autograd_and_torch_s_adam(loop):
    steps, rate = 60, 0.02
    schedule = SoftMovement(penalty=2.0, threshold=0.4, learning_rate=0.05, begin=0.1, end=0.5)
    run = loop(schedule, shapes=((5, 6), (3, 4)), steps=steps, rate=rate)
    full = {n: p.detach().clone().requires_grad_() for n, p in run.parameters.items()}
    scores = {n: torch.zeros_like(p, requires_grad=True) for n, p in full.items()}
    adam = torch.optim.Adam(scores.values(), lr=0.05)
    changes = 0
    before = None
    for step in range(1, steps + 1):
        masks = {n: torch.sigmoid(s) > 0.4 for n, s in scores.items()}
        loss = run.loss({n: full[n] * StraightThrough.apply(scores[n], masks[n]) for n in full}, step)
        grown = 1 - (1 - min(max((step - 6) / 24, 0), 1)) ** 3
        loss = loss + 2.0 * grown * torch.cat([torch.sigmoid(s).flatten() for s in scores.values()]).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            for weight in full.values():
                weight -= rate * weight.grad
                weight.grad = None
        run.advance()
        for name, parameter in run.parameters.items():
            torch.testing.assert_close(run.pruner.scores[name], scores[name].detach(), rtol=1e-3, atol=1e-4)
            keep = torch.sigmoid(scores[name]) > 0.4
            assert torch.equal(run.pruner.pruned[name], ~keep), (step, name)
            torch.testing.assert_close(parameter.detach(), full[name].detach() * keep, rtol=1e-4, atol=1e-5)
        pruned = torch.cat([m.flatten() for m in run.pruner.pruned.values()])
        changes += before is not None and int((before & ~pruned).sum())
        before = pruned
    assert 0 < int(before.sum()) < before.numel()
    assert changes > 0  # some weights came back


def test_more_penalty_prunes_more(loop):
    zeros = []
    for penalty in (1.0, 30.0):
        run = loop(SoftMovement(penalty=penalty, threshold=0.4, learning_rate=0.05), steps=30)
        for _ in range(30):
            run.advance()
        zeros.append(int(run.pruner.pruned["w0"].sum()))
    assert zeros[0] < zeros[1]


def test_an_overflow_leaves_the_scores_alone(loop):
    run = loop(Movement(sparsity=0.5), shapes=((2, 3), (2, 3)))
    run.advance()
    before = {n: s.clone() for n, s in run.pruner.scores.items()}
    assert bool((before["w0"] != 0).any())
    for parameter in run.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    run.parameters["w1"].grad[0, 0] = float("inf")
    run.pruner.before_step(2)
    assert all(torch.equal(run.pruner.scores[n], before[n]) for n in before)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("movement", {}),
        ("movement", {"sparsity": 1.0}),
        ("movement", {"sparsity": 0.5, "begin": 0.9}),
        ("movement", {"sparsity": 0.5, "every": 0}),
        ("movement", {"sparsity": 0.5, "scope": "model"}),
        ("soft-movement", {"threshold": 0.5}),
        ("soft-movement", {"penalty": 0}),
        ("soft-movement", {"learning_rate": -1}),
        ("soft-movement", {"sparsity": 0.5}),
    ],
)
def test_bad_options_are_refused(name, options):
    with pytest.raises(UsageError):
        make_schedule(name, options)


@pytest.mark.parametrize("schedule", [Movement(sparsity=0.5), SoftMovement()])
def test_frozen_matrices_are_refused(loop, schedule):
    run = loop(schedule)
    run.parameters["w0"].requires_grad_(False)
    with pytest.raises(UsageError, match="w0 is frozen"):
        schedule.start(run.training)
