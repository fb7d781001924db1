"""What every allocation rule promises. The rules are found, so a new one is tested without being named here."""

import pytest

from secateur import plugins
from secateur.errors import SparsityError

NAMES = list(plugins.available("allocation"))


def test_there_are_rules():
    assert "uniform" in NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.95])
def test_the_weighted_mean_is_the_sparsity_asked_for(name, sparsity):
    rule = plugins.load_class("allocation", name, "allocation")()
    sizes = {"a.weight": 10, "b.weight": 1000, "c.weight": 77}
    shares = rule.allocate(list(sizes), sizes, sparsity)
    assert list(shares) == list(sizes)
    assert all(0 <= share < 1 for share in shares.values())
    assert sum(shares[key] * sizes[key] for key in sizes) / sum(sizes.values()) == pytest.approx(sparsity, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_a_sparsity_outside_the_range_is_refused(name, sparsity):
    rule = plugins.load_class("allocation", name, "allocation")()
    with pytest.raises(SparsityError):
        rule.allocate(["a"], {"a": 10}, sparsity)
