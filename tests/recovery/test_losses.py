"""Values and gradients of the losses against plain autograd in float64, and naive loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.recovery.losses import (
    distillation,
    distillation_and_text,
    feature_distance,
    hidden_distance,
    next_token,
    pooled,
)
from secateur.recovery.teacher import top_logits

UPSTREAM = 3.7
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 90), st.integers(2, 40))


def gradient_of(loss, logits):
    """Value and gradient of 3.7 times a loss, so that a gradient which ignores what comes from above is found."""
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf)
    (UPSTREAM * value).backward()
    return value.detach().double(), leaf.grad.double()


def partition_kl(logits, ids, log_p):
    """KL over k classes and the rest as one, spelled out; differentiable, in the number format of the logits."""
    log_q = logits.log_softmax(-1)
    total = logits.new_zeros(())
    rows = log_q.reshape(-1, log_q.shape[-1])
    for row, chosen, logs in zip(rows, ids.reshape(-1, ids.shape[-1]), log_p.reshape(-1, ids.shape[-1]), strict=True):
        p = logs.exp()
        total = total + (p * (logs - row[chosen])).sum()
        others = torch.ones_like(row, dtype=torch.bool)
        others[chosen] = False
        rest_p = 1 - p.sum()
        if bool(others.any()) and float(rest_p) > 1e-12:
            total = total + rest_p * (rest_p.log() - row[others].logsumexp(0))
    return total / len(rows)


def random_logits(shape, seed, spread=3.0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 1000), ignored=st.floats(0, 1))
def test_next_token_is_cross_entropy(shape, seed, ignored):
    logits = random_logits(shape, seed)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    labels[torch.rand(shape[:-1], generator=generator) < ignored] = -100
    labels.view(-1)[0] = 0

    def reference(z):
        return F.cross_entropy(z.reshape(-1, shape[-1]), labels.reshape(-1), ignore_index=-100)

    value, gradient = gradient_of(lambda z: next_token(z, labels), logits.float())
    expected, expected_gradient = gradient_of(reference, logits)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
    assert not bool(gradient[labels == -100].any())


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 1000), share=st.floats(0.05, 1), ignored=st.floats(0, 1))
def test_distillation_and_text_is_the_sum_of_both(shape, seed, share, ignored):
    logits = random_logits(shape, seed)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    labels[torch.rand(shape[:-1], generator=generator) < ignored] = -100
    labels.view(-1)[0] = 0
    ids, log_p = top_logits(random_logits(shape, seed + 1), max(1, round(share * shape[-1])))

    def reference(z):
        text = F.cross_entropy(z.reshape(-1, shape[-1]), labels.reshape(-1), ignore_index=-100)
        return partition_kl(z, ids, log_p) + text

    value, gradient = gradient_of(lambda z: distillation_and_text(z, labels, ids, log_p), logits.float())
    expected, expected_gradient = gradient_of(reference, logits)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)


def test_next_token_with_nothing_to_predict_is_zero():
    value, gradient = gradient_of(lambda z: next_token(z, torch.full((2, 5), -100)), torch.randn(2, 5, 7))
    assert float(value) == 0
    assert not bool(gradient.any())


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 1000), share=st.floats(0, 1))
def test_distillation_is_the_divergence_over_the_partition(shape, seed, share):
    classes = shape[-1]
    k = 1 + round(share * (classes - 1))
    student, teacher = random_logits(shape, seed), random_logits(shape, seed + 1)
    ids, log_p = top_logits(teacher, k)
    log_p = teacher.log_softmax(-1).gather(-1, ids)
    value, gradient = gradient_of(lambda z: distillation(z, ids, log_p.float()), student.float())
    expected, expected_gradient = gradient_of(lambda z: partition_kl(z, ids, log_p), student)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=2e-6)
    full = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    assert float(value) <= float(full) + 1e-5, "merging classes cannot raise a divergence"
    if k == classes:
        torch.testing.assert_close(value, full, rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 1000), spread=st.floats(0, 20))
def test_distillation_from_rounded_logarithms_is_never_negative(shape, seed, spread):
    """Log-probabilities of a cache are float16: their sum may pass 1, the loss may not fall below 0."""
    teacher = random_logits(shape, seed, spread)
    ids, log_p = top_logits(teacher, max(1, shape[-1] // 2))
    for student in (teacher, random_logits(shape, seed + 1, spread)):
        value, gradient = gradient_of(lambda z: distillation(z, ids, log_p.half()), student.float())
        assert float(value) >= -1e-6
        assert bool(torch.isfinite(gradient).all())


def test_student_that_is_its_teacher_has_nothing_to_learn():
    logits = random_logits((3, 50, 33), 5).float()
    value, gradient = gradient_of(lambda z: distillation(z, *top_logits(logits, 33)), logits)
    assert abs(float(value)) < 1e-6
    assert float(gradient.abs().max()) < 1e-8
    value, gradient = gradient_of(lambda z: distillation(z, *top_logits(logits, 5)), logits)
    assert abs(float(value)) < 1e-6
    assert float(gradient.abs().max()) < 1e-7


def test_teacher_that_is_sure_leaves_no_rest():
    """All mass within the k classes: the rest is no class, and its logits fall as softmax says."""
    student = random_logits((4, 9), 1)
    ids = torch.tensor([[3, 1], [0, 8], [4, 5], [2, 7]])
    log_p = torch.tensor([0.75, 0.25], dtype=torch.float64).log().expand(4, 2)
    value, gradient = gradient_of(lambda z: distillation(z, ids, log_p.float()), student.float())
    target = torch.zeros(4, 9, dtype=torch.float64).scatter(1, ids, log_p.exp())
    q = student.softmax(-1)
    torch.testing.assert_close(gradient, UPSTREAM * (q - target) / 4, rtol=1e-5, atol=1e-7)
    expected = (log_p.exp() * (log_p - q.log().gather(1, ids))).sum(-1).mean()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_student_that_is_sure_of_the_wrong_keeps_finite_gradients():
    student = torch.tensor([[200.0, 0.0, 0.0, -200.0]])
    value, gradient = gradient_of(
        lambda z: distillation(z, torch.tensor([[0]]), torch.tensor([[math.log(0.5)]])), student
    )
    assert 0 < float(value) < 100
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient[0, 0]) == pytest.approx(UPSTREAM * 0.5, rel=1e-3)


@pytest.mark.parametrize("loss", ["next", "top", "whole"])
def test_half_precision_logits(loss):
    rows = 300  # more than are in float32 at one time
    student = random_logits((rows, 21), 1).bfloat16()
    teacher = random_logits((rows, 21), 2)
    labels = torch.randint(21, (rows,), generator=torch.Generator().manual_seed(3))
    ids, log_p = top_logits(teacher, 21 if loss == "whole" else 4)
    ours = {"next": lambda z: next_token(z, labels)}.get(loss, lambda z: distillation(z, ids, log_p.half()))
    reference = {"next": lambda z: F.cross_entropy(z, labels)}.get(loss, lambda z: partition_kl(z, ids, log_p))
    value, gradient = gradient_of(ours, student)
    expected, expected_gradient = gradient_of(reference, student.double())
    assert float(value) == pytest.approx(float(expected), rel=2e-3)
    torch.testing.assert_close(gradient, expected_gradient, rtol=2e-2, atol=1e-5)


def test_hidden_distance_by_loops():
    generator = torch.Generator().manual_seed(0)
    student = [torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) for _ in range(4)]
    teacher = [(10.0**layer) * torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) for layer in range(4)]
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        for row in range(2):
            for token in range(3):
                apart = sum(float(ours[row, token, i] - theirs[row, token, i]) ** 2 for i in range(5))
                total += apart / sum(float(theirs[row, token, i]) ** 2 for i in range(5))
    assert float(hidden_distance(student, teacher)) == pytest.approx(total / 24, rel=1e-5)
    assert float(hidden_distance(teacher, teacher)) == 0
    with pytest.raises(ValueError, match="argument"):
        hidden_distance(student[:3], teacher)


def test_feature_distance_by_loops():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))

    def cosine(a, b):
        return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))

    own = sum(1 - cosine(a, b) for a, b in zip(ours, theirs, strict=True)) / 6
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    between = sum((cosine(ours[i], ours[j]) - cosine(theirs[i], theirs[j])) ** 2 for i, j in pairs) / 30
    assert float(feature_distance(ours, theirs)) == pytest.approx(own + between, rel=1e-5)
    assert float(feature_distance(ours[:1], theirs[:1])) == pytest.approx(1 - cosine(ours[0], theirs[0]), rel=1e-5)
    assert float(feature_distance(3 * theirs, theirs)) == pytest.approx(0, abs=1e-6)  # length does not count


def test_pooled_by_loops():
    states = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])
    states[mask == 0] = 1e6  # what stands at padding must not matter
    for text in range(3):
        count = int(mask[text].sum())
        expected = sum(states[text, token] for token in range(count)) / count
        torch.testing.assert_close(pooled(states, mask)[text], expected)
        assert torch.equal(pooled(states, mask, "cls")[text], states[text, 0])
    assert torch.equal(pooled(states[:1], torch.zeros(1, 4)), torch.zeros(1, 5))
