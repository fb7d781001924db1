"""What every criterion for experts promises. They are found, so a new one is tested without being named here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from secateur import plugins
from secateur.plugins import ExpertCriterion, Experts, make_expert_criterion

NAMES = list(plugins.available("expert_criteria"))
ROOT = Path(__file__).resolve().parents[2]


def experts() -> Experts:
    """Six experts, the last of which no token reached."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.tensor([9, 4, 7, 3, 8, 0], dtype=torch.float64)
    outputs = torch.rand(6, generator=generator, dtype=torch.float64) * tokens
    return Experts(tokens, outputs, 1 + torch.rand(6, generator=generator, dtype=torch.float64))


def test_there_are_criteria():
    assert {"reap", "frequency", "magnitude"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_one_finite_number_for_each_and_nothing_is_changed(name):
    given, fresh = experts(), experts()
    criterion = make_expert_criterion(name)
    assert isinstance(criterion, ExpertCriterion)
    assert isinstance(criterion.data, bool)
    first, second = (criterion.score(given) for _ in range(2))
    assert first.shape == (6,)
    assert bool(first.isfinite().all())
    assert torch.equal(first, second)
    for field in ("tokens", "outputs", "squares"):
        assert torch.equal(getattr(given, field), getattr(fresh, field)), field


@pytest.mark.parametrize("name", NAMES)
def test_what_looks_at_tokens_lets_an_unused_expert_go_first(name):
    criterion = make_expert_criterion(name)
    if criterion.data:
        assert int(criterion.score(experts()).argmin()) == 5


def test_reap_is_the_mean_over_the_tokens_of_each():
    given = experts()
    score = make_expert_criterion("reap").score(given)
    assert score[:5].tolist() == (given.outputs[:5] / given.tokens[:5]).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_it_has_a_row_in_the_documents(name):
    assert f"[`{name}`](#{name})" in (ROOT / "docs" / "experts.md").read_text(encoding="utf-8")
