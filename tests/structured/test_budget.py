"""The choice of a split by numbers alone: against all splits one by one, and costs against tensors really cut."""

from __future__ import annotations

import copy
import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.writer import layout_like
from secateur.engine.binding import Binding
from secateur.engine.blocks import find_structure
from secateur.engine.skeleton import build_skeleton
from secateur.structured import costs
from secateur.structured.budget import MEASURED_SIZES, Curve, ladder, least, splits
from secateur.structured.configure import shapes_of
from secateur.structured.ladder import divide
from secateur.structured.plan import couplings_of_blocks
from tests.models import save_tiny, tiny_model


def _random_case(seed: int) -> tuple[costs.Cost, list[int], list[float], dict, dict]:
    draw = random.Random(seed)
    blocks = draw.randint(1, 5)
    before = {"ffn": 8 * draw.randint(2, 6), "kv-groups": draw.randint(2, 4)}
    sizes = {
        "ffn": list(range(before["ffn"] - 8, 0, -8)),
        "kv-groups": sorted(draw.sample(range(1, before["kv-groups"]), draw.randint(1, before["kv-groups"] - 1)))[::-1],
    }
    for kind in draw.sample(sorted(sizes), draw.choice([0, 0, 1])):
        del sizes[kind], before[kind]
    unit = {"ffn": 2.0, "kv-groups": 15.0}
    each = [{kind: unit[kind] * draw.choice([1, 1, 2]) for kind in before} for _ in range(blocks)]
    whole = [sum(before[kind] * cost for kind, cost in own.items()) + draw.randint(0, 9) for own in each]
    cost = costs.Cost(draw.randint(0, 20), whole, each, before)
    order = draw.sample(range(blocks), blocks - 1)
    depth = sorted(draw.random() * 3 for _ in order)
    curves = {kind: Curve.through({size: draw.random() for size in own}, before[kind]) for kind, own in sizes.items()}
    return cost, order, depth, sizes, curves


@pytest.mark.parametrize("seed", range(60))
def test_the_best_split_is_that_of_all_splits(seed: int) -> None:
    cost, order, depth, sizes, curves = _random_case(seed)
    limit = cost.of() * random.Random(seed).uniform(0.1, 0.95)
    best = math.inf
    kinds = list(sizes)
    for count in range(len(order) + 1):
        for chosen in itertools.product(*([cost.before[kind], *sizes[kind]] for kind in kinds)):
            price = cost.outside
            for block in range(len(cost.blocks)):
                if block not in order[:count]:
                    price += cost.blocks[block]
                    for kind, size in zip(kinds, chosen, strict=True):
                        price -= cost.units[block][kind] * (cost.before[kind] - size)
            if price <= limit:
                loss = depth[count - 1] if count else 0.0
                best = min(loss + sum(curves[k].at(size) for k, size in zip(kinds, chosen, strict=True)), best)
    found = splits(cost, limit, order, depth, sizes, curves)
    assert bool(found) == math.isfinite(best)
    if found:
        assert found[0].predicted == pytest.approx(best)
        assert all(split.cost <= limit and cost.of(split.gone, split.kept) == split.cost for split in found)
        assert [split.predicted for split in found] == sorted(split.predicted for split in found)


def test_least_is_the_least_of_all() -> None:
    for seed in range(30):
        cost, _, _, sizes, _ = _random_case(seed)
        smallest = {kind: own[-1] for kind, own in sizes.items()}
        subsets = [set(gone) for count in range(len(cost.blocks)) for gone in
                   itertools.combinations(range(len(cost.blocks)), count)]  # fmt: skip
        assert least(cost, smallest, depth=True) == min(cost.of(gone, smallest) for gone in subsets)
        assert least(cost, smallest, depth=False) == cost.of((), smallest)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=8), st.integers(1, 5))
def test_curve_goes_through_its_points_and_never_down(losses: list[float], step: int) -> None:
    points = {step * (index + 1): loss for index, loss in enumerate(losses)}
    whole = step * (len(losses) + 1)
    curve = Curve.through(points, whole)
    assert curve.at(whole) == 0.0
    for size in points:
        assert curve.at(size) == max(loss for other, loss in points.items() if other >= size)
    line = [curve.at(size) for size in range(step, whole + 1)]
    assert line == sorted(line, reverse=True)
    assert math.isinf(curve.at(step - 1))


def test_curve_is_a_line_between_points() -> None:
    curve = Curve.through({100: 1.0, 140: 0.2}, 180)
    assert [curve.at(size) for size in (120, 160, 170)] == pytest.approx([0.6, 0.1, 0.05])
    assert Curve.through({}, 8).at(8) == 0.0
    destroyed = Curve.through({100: math.inf, 140: 0.2}, 180)
    assert destroyed.at(139) == math.inf
    assert destroyed.at(140) == 0.2


