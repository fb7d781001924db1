import pytest
import torch

from secateur.errors import UnknownNameError, UsageError
from secateur.methods._refitted import Refitted
from secateur.methods.magnitude import Magnitude
from secateur.methods.ria import Ria, ria_score
from secateur.methods.wanda import Wanda
from secateur.patterns import parse_pattern
from secateur.plugins import Target
from tests.methods.problems import output_error, problem, solve
from tests.oracles import importance, masks


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_score_is_that_of_the_paper(power):
    weight, x, stats = problem(6, 16, 50)
    weight[2], weight[:, 3] = 0.0, 0.0
    expected = torch.tensor(importance.ria(weight, x, power))
    torch.testing.assert_close(ria_score(weight, stats.column_norms().pow(power)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("scope", ["matrix", "row"])
def test_the_mask_is_that_of_the_paper(pattern, scope):
    parsed = parse_pattern(pattern)
    weight, x, stats = problem(6, 16, 50)
    score = torch.tensor(importance.ria(weight, x))
    solved = solve(Ria(scope=scope), weight, stats, Target(0.5, parsed))
    if not parsed.unstructured:
        expected = torch.cat(
            [masks.per_group(score[:, j : j + parsed.group], parsed.keep, parsed.group)
             for j in range(0, 16, parsed.group)], dim=1,
        )  # fmt: skip
    elif scope == "matrix":
        expected = masks.of_matrix(score, 48)
    else:
        expected = torch.cat([masks.of_matrix(row[None], 8) for row in score])
    assert torch.equal(solved.mask, expected)
    assert torch.equal(solved.weight[solved.mask], weight[solved.mask])


def test_an_output_with_small_weights_does_not_lose_all_of_them():
    weight, _, stats = problem(64, 32, 100)
    weight[0] *= 1e-3
    assert solve(Ria(), weight, stats, Target(0.5)).mask[0].sum() > 4
    assert not solve(Magnitude(), weight, stats, Target(0.5)).mask[0].any()


def test_dead_inputs_go_first_even_when_inputs_do_not_count():
    weight, _, stats = problem(4, 16, 80, dead=(3, 7))
    solved = solve(Ria(power=0.0), weight, stats, Target(0.25))
    assert not solved.mask[:, [3, 7]].any()


def test_a_refit_makes_up_for_what_goes():
    weight, x, stats = problem(16, 48, 300)
    plain, refitted = (solve(one, weight, stats, Target(0.5)) for one in (Ria(), Refitted(Ria())))
    assert output_error(x, weight, refitted.weight) < 0.7 * output_error(x, weight, plain.weight)
    assert output_error(x, weight, plain.weight) < 1.5 * output_error(
        x, weight, solve(Wanda(), weight, stats, Target(0.5)).weight
    )


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(UsageError, match="power of ria is -1"):
        Ria(power=-1.0)
    with pytest.raises(UnknownNameError, match="scope of method ria"):
        Ria(scope="column")
