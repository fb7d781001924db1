"""Perplexity against the definition, written out token by token; refusals with reasons."""

from __future__ import annotations

import math

import pytest
import torch

from secateur.errors import CalibrationError, RunError, UnsupportedModelError
from secateur.measure.perplexity import Perplexity, perplexity
from secateur.measure.scoring import NextTokenScorer
from secateur.progress import Reporter
from tests.models import VOCABULARY, tiny_model

DECODERS = ["llama", "mistral", "qwen3", "gemma3", "phi3", "gpt2", "opt", "gpt_neox", "bloom", "falcon", "mixtral"]


def some_windows(count=3, length=21, seed=0):
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def naive(model, windows):
    """Mean and standard error of the mean, one prefix at a time, in double precision after the model."""
    means = []
    for row in windows:
        losses = []
        for end in range(1, len(row)):
            with torch.no_grad():
                last = model(row[None, :end]).logits[0, -1].double()
            shifted = last - last.max()
            losses.append(float(shifted.exp().sum().log() - shifted[row[end]]))
        means.append(sum(losses) / len(losses))
    mean = sum(means) / len(means)
    variance = sum((value - mean) ** 2 for value in means) / (len(means) - 1)
    return mean, math.sqrt(variance / len(means))


@pytest.mark.parametrize("family", DECODERS)
def test_equals_the_definition(family):
    model = tiny_model(family)
    windows = some_windows()
    mean, error = naive(model, windows)
    for batch in (1, 2, None):
        found = perplexity(model, windows, batch=batch)
        assert found.nll_per_token == pytest.approx(mean, abs=2e-5)
        assert found.stderr == pytest.approx(error, abs=2e-5)
        assert found.tokens == 3 * 20
        assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-4)
        assert found.perplexity_stderr == pytest.approx(math.exp(mean) * error, rel=1e-3)


def test_more_positions_than_are_scored_at_once():
    model = tiny_model("llama", max_position_embeddings=700)
    windows = some_windows(1, 600)
    with torch.no_grad():
        logits = model(windows).logits[0, :-1].double().log_softmax(-1)
    expected = -float(logits.gather(1, windows[0, 1:, None]).mean())
    found = perplexity(model, windows)
    assert found.nll_per_token == pytest.approx(expected, abs=1e-5)
    assert found.stderr is None
    assert found.perplexity_stderr is None


def test_logits_changed_after_the_head_are_not_missed():
    """Where a model does more than apply its output matrix, the model's own logits count."""
    plain, capped = tiny_model("gemma3"), tiny_model("gemma3", final_logit_softcapping=0.5)
    windows = some_windows()
    assert NextTokenScorer(plain).body is not None
    assert NextTokenScorer(capped).body is None
    assert perplexity(capped, windows).nll_per_token == pytest.approx(naive(capped, windows)[0], abs=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_scored_in_fp32(dtype):
    model = tiny_model("llama").to(dtype)
    windows = some_windows()
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].double().log_softmax(-1)
    expected = -float(logits.gather(2, windows[:, 1:, None]).mean())
    assert perplexity(model, windows).nll_per_token == pytest.approx(expected, abs=2e-3)


def test_model_is_left_as_it_was():
    model = tiny_model("llama").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    perplexity(model, some_windows())
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bert", "encoder"),
        ("roberta", "encoder"),
        ("distilbert", "encoder"),
        ("t5", "encoder-decoder"),
        ("vit", "not text"),
    ],
)
def test_models_without_next_token_logits_are_refused_with_the_reason(family, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        perplexity(tiny_model(family), some_windows())


def test_a_body_without_a_head_is_refused():
    with pytest.raises(UnsupportedModelError, match="no language-model head"):
        perplexity(tiny_model("llama").model, some_windows())


def test_tokens_of_another_vocabulary():
    with pytest.raises(CalibrationError, match="outside the model") as caught:
        perplexity(tiny_model("llama"), torch.full((1, 5), VOCABULARY))
    assert str(VOCABULARY) in caught.value.message


def test_nan_is_an_error_not_a_number():
    model = tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(RunError, match="NaN"):
        perplexity(model, some_windows())


def test_a_perplexity_beyond_floats_is_none():
    assert Perplexity(1e6, 1.0, 10, 1.0).perplexity is None
    assert Perplexity(math.inf, None, 10, 1.0).perplexity is None
    assert Perplexity(1e6, 1.0, 10, 1.0).perplexity_stderr is None


def test_progress_is_reported():
    class Counting(Reporter):
        total = done = 0

        def stage(self, name, total):
            self.total = total

        def advance(self, detail=""):
            self.done += 1

    reporter = Counting()
    perplexity(tiny_model("llama"), some_windows(), batch=2, reporter=reporter)
    assert reporter.total == reporter.done == 2
