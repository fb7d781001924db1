"""From inputs to a result: who stands beside whom, fronts against brute force, the answer, and what is refused."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.bench_result import Quantities, RatioResult
from secateur.errors import UsageError
from secateur.pages.answer import _gains
from secateur.pages.blocks import block_map
from secateur.pages.collect import Collector
from secateur.pages.commands import command_of
from secateur.pages.fronts import knee, pareto
from secateur.pages.inputs import read_inputs
from secateur.recipe import Recipe
from secateur.study_result import Trial
from tests.pages.made import bench, conversion, pruning, recovery, sizes, study, write

numbers = st.integers(0, 6).map(float)


@given(st.lists(st.tuples(numbers, numbers), max_size=12))
def test_a_front_is_what_no_other_point_betters(points):
    front = pareto(points)
    kept = {points[i] for i in front}
    assert len(kept) == len(front)
    for point in points:
        bettered = any(o != point and o[0] <= point[0] and o[1] <= point[1] for o in points)
        assert (point in kept) == (not bettered)


def test_the_knee_is_farthest_below_the_line_between_the_ends():
    assert knee([(0, 10), (1, 2), (8, 1), (10, 0)]) == 1
    assert knee([(0, 1000), (0.1, 200), (0.8, 100), (1, 0)]) == 1  # whatever the units
    assert knee([(0, 10), (5, 5), (10, 0)]) is None  # on the line
    assert knee([(0, 1), (1, 0)]) is None
    draw = random.Random(0)
    points = sorted((draw.random(), 0.0) for _ in range(20))
    points = [(x, (1 - x) ** 3) for x, _ in points]
    (x0, y0), (x1, y1) = points[0], points[-1]
    area = [abs((x1 - x0) * (y0 - y) - (x0 - x) * (y1 - y0)) for x, y in points]  # twice a triangle on the chord
    assert knee(points) == area.index(max(area))


def collect(*paths):
    return Collector(read_inputs(paths)).finish()


def test_two_prunings_of_one_model_share_its_dense_model_and_a_front(tmp_path):
    smaller = pruning(recipe={"structure": ["ffn"], "sparsity": 0.2}, after=sizes(13.0, bytes_disk=3_000_000))
    result = collect(write(tmp_path / "a", pruning()), write(tmp_path / "b", smaller))
    assert [(m.name, m.kind) for m in result.models] == [("base (dense)", "dense"), ("a", "pruned"), ("b", "pruned")]
    (comparison,) = result.comparisons
    front = next(front for front in comparison.fronts if front.axis == "bytes_disk")
    assert sorted(front.front) == [0, 2]
    assert result.recommended == 2
    assert result.command == "secateur prune base -o b --sparsity 0.2 --structure ffn"
    assert "0.75 times the bytes" in result.answer[0]
    assert "13.00 against 12.00" in result.answer[1]
    assert len(result.answer) == 3


def test_a_converted_model_is_called_so_and_can_be_taken(tmp_path):
    pruned, converted = write(tmp_path / "a", pruning()), write(tmp_path / "c", conversion())
    result = collect(pruned, converted)
    assert [m.kind for m in result.models] == ["dense", "pruned", "converted"]
    assert result.command == "secateur convert base -o c --to factorized --rank 8"
    assert result.answer[0].startswith("Converting base pays if")
    assert "of the pruned and converted models that no other betters" in result.answer[1]
    assert collect(converted).answer[0].startswith("Converting base pays if")
    nothing = write(tmp_path / "n", conversion(after=sizes(13.0)))
    assert collect(nothing).answer[0].startswith("Converting base does not pay here: no converted model is better")
    both = collect(pruned, nothing).answer[0]
    assert both.startswith("Pruning or converting base does not pay here: no pruned or converted model is better")


def test_a_benchmark_of_a_converted_folder_is_of_a_converted_model(tmp_path):
    folder = write(tmp_path / "c", conversion())
    result = collect(folder, write(tmp_path / "b.json", bench(str(folder))))
    assert {m.kind for m in result.models if m.origin == "b.json"} == {"converted", "dense", "quantised"}
    assert next(m for m in result.models if m.name == "c").values["flops_per_token"] == 2e6


def test_what_gains_nothing_is_not_recommended(tmp_path):
    result = collect(write(tmp_path / "a", pruning()))
    assert (result.recommended, result.command) == (None, "")
    assert "does not pay" in result.answer[0]
    assert "keep the dense model" in result.answer[1]


def test_results_of_other_sources_are_never_on_one_front(tmp_path):
    other = pruning(source={"name": "other", "model": "other", "sha256": "xyz"})
    result = collect(write(tmp_path / "a", pruning()), write(tmp_path / "b", other))
    assert [set(c.models) for c in result.comparisons] == [{0, 1}, {2, 3}]
    assert any("2 models" in warning and "no front has two" in warning for warning in result.warnings)


def test_quality_on_other_text_is_never_on_one_front(tmp_path):
    other = pruning(protocol={"quality": {"perplexity": "another text"}})
    result = collect(write(tmp_path / "a", pruning()), write(tmp_path / "b", other))
    assert [c.protocol for c in result.comparisons] == ["some text; 12 windows", "another text"]
    assert any("more than one way" in warning for warning in result.warnings)


def test_a_study_gives_its_choice_and_says_whether_quantising_is_better(tmp_path):
    path = write(tmp_path / "s.json", study(40))
    result = collect(path)
    chosen = study(40).recommended
    assert result.models[result.recommended].name.startswith(f"{chosen}: ")
    assert result.command == next(t.command for t in study(40).trials if t.number == chosen)
    assert result.answer[2].startswith("Quantising alone is better at no more bytes: int8")
    assert [failure["reason"] for failure in result.failures] == ["out of memory"]
    (front,) = [f for f in result.comparisons[0].fronts if f.axis == "decode_speedup"]
    dense = next(m for m in result.models if m.kind == "dense")
    assert dense.values["decode_speedup"] == 1
    refused = [n for n in front.points if result.models[n].meets is False]
    assert refused
    assert not set(refused) & set(front.front)


def test_a_study_that_nothing_meets_says_so(tmp_path):
    made = study(12)
    for trial in made.trials:
        trial.meets = False if trial.state == "complete" else None
    made.recommended, made.constraints = None, ["perplexity <= 1.1x", "sparsity >= 0.4"]
    for baseline in made.baselines:
        baseline.meets = baseline.name in ("dense", "int8")
    count = sum(trial.state == "complete" for trial in made.trials)
    result = collect(write(tmp_path / "s.json", made))
    assert result.answer[-1] == (
        f"No trial of {made.name} meets perplexity <= 1.1x and sparsity >= 0.4, of {count} that were tried; without "
        "pruning int8 does."
    )
    assert not any(one.startswith("No trial") for one in collect(write(tmp_path / "t.json", study(12))).answer)


def test_a_study_of_the_same_model_stands_under_the_same_source(tmp_path):
    told = {"name": "demo", "model": "demo", "sha256": "abc", "kind": "demo"}
    result = collect(write(tmp_path / "s.json", study()), write(tmp_path / "a", pruning(source=told)))
    assert {c.source for c in result.comparisons} == {"demo"}


def test_a_benchmark_adds_what_a_folder_does_not_know(tmp_path):
    folder = write(tmp_path / "a", pruning())
    result = collect(folder, write(tmp_path / "b.json", bench(str(folder))))
    model = next(m for m in result.models if m.name == "a")
    assert model.values["flops_per_token"] == 2e6
    assert model.values["perplexity"] == 17.0
    assert {m.kind for m in result.models if m.origin == "b.json"} == {"pruned", "dense", "quantised"}


def test_a_recovered_model_has_its_teacher_for_the_dense_one(tmp_path):
    result = collect(write(tmp_path / "r", recovery()))
    assert [(m.kind, m.values["perplexity"]) for m in result.models] == [("dense", 12.0), ("pruned", 14.0)]
    assert result.models[1].command == "secateur recover pruned -o r --tokens 4096"


def test_a_command_makes_the_recipe_again(tmp_path):
    recipe = {
        "method": "sparsegpt", "method_options": {"damping": 0.01, "block_size": 64}, "pattern": "2:4", "sparsity": 0.5,
        "ignore": ["*o_proj*"], "overrides": [{"match": "*up*", "sparsity": 0.6}], "update": True, "samples": 8,
        "structure": [],
    }  # fmt: skip
    result = pruning(recipe=recipe, source={"name": "m", "model": "my model"})
    assert command_of(result, "out") == (
        "secateur prune 'my model' -o out --method sparsegpt --sparsity 0.5 --pattern 2:4 --samples 8 "
        "'--ignore=*o_proj*' --method-option=block_size=64 '--override=*up*=0.6'"
    )


def test_the_command_has_the_options_of_a_reconstruction():
    recipe = Recipe(
        method="sparsegpt",
        sparsity=0.6,
        error_correction="auto",
        reconstruct="block",
        reconstruct_options={"passes": 2},
    )
    assert command_of(pruning(recipe=recipe.to_dict()), "out") == (
        "secateur prune base -o out --method sparsegpt --sparsity 0.6 --error-correction auto --reconstruct block "
        "--reconstruct-option=passes=2"
    )
    rounded = Recipe(method="alps", bits=4, group_size=128).to_dict()
    assert command_of(pruning(recipe=rounded), "out").endswith("--method alps --bits 4 --group-size 128")


def test_what_went_as_a_whole_is_said_where_no_cell_can_show_it(tmp_path):
    recipe = {"method": "obs", "sparsity": 0.3, "structure": ["depth", "ffn"], "method_options": {}}
    changes = {"num_hidden_layers": 5, "intermediate_size": 96, "layer_types": ["full_attention"] * 5}
    made = pruning(recipe=recipe, sparsity=0.314, blocks_kept=[0, 1, 2, 5, 7], shape_changes=changes)
    result = collect(write(tmp_path / "a", made))
    assert result.maps[0].gone == [
        "31.4% of the prunable weights went in whole units",
        "blocks that stayed, by their number in the source: 0-2, 5, 7", "num_hidden_layers is 5",
        "intermediate_size is 96",
    ]  # fmt: skip
    assert collect(write(tmp_path / "b", pruning())).maps[0].gone == []


def test_quantising_is_told_with_its_speed(tmp_path):
    """Another runtime may bring more than fewer weights do."""
    made = study(40)
    for baseline, speed in zip(made.baselines, (10.0, 85.0), strict=False):
        baseline.values["decode_tokens_per_second"] = speed
    result = collect(write(tmp_path / "s.json", made))
    own = result.models[result.recommended].values["decode_speedup"]
    told = f"; int8 decodes 8.5 times as fast as the dense model, what is recommended {own:.1f}."
    assert result.answer[2].endswith(told)


def test_blocks_and_kinds_are_found_in_names():
    names = {"model.layers.0.mlp.up.weight": 0.5, "model.layers.1.mlp.up.weight": 0.25, "model.layers.1.q.weight": 1.0,
             "encoder.block.1.q.weight": 0.0, "head.weight": 0.1}  # fmt: skip
    found = block_map("m", names, {"model.layers.1.mlp.up.weight": 2.0, "model.layers.1.q.weight": 3.0})
    assert found.blocks == ["0", "1", "encoder.block 1", "-"]
    assert found.kinds == ["mlp.up", "q", "head"]
    assert found.sparsity[0] == [0.5, 0.25, None, None]
    assert found.loss == [None, 5.0, None, None]
    experts = block_map("m", {f"model.layers.0.experts.{i}.up.weight": i / 4 for i in range(3)})
    assert (experts.kinds, experts.sparsity) == (["experts.*.up"], [[0.25]])


def damaged(change):
    data = pruning().to_dict()
    change(data)
    return json.dumps(data)


BAD = {
    "empty": ("", "not whole JSON"),
    "cut off": (json.dumps(pruning().to_dict())[:400], "not whole JSON"),
    "a list": ("[]", "not an object"),
    "something else": ('{"schema_version": 1}', "no result"),
    "no version": (damaged(lambda d: d.pop("schema_version")), "no schema_version"),
    "newer": (damaged(lambda d: d.update(schema_version=2)), "schema version 2"),
    "NaN": (damaged(lambda d: d.update(seconds=float("nan"))), "NaN"),
    "infinite": (damaged(lambda d: d.update(seconds=1)).replace('"seconds": 1,', '"seconds": 1e999,'), "1e999"),
    "a text for a number": (damaged(lambda d: d["after"].update(perplexity="17")), "after: perplexity"),
    "a truth for a number": (damaged(lambda d: d["after"].update(parameters=True)), "after: parameters"),
    "a missing side": (damaged(lambda d: d["after"].pop("bytes_disk")), "bytes_disk is missing"),
    "a bad matrix": (damaged(lambda d: d["matrices"][3].update(name=None)), r"matrices\[3\]: name"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_file_is_refused_by_name(tmp_path, name):
    text, message = BAD[name]
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "secateur.json").write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        read_inputs([folder])
    assert "secateur.json" in error.value.message
    assert error.value.hint


def test_what_is_no_result_is_refused_and_said_what_was_expected(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "sweep.yaml").write_text("model: demo\nspace: {sparsity: 0.5}\n")
    good = write(tmp_path / "good", pruning())
    misplaced = tmp_path / "misplaced"
    misplaced.mkdir()
    (misplaced / "secateur.json").write_text(study().to_json())
    for paths, message in (
        ([], "nothing to report on"),
        ([tmp_path / "empty"], "no secateur.json"),
        ([tmp_path / "absent"], "no such file or folder"),
        ([tmp_path / "x.bin"], "not UTF-8"),
        ([tmp_path / "sweep.yaml"], "not its result"),
        ([good, good / "secateur.json"], "given twice"),
        ([misplaced], "no result"),
    ):
        with pytest.raises(UsageError, match=message) as error:
            read_inputs(paths)
        assert error.value.hint


def test_a_study_without_a_trial_is_nothing_to_report(tmp_path):
    empty = study(baselines=[], trials=[Trial(0, "running", {}, "")], recommended=None, finalists=[], finished=False)
    with pytest.raises(UsageError, match="nothing to report"):
        collect(write(tmp_path / "s.json", empty))


def test_inputs_of_one_name_are_told_apart(tmp_path):
    paths = [write(tmp_path / where / "out", pruning()) for where in ("a", "b")]
    assert [each.name for each in read_inputs(paths)] == ["a/out", "b/out"]


def test_models_that_were_not_measured_are_said_to_be_so(tmp_path):
    blind = pruning(before=sizes(None), after=sizes(None, 0.5), protocol={})
    result = collect(write(tmp_path / "a", blind))
    assert "not known: no input measured quality" in result.answer[0]
    assert set(result.comparisons[0].missing.values()) == {"quality was not measured"}


def test_accuracy_is_better_the_larger(tmp_path):
    sides = {"before": sizes(None, accuracy={"sst2": 0.9}), "protocol": {"quality": {"sst2": "872 texts"}}}
    small = pruning(after=sizes(None, accuracy={"sst2": 0.88}, bytes_disk=2_000_000), **sides)
    bad = pruning(after=sizes(None, accuracy={"sst2": 0.7}, bytes_disk=3_000_000), **sides)
    result = collect(write(tmp_path / "small", small), write(tmp_path / "bad", bad))
    assert result.comparisons[0].quality == "accuracy, sst2"
    assert result.models[result.recommended].name == "small"
    assert "88.00% against 90.00%" in result.answer[1]


def test_a_benchmark_measures_what_a_folder_was_not_measured_for(tmp_path):
    made = pruning()
    for side in (made.before, made.after):
        side.perplexity = side.nll_per_token = None
    made.protocol = {}
    folder = write(tmp_path / "a", made)
    result = collect(folder, write(tmp_path / "b.json", bench(str(folder))))
    (comparison,) = result.comparisons
    kinds = [result.models[number].kind for number in comparison.models]
    assert sorted(kinds) == ["dense", "pruned", "quantised"]
    model = next(one for one in result.models if one.kind == "pruned")
    assert model.values["perplexity"] == 17.0
    assert "perplexity" not in model.missing
    assert model.command.startswith("secateur prune")
    assert not any("more than one way" in warning for warning in result.warnings)


@pytest.mark.parametrize("differs", [True, False])
def test_speed_that_a_benchmark_did_not_show_is_no_gain(tmp_path, differs):
    folder = write(tmp_path / "smaller", pruning())
    found = bench(str(folder))
    found.decode_tokens_per_second = 25.0
    noise = RatioResult(1.19, 0.96, 1.3, 0.97, differs)
    found.ratio = {"base (transformers, float32)": {"decode_tokens_per_second": noise}}
    result = collect(write(tmp_path / "b.json", found))
    model = next(one for one in result.models if one.kind != "dense" and one.name.startswith("smaller"))
    assert model.values["decode_speedup"] > 1.1
    assert model.unshown == ([] if differs else ["decode_speedup"])
    gains = dict(_gains(model, next(one for one in result.models if one.kind == "dense")))
    assert gains["1.19 times the decoding speed"] == differs


@pytest.mark.parametrize(("size", "start"), [(4_000_000, "If a pruned model is wanted"), (3_000_000, "Take ")])
def test_what_does_not_pay_is_not_simply_to_be_taken(tmp_path, size, start):
    settings = {"method": "wanda", "sparsity": 0.5}
    trials = [Trial(0, "complete", settings, "make it", {"perplexity": 15.0, "bytes_disk": size})]
    base = [Trial(-1, "complete", {}, "", {"perplexity": 12.0, "bytes_disk": 4_000_000}, name="dense")]
    made = study(trials=trials, baselines=base, finalists=[], recommended=0)
    result = collect(write(tmp_path / "s.json", made))
    assert result.answer[1].startswith(start)
    assert ("does not pay" in result.answer[0]) == (size == 4_000_000)


def test_packed_models_of_the_same_size_count_as_pruned_and_as_quantised(tmp_path):
    made = bench()
    numbers = {"parameters": 1000, "bytes_disk": 900_000, "perplexity": 12.1}
    worse = {**numbers, "perplexity": 16.0}
    made.against.append(Quantities("half", "transformers", "sparse int8", nonzero=500, kernels="avx512", **worse))
    made.against.append(Quantities("whole", "transformers", "dense int8", nonzero=1000, kernels="avx512", **numbers))
    other = {**numbers, "parameters": 700}  # the next smaller model, packed: it is not made of this one
    made.against.append(Quantities("next", "transformers", "dense int8", nonzero=700, kernels="avx512", **other))
    result = collect(write(tmp_path / "bench.json", made), write(tmp_path / "pruned", pruning()))
    kinds = {model.name.split(",")[0]: model.kind for model in result.models}
    assert (kinds["half"], kinds["whole"], kinds["next"]) == ("pruned", "quantised", "other")
    assert result.answer[2].startswith("Quantising alone: whole, dense int8")
