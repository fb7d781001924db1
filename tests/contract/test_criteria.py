"""What every criterion promises. The criteria are found, so a new one is tested without being named here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from secateur import plugins
from secateur.errors import SecateurError
from secateur.least_squares import quadratic
from secateur.plugins import Criterion, Units, make_criterion

NAMES = list(plugins.available("criteria"))
ROOT = Path(__file__).resolve().parents[2]


def units(size: int = 1, parts: int = 1, *, equal: bool = False, spoiled: bool = False) -> Units:
    """Twelve inputs in units of ``size``, five outputs, forty tokens."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 12, generator=generator, dtype=torch.float64) @ torch.randn(
        12, 12, generator=generator, dtype=torch.float64
    )
    weight = torch.randn(5, 12, generator=generator)
    if equal:
        x, weight = torch.eye(12, dtype=torch.float64).repeat(4, 1), torch.ones(5, 12)
    gram = (x.T @ x).float()
    problem = quadratic(gram, None, weight, 0.01)
    if spoiled:
        weight = weight.clone()
        weight[0, 0] = torch.nan
    columns = torch.arange(12).reshape(-1, size)
    feeding = torch.ones(len(columns)) if equal else torch.rand(len(columns), generator=generator)
    salience = weight.square().sum(0)[columns].sum(1)
    return Units(weight, columns, feeding, gram, x.sum(0).float(), float(len(x)), problem, parts, salience)


def test_there_are_criteria():
    assert {"mixed", "obs", "magnitude", "wanda", "flap", "taylor"} <= set(NAMES)


@pytest.mark.parametrize(("size", "parts", "same"), [(1, 1, "wanda"), (2, 1, "obs"), (2, 2, "obs"), (4, 1, "obs")])
def test_mixed_takes_wanda_for_single_columns_and_obs_for_several(size, parts, same):
    chosen = units(size, parts)
    assert torch.equal(make_criterion("mixed").choose(chosen, 2), make_criterion(same).choose(chosen, 2))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("size", "parts", "remove"), [(1, 1, 5), (1, 3, 6), (2, 1, 2), (2, 2, 2), (4, 1, 1), (1, 1, 0)]
)
def test_the_count_is_exact_in_every_part(name, size, parts, remove):
    criterion = make_criterion(name)
    assert isinstance(criterion, Criterion)
    assert isinstance(criterion.data, bool)
    chosen = units(size, parts)
    stays = criterion.choose(chosen, remove)
    count = len(chosen.columns)
    assert stays.tolist() == sorted(set(stays.tolist()))
    left = torch.bincount(stays * parts // count, minlength=parts)
    assert left.tolist() == [(count - remove) // parts] * parts


@pytest.mark.parametrize("name", NAMES)
def test_the_same_twice_and_nothing_is_changed(name):
    given, fresh = units(), units()
    first, second = (make_criterion(name).choose(given, 4) for _ in range(2))
    assert torch.equal(first, second)
    for field in ("weight", "columns", "feeding", "gram", "sums", "salience"):
        assert torch.equal(getattr(given, field), getattr(fresh, field)), field
    for field in ("gram", "target", "start"):
        assert torch.equal(getattr(given.problem, field), getattr(fresh.problem, field)), field


@pytest.mark.parametrize("name", NAMES)
def test_of_equal_units_the_lower_number_goes_first(name):
    assert make_criterion(name).choose(units(equal=True), 5).tolist() == list(range(5, 12))


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"obs"}))
def test_a_weight_that_is_no_number_is_refused(name):
    """OBS looks at the least-squares problem, whose factorisation refuses it before."""
    with pytest.raises(SecateurError):
        make_criterion(name).choose(units(spoiled=True), 4)


@pytest.mark.parametrize("name", NAMES)
def test_it_has_a_row_in_the_documents(name):
    assert f"[`{name}`](#{name})" in (ROOT / "docs" / "structured.md").read_text(encoding="utf-8")