def test_ladder_ends_where_the_kind_alone_meets_the_limit() -> None:
    cost = costs.Cost(0, [400.0] * 5, [{"ffn": 3.0, "kv-groups": 10.0}] * 5, {"ffn": 100, "kv-groups": 4})
    sizes = list(range(90, 0, -10))
    found = ladder(cost, 0.8 * 2000, "ffn", sizes)
    assert found[-1] == 70  # 30 neurons of 3 in each block are 90, more than a fifth of 400
    assert len(found) <= MEASURED_SIZES
    assert found == sorted(set(found), reverse=True)
    assert set(found) <= set(sizes)
    assert ladder(cost, 0.8 * 2000, "kv-groups", [3, 2, 1]) == [3, 2, 1]  # cannot alone
    many = ladder(cost, 1.0, "ffn", list(range(99, 0, -1)))
    assert len(many) == MEASURED_SIZES
    assert many[-1] == 1


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi3", "bert"])
def test_costs_are_those_of_tensors_that_are_cut(family: str, tmp_path) -> None:
    """Parameters and bytes of every block and of every unit, by cutting the stock model's tensors."""
    folder = save_tiny(tmp_path, family)
    skeleton, stock = build_skeleton(folder), tiny_model(family)
    with CheckpointReader(folder) as reader:
        structure, binding = find_structure(skeleton), Binding(skeleton, reader.keys)
        every = couplings_of_blocks(skeleton, structure, binding, reader)
        every = {index: [c for c in own if c.kind in ("ffn", "kv-groups")] for index, own in every.items()}
        layout = layout_like(reader)
        shapes = shapes_of(skeleton)
        parameters = costs.parameter_cost(structure, every, shapes)
        numbers = costs.number_cost(layout, structure, binding, every, shapes)
        nbytes = costs.byte_cost(layout, structure, binding, every, shapes)
    file = folder / "model.safetensors"
    assert numbers.of() == stock.num_parameters()
    assert file.stat().st_size <= nbytes.of() <= file.stat().st_size + 120 * len(stock.state_dict())
    matrices = {name for name, p in stock.named_parameters() if p.ndim == 2}
    gone, kept = [0], {coupling.kind: coupling.units // 2 for coupling in every[1]}
    assert "ffn" in kept
    left = {name: copy.deepcopy(tensor) for name, tensor in stock.named_parameters()}
    for name in list(left):
        if name.startswith(structure.blocks[0].name + "."):
            del left[name]
    for coupling in every[1]:
        units = torch.arange(kept[coupling.kind])
        for cut in coupling.cuts:
            left[cut.name] = cut.apply(left[cut.name].data, units)
    inside = {name for name in left if name.startswith(structure.blocks[1].name + ".")}
    assert parameters.of(gone, kept) == sum(left[name].numel() for name in inside & matrices)
    assert numbers.of(gone, kept) == sum(tensor.numel() for tensor in left.values())
    assert nbytes.of() - nbytes.of((), kept) == 2 * sum(
        4 * (p.numel() - left[name].numel()) for name, p in stock.named_parameters() if name in inside
    )


def test_decode_cost_is_the_line_through_what_was_timed() -> None:
    head, block, neuron, group = 2.0, 5.0, 0.02, 0.5
    before = {"ffn": 100, "kv-groups": 3}

    def seconds(blocks: int, neurons: int, groups: int) -> float:
        return head + blocks * (block - neuron * (100 - neurons) - group * (3 - groups))

    narrow = {"ffn": (32, seconds(8, 32, 3)), "kv-groups": (1, seconds(8, 100, 1))}
    cost = costs.decode_cost(8, before, seconds(8, 100, 3), (4, seconds(4, 100, 3)), narrow)
    assert cost.of([1, 5], {"ffn": 64, "kv-groups": 2}) == pytest.approx(seconds(6, 64, 2))
    # What did not get faster is not promised to: neither by noise, nor where blocks cannot go.
    flat = costs.decode_cost(8, before, 40.0, None, {"ffn": (32, 41.0)})
    assert flat.of((), {"ffn": 32}) == 40.0


def test_calibration_is_divided_into_two_parts() -> None:
    ids = torch.arange(24 * 8).reshape(24, 8)
    windows = [{"input_ids": ids[i : i + 1]} for i in range(24)]
    fit, held = divide(windows, 64, 32)
    assert torch.equal(torch.cat([b["input_ids"] for b in fit]), ids[:8])
    assert torch.equal(torch.cat([b["input_ids"] for b in held]), ids[20:])
    fit, held = divide([{"input_ids": ids}], 10**6, 10**6)
    assert torch.equal(fit[0]["input_ids"], ids[:18])
    assert torch.equal(held[0]["input_ids"], ids[18:])
    fit, held = divide(windows[:2], 10**6, 10**6)
    assert (len(fit), len(held)) == (1, 1)
    fit, held = divide(windows[:1], 64, 32)
    assert fit is held
