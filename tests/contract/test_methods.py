"""What every pruning method promises. The methods are found, so a new one is tested without being named here."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import secateur.methods
from secateur import plugins
from secateur.errors import PatternError, UnknownNameError, WeightValueError
from secateur.patterns import parse_pattern
from secateur.plugins import Target
from secateur.statistics import InputStatistics

NAMES = list(plugins.available("methods"))
SHAPES = [(1, 8), (6, 8), (5, 40), (30, 152)]  # the last is wider than one block of sparsegpt
SPARSITIES = [0.1, 0.25, 0.5, 0.625, 0.9]
PATTERNS = ["1:2", "2:4", "1:4", "3:4", "4:8", "5:8"]

every_method = pytest.mark.parametrize("name", NAMES)


def test_every_file_is_a_method():
    files = {path.stem for path in Path(secateur.methods.__file__).parent.glob("[!_]*.py")}
    assert files == {name.replace("-", "_") for name in NAMES}
    assert {"random", "magnitude", "wanda", "sparsegpt"} <= files


def matrix(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[1] ** 0.5


def statistics(method, width, *, tokens=64, dead=(), seed=1):
    if method.statistics == "none":
        return None
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    x = x + x @ torch.randn(width, width, generator=generator) / width**0.5
    x[:, list(dead)] = 0.0
    stats = InputStatistics(width, method.statistics)
    stats.update(x)
    return stats


def solve(name, weight, target, *, seed=0, **kwargs):
    method = plugins.make_method(name)
    stats = statistics(method, weight.shape[1], **kwargs)
    return method.solve(weight, stats, target, generator=torch.Generator().manual_seed(seed))


def zeros(mask):
    return int((~mask).sum())


def allowed_counts(shape, sparsity):
    """Zeros of a matrix when each comparison group has an exact count: whole matrix, rows, or blocks of columns."""
    rows, columns = shape
    blocks = [min(128, columns - start) for start in range(0, columns, 128)]
    return {
        round(sparsity * rows * columns),
        rows * round(sparsity * columns),
        sum(round(sparsity * rows * width) for width in blocks),
    }


@every_method
def test_says_what_it_needs_and_is_described(name):
    cls = plugins.load_class("methods", name, "method")
    assert cls.statistics in ("none", "norms", "gram")
    assert isinstance(cls(), plugins.Method)
    description = plugins.describe("methods", name, "method")
    assert len(description.doc) > 200
    assert all(option.help for option in description.options)
    assert "Raises:" in cls.solve.__doc__


@every_method
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_sparsity_zero_is_the_identity(name, pattern):
    weight = matrix((6, 24))
    weight[2] = 0.0
    weight[3, 5] = -0.0
    solved = solve(name, weight, Target(0.0, parse_pattern(pattern)), dead=[1, 2, 3])
    assert torch.equal(solved.weight.view(torch.int32), weight.view(torch.int32))
    assert solved.mask.all()
    assert solved.weight.data_ptr() != weight.data_ptr()


@every_method
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_counts_are_exact_and_pruned_weights_are_plain_zeros(name, shape, sparsity):
    weight = matrix(shape)
    solved = solve(name, weight, Target(sparsity))
    assert solved.weight.dtype == torch.float32
    assert solved.mask.dtype == torch.bool
    assert solved.weight.shape == solved.mask.shape == weight.shape
    assert solved.weight.is_contiguous()
    assert zeros(solved.mask) in allowed_counts(shape, sparsity)
    assert int((solved.weight == 0).sum()) == zeros(solved.mask)  # the dense matrix has no zeros of its own
    assert not solved.weight[~solved.mask].view(torch.int32).any()  # no negative zeros
    assert solved.weight.isfinite().all()


@every_method
@pytest.mark.parametrize("shape", SHAPES)
def test_a_given_count_is_met_exactly(name, shape):
    weight = matrix(shape)
    for count in (0, 1, weight.numel() // 3, weight.numel() - 1, weight.numel()):
        solved = solve(name, weight, Target(0.5, count=count))
        assert zeros(solved.mask) == count


@every_method
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dead", [(), (0, 1, 2, 3, 9)])
def test_every_group_keeps_n_of_m(name, pattern, dead):
    parsed = parse_pattern(pattern)
    for shape in SHAPES:
        solved = solve(name, matrix(shape), Target(parsed.sparsity, parsed), dead=[d for d in dead if d < shape[1]])
        assert (solved.mask.reshape(-1, parsed.group).sum(dim=1) == parsed.keep).all()
        assert torch.equal(solved.weight != 0, solved.mask)


@every_method
@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 20), st.floats(0, 0.99), st.integers(0, 9))
def test_ties_and_zero_weights_keep_the_count(name, rows, columns, sparsity, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-2, 3, (rows, columns), generator=generator).float()
    weight[torch.rand(weight.shape, generator=generator) < 0.3] = 0.0
    solved = solve(name, weight, Target(sparsity), tokens=5)
    assert zeros(solved.mask) in allowed_counts(weight.shape, sparsity)
    assert not solved.weight[~solved.mask].any()


@every_method
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_says_whether_the_seed_changes_anything(name, pattern):
    weight, target = matrix((12, 200)), Target(0.5, parse_pattern(pattern))
    one, other = (solve(name, weight, target, seed=seed) for seed in (0, 1))
    assert torch.equal(one.weight, other.weight) != plugins.draws(plugins.make_method(name))
    assert isinstance(plugins.load_class("methods", name, "method").draws, bool)


@every_method
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_same_bits_twice_and_inputs_stay(name, pattern):
    weight = matrix((12, 200))
    before = weight.clone()
    target = Target(0.5, parse_pattern(pattern))
    method = plugins.make_method(name)
    stats = statistics(method, 200)
    kept = None if stats is None else (stats.sum_squares.clone(), None if stats.gram is None else stats.gram.clone())
    first = method.solve(weight, stats, target, generator=torch.Generator().manual_seed(3))
    again = method.solve(weight, stats, target, generator=torch.Generator().manual_seed(3))
    afresh = solve(name, before.clone(), target, seed=3)
    for other in (again, afresh):
        assert torch.equal(first.weight, other.weight)
        assert torch.equal(first.mask, other.mask)
        assert first.loss == other.loss
        assert first.notes == other.notes
    assert first.notes is not again.notes
    assert torch.equal(weight, before)
    if stats is not None:
        assert torch.equal(stats.sum_squares, kept[0])
        assert stats.gram is None or torch.equal(stats.gram, kept[1])


@every_method
def test_a_view_gives_the_same_bits_as_its_copy(name):
    # GPT-2 keeps its matrices turned, fused projections are slices: neither is contiguous.
    large = matrix((48, 40))
    before = large.clone()
    turned, part = large.t(), large[3:20, 8:32]
    for view in (turned, part):
        one = solve(name, view, Target(0.5))
        two = solve(name, view.clone(memory_format=torch.contiguous_format), Target(0.5))
        assert torch.equal(one.weight, two.weight)
        assert torch.equal(one.mask, two.mask)
        assert torch.equal(large, before)


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_weights_that_are_not_finite_are_refused(name, bad, sparsity):
    weight = matrix((4, 8))
    weight[2, 3] = bad
    with pytest.raises(WeightValueError, match="NaN or infinity"):
        solve(name, weight, Target(sparsity))


@every_method
def test_a_pattern_that_does_not_divide_is_refused(name):
    with pytest.raises(PatternError, match="do not divide by 4"):
        solve(name, matrix((4, 10)), Target(0.5, parse_pattern("2:4")))


@every_method
def test_misuse_is_refused(name):
    with pytest.raises(ValueError, match="count"):
        solve(name, matrix((4, 8)), Target(0.5, parse_pattern("2:4"), count=3))
    with pytest.raises(ValueError, match="do not fit"):
        solve(name, matrix((4, 8)), Target(0.5, count=33))
    with pytest.raises(ValueError, match="float32 matrix"):
        solve(name, matrix((4, 8)).double(), Target(0.5))
    with pytest.raises(UnknownNameError, match="no_such_option"):
        plugins.make_method(name, {"no_such_option": 1})


@every_method
def test_missing_or_foreign_statistics_are_refused(name):
    method = plugins.make_method(name)
    if method.statistics == "none":
        method.solve(matrix((4, 8)), None, Target(0.5), generator=torch.Generator())
        return
    for stats in (None, statistics(method, 9)):
        with pytest.raises(ValueError, match="of 8 inputs"):
            method.solve(matrix((4, 8)), stats, Target(0.5), generator=torch.Generator())


@every_method
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_dead_inputs_are_told_and_pruned_first(name, pattern):
    method = plugins.make_method(name)
    weight = matrix((10, 16)) + 5.0
    dead = [2, 3, 9]
    solved = solve(name, weight, Target(0.5, parse_pattern(pattern)), dead=dead)
    if method.statistics == "none":
        return
    assert not solved.mask[:, dead].any()
    assert sum("3 of 16 inputs are dead" in note for note in solved.notes) == 1


@every_method
@pytest.mark.parametrize("tokens", [0, 4])
def test_a_matrix_no_token_reaches_is_pruned_by_magnitude_and_told(name, tokens):
    method = plugins.make_method(name)
    if method.statistics == "none":
        return
    weight = matrix((6, 16))
    solved = solve(name, weight, Target(0.5), tokens=tokens, dead=range(16))
    reason = "all its inputs are zero" if tokens else "no calibration token"
    assert [note for note in solved.notes if reason in note] == solved.notes
    assert len(solved.notes) == 1
    assert weight[solved.mask].abs().mean() > 2 * weight[~solved.mask].abs().mean()
    assert torch.equal(solved.weight[solved.mask], weight[solved.mask])


@every_method
def test_one_token_is_enough(name):
    solved = solve(name, matrix((6, 16)), Target(0.5), tokens=1)
    assert solved.weight.isfinite().all()
