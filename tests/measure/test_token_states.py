"""States of tokens against a computation in numpy from the stock model's own outputs; losses against the scorer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from secateur.errors import RunError, UnsupportedModelError
from secateur.measure.scoring import NextTokenScorer
from secateur.measure.token_losses import by_frequency, by_position, frequency_ranks, standard_error
from secateur.measure.token_states import StateReader
from tests.models import calibration_for, tiny_model


def by_hand(model, window):
    """Angle, length and margin of every token but the first, in numpy from hidden states and weights."""
    with torch.no_grad():
        out = model(input_ids=window[None], output_hidden_states=True)
    states = out.hidden_states[-1][0, :-1].numpy().astype(np.float64)  # the last one is after the final norm
    logits = out.logits[0, :-1].numpy().astype(np.float64)
    rows = model.get_output_embeddings().weight.detach().numpy().astype(np.float64)[window[1:]]
    lengths = np.sqrt((states**2).sum(axis=1))
    cosines = (states * rows).sum(axis=1) / lengths / np.sqrt((rows**2).sum(axis=1))
    margins, rivals = [], []
    for row, true in zip(logits, window[1:].tolist(), strict=True):
        others = row.copy()
        others[true] = -np.inf
        margins.append(row[true] - others.max())
        rivals.append(int(others.argmax()))
    return np.degrees(np.arccos(cosines)), lengths, np.array(margins), rivals


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3", "mixtral"])
def test_states_are_those_of_the_hand_made_computation(family):
    model = tiny_model(family)
    window = calibration_for(family, rows=1, length=40)[0]
    found, _ = StateReader(model)(window)
    angle, length, margin, rivals = by_hand(model, window)
    np.testing.assert_allclose(found.angle.numpy(), angle, atol=1e-5)
    np.testing.assert_allclose(found.length.numpy(), length, rtol=1e-5)
    np.testing.assert_allclose(found.margin.numpy(), margin, atol=1e-4)
    assert found.rivals.tolist() == rivals
    assert found.tokens.tolist() == window[1:].tolist()
    scored = torch.ones(1, 40, dtype=torch.bool)
    scored[:, 0] = False
    torch.testing.assert_close(found.loss.float(), NextTokenScorer(model)(window[None], scored))


def test_a_head_with_more_than_its_matrix_is_read_by_its_input():
    model = tiny_model("gemma3", final_logit_softcapping=2.0)
    reader = StateReader(model)
    assert not reader.linear
    window = calibration_for("gemma3", rows=1, length=20)[0]
    found, _ = reader(window)
    angle, length, margin, _ = by_hand(model, window)
    np.testing.assert_allclose(found.angle.numpy(), angle, atol=1e-5)
    np.testing.assert_allclose(found.length.numpy(), length, rtol=1e-5)
    np.testing.assert_allclose(found.margin.numpy(), margin, atol=1e-5)
    with pytest.raises(ValueError, match="not linear"):
        reader(window, [found.length])


def test_scaling_the_final_norm_doubles_lengths_and_leaves_angles():
    model = tiny_model("llama")
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled.model.norm.weight.mul_(2)
    window = calibration_for("llama", rows=1, length=50)[0]
    first, _ = StateReader(model)(window)
    second, _ = StateReader(scaled)(window)
    torch.testing.assert_close(second.length, 2 * first.length, rtol=1e-6, atol=0)
    torch.testing.assert_close(second.angle, first.angle, rtol=0, atol=1e-5)
    assert torch.equal(second.margin > 0, first.margin > 0)  # length alone changes no rank


def test_losses_at_other_lengths_are_those_of_a_model_with_that_norm():
    model = tiny_model("llama")
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled.model.norm.weight.mul_(3)
    window = calibration_for("llama", rows=1, length=30)[0]
    longer, _ = StateReader(scaled)(window)
    own, (same, predicted) = StateReader(model)(window, [StateReader(model)(window)[0].length, longer.length])
    torch.testing.assert_close(same, own.loss, rtol=0, atol=1e-6)
    torch.testing.assert_close(predicted, longer.loss, rtol=1e-5, atol=1e-5)


def test_models_without_next_tokens_and_broken_ones_are_refused():
    for family in ("bert", "t5", "vit"):
        with pytest.raises(UnsupportedModelError):
            StateReader(tiny_model(family))
    model = tiny_model("llama")
    reader = StateReader(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="NaN"):
        reader(torch.arange(3, 20))


def test_ranks_count_down_from_the_most_frequent_with_ties_by_number():
    ranks = frequency_ranks(torch.tensor([5, 2, 5, 2, 5, 0, 1]), 7)
    assert ranks.tolist() == [3, 4, 2, 5, 6, 1, 7]


def test_every_token_is_in_exactly_one_class_and_means_are_those_of_its_members():
    generator = torch.Generator().manual_seed(1)
    dense, pruned = torch.rand(2, 3000, generator=generator, dtype=torch.float64)
    ranks = torch.randint(1, 20_000, (3000,), generator=generator)
    positions = torch.arange(3000) % 300 + 1
    for groups in (by_frequency(dense, pruned, ranks), by_position(dense, pruned, positions)):
        assert sum(group.tokens for group in groups) == 3000
        total = sum(group.tokens * group.difference for group in groups)
        assert total == pytest.approx(float((pruned - dense).sum()))
    last = by_frequency(dense, pruned, ranks)[-1]
    members = ranks.numpy() > 10_000
    assert last.label == "over 10,000"
    assert last.dense == pytest.approx(dense.numpy()[members].mean())
    assert last.difference_stderr == pytest.approx(
        (pruned - dense).numpy()[members].std(ddof=1) / np.sqrt(members.sum())
    )
    labels = [group.label for group in by_position(dense, pruned, positions)]
    assert labels == ["1", "2-3", "4-7", "8-15", "16-31", "32-63", "64-127", "128-255", "256-511"]


def test_one_token_has_no_error():
    assert standard_error(torch.ones(1)) is None
