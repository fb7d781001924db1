"""``secateur prune``: flags and recipe file make the recipe; only flags that were given count."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.cli import prune as command
from secateur.errors import RecipeError, UsageError
from secateur.progress import Recorder
from secateur.recipe import Override, Recipe
from secateur.result import Measured, PruneResult


def measured(**values):
    common = {"parameters": 100, "nonzero": 100, "sparsity": 0.0, "bytes_disk": 400_000_000, "dtype": "float32"}
    return Measured(**{**common, **values})


@pytest.fixture
def pruning(verb):
    stand_in = verb("prune")
    stand_in.answer = PruneResult(
        out="out",
        source={},
        recipe={},
        sparsity=0.5,
        seconds=1.0,
        peak_rss_bytes=10**9,
        before=measured(perplexity=11.25, continuation="a cat [0]"),
        after=measured(perplexity=22.5, nonzero=60, sparsity=0.5, accuracy={"pairs.jsonl": 0.75}),
        verified=True,
        verdict=["It is as fast as before."],
        protocol={"prompt": "Once"},
    )
    return stand_in


def test_without_flags_the_recipe_is_the_default(run, pruning):
    assert run("prune", "demo", "-o", "out").status == 0
    assert pruning.args == ("demo", Path("out"))
    kwargs = dict(pruning.kwargs)
    assert kwargs.pop("reporter") is not None
    assert kwargs == {
        "recipe": Recipe(),
        "resume": False,
        "overwrite": False,
        "verify": True,
        "evaluate": True,
        "data": "builtin",
        "files": (),
        "prompt": None,
    }


FLAGS = {
    "method": (["--method", "wanda"], "wanda"),
    "method_options": (["--method-option", "block-size=64", "--method-option", "damping=0.1"], None),
    "sparsity": (["--sparsity", "0.25"], 0.25),
    "pattern": (["--pattern", "2:4"], "2:4"),
    "permute": (["--pattern", "2:4", "--permute"], True),
    "structure": (["--structure", "ffn,heads"], ("ffn", "heads")),
    "budget": (["--budget", "parameters=0.8"], "parameters=0.8"),
    "depth_by": (["--structure", "depth", "--depth-by", "influence"], "influence"),
    "round_to": (["--structure", "ffn", "--round-to", "8"], 8),
    "update": (["--structure", "ffn", "--no-update"], False),
    "refit": (["--no-refit"], False),
    "error_correction": (["--error-correction", "auto"], "auto"),
    "reconstruct": (["--reconstruct", "half-block"], "half-block"),
    "reconstruct_options": (["--reconstruct", "block", "--reconstruct-option", "passes=2"], {"passes": "2"}),
    "bits": (["--bits", "4"], 4),
    "group_size": (["--bits", "8", "--group-size", "128"], 128),
    "allocation": (["--allocation", "other"], "other"),
    "allocation_options": (["--allocation-option", "spread=0.1"], {"spread": "0.1"}),
    "calibration": (["--calibration", "text.txt"], "text.txt"),
    "samples": (["--samples", "7"], 7),
    "sequence_length": (["--sequence-length", "64"], 64),
    "targets": (["--targets", "*mlp*", "--targets", "re:q_proj"], ("*mlp*", "re:q_proj")),
    "ignore": (["--ignore", "*o_proj*"], ("*o_proj*",)),
    "overrides": (["--override", "re:a=b=0.6"], (Override(match="re:a=b", sparsity=0.6),)),
    "seed": (["--seed", "0"], 0),
    "device": (["--device", "cpu"], "cpu"),
    "dtype": (["--dtype", "float16"], "float16"),
    "compute_dtype": (["--compute-dtype", "bfloat16"], "bfloat16"),
    "activation_memory": (["--activation-memory", "2GB"], "2GB"),
}


BESIDE = {
    "depth_by": {"structure": ("depth",)}, "round_to": {"structure": ("ffn",)}, "update": {"structure": ("ffn",)},
    "reconstruct_options": {"reconstruct": "block"}, "group_size": {"bits": 8},
    "permute": {"pattern": "2:4"},
}  # fmt: skip
"""What must be set for a field to have a meaning."""


def test_every_field_of_the_recipe_has_a_flag():
    assert set(FLAGS) == {field.name for field in dataclasses.fields(Recipe)}


@pytest.mark.parametrize("field", FLAGS)
def test_a_flag_sets_its_field_and_no_other(run, pruning, field):
    flags, value = FLAGS[field]
    result = run("prune", "demo", "-o", "out", *flags)
    assert result.status == 0, result.err
    expected = {"block_size": "64", "damping": "0.1"} if field == "method_options" else value
    assert pruning.kwargs["recipe"] == Recipe(**{field: expected}, **BESIDE.get(field, {}))


def test_a_seed_that_is_typed_is_told_from_one_in_a_file(run, pruning, tmp_path):
    (tmp_path / "recipe.yaml").write_text("seed: 4\n")
    run("prune", "demo", "-o", "out", "--recipe", str(tmp_path / "recipe.yaml"))
    assert "seed" not in pruning.kwargs
    assert pruning.kwargs["recipe"].seed == 4
    run("prune", "demo", "-o", "out", "--seed", "5")
    assert pruning.kwargs["seed"] == pruning.kwargs["recipe"].seed == 5


@pytest.mark.parametrize("field", FLAGS)
def test_a_flag_wins_over_the_recipe_file(run, pruning, tmp_path, field):
    in_file = {
        "method_options": {"block_size": 1, "other": 2},
        "allocation_options": {"other": 2},
        "sparsity": 0.75,
        "pattern": "unstructured",
        "samples": 99,
        "sequence_length": 99,
        "targets": ["*file*"],
        "ignore": "*file*",
        "overrides": [{"match": "*file*", "sparsity": 0.1}],
        "seed": 99,
        "structure": ["kv-groups"],
        "budget": "parameters=0.5",
        "depth_by": "angular",
        "round_to": 99,
        "update": True,
        "permute": False,
        "refit": True,
        "error_correction": 0.25,
        "reconstruct": "block",
        "bits": 8,
        "group_size": 64,
        "reconstruct_options": {"other": 2},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({field: in_file.get(field, "file"), **BESIDE.get(field, {})}))
    flags, value = FLAGS[field]
    run("prune", "demo", "-o", "out", "--recipe", str(file), *flags)
    merged = {
        "method_options": {"block_size": "64", "other": 2, "damping": "0.1"},
        "allocation_options": {"other": 2, "spread": "0.1"},
        "reconstruct_options": {"other": 2, "passes": "2"},
    }  # options are replaced one by one
    wanted = {field: merged.get(field, value), **BESIDE.get(field, {})}
    assert pruning.kwargs["recipe"] == Recipe(**wanted)


def test_flags_that_are_not_given_leave_the_file_its_say(run, pruning, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text('method: wanda\nsparsity: 0.3\nsequence-length: 8\noverrides: [{match: "*a*", sparsity: 0.6}]\n')
    run("prune", "demo", "-o", "out", "--recipe", str(file), "--sparsity", "0.4")
    assert pruning.kwargs["recipe"] == Recipe(
        method="wanda", sparsity=0.4, sequence_length=8, overrides=(Override(match="*a*", sparsity=0.6),)
    )


def test_options_of_the_reconstruction_go_with_any_way_but_none(run, pruning, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("reconstruct: block\nreconstruct_options: {passes: 3}\n")
    run("prune", "demo", "-o", "out", "--recipe", str(file), "--reconstruct", "half-block")
    assert pruning.kwargs["recipe"] == Recipe(reconstruct="half-block", reconstruct_options={"passes": 3})
    result = run("prune", "demo", "-o", "out", "--recipe", str(file), "--reconstruct", "none")
    assert pruning.kwargs["recipe"] == Recipe()
    assert "reconstruct_options are left out" in result.err


def test_options_of_another_method_are_left_out_aloud(run, pruning, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("method: sparsegpt\nmethod_options: {damping: 0.1}\n")
    result = run("prune", "demo", "-o", "out", "--recipe", str(file), "--method", "wanda")
    assert pruning.kwargs["recipe"] == Recipe(method="wanda")
    assert "warning: " in result.err
    assert "method_options" in result.err


@pytest.mark.parametrize(
    "text", ["metod: wanda", "sparsity: much", "- a list", "pattern: 2:4", "method_options: 3", "a: ["]
)
def test_a_bad_recipe_file_is_named(run, pruning, tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    result = run("prune", "demo", "--recipe", str(file), "--method", "wanda")
    assert result.status == 2
    assert file.name in result.err.replace("\n", "")
    assert pruning.calls == 0


def test_a_fault_of_the_file_is_one_even_where_a_flag_would_replace_it(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("sparsity: much\n")
    with pytest.raises(RecipeError, match="sparsity"):
        command.build_recipe({"sparsity": 0.5}, file, Recorder())


@pytest.mark.parametrize(
    ("model", "recipe", "name"),
    [
        ("demo", Recipe(), "demo-alps-0.5"),
        ("folder/model-x/", Recipe(method="wanda", sparsity=0.25), "model-x-wanda-0.25"),
        ("owner/model", Recipe(pattern="2:4"), "model-alps-2-4"),
        ("a/b.Q4_1.gguf", Recipe(method="magnitude"), "b.Q4_1-magnitude-0.5"),
    ],
)
def test_the_default_folder_tells_what_is_in_it(run, pruning, model, recipe, name):
    assert command.default_out(model, recipe) == Path(name)
    result = run("prune", model, "--method", recipe.method, "--pattern", recipe.pattern)
    assert str(pruning.args[1]) in result.err  # it is said before the work starts


def test_the_default_folder_of_the_current_folder_is_named_after_it(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert command.default_out(".", Recipe()) == Path("here-alps-0.5")


def test_the_switches_reach_the_verb(run, pruning):
    run("prune", "m", "-o", "out", "--resume", "--no-verify", "--no-evaluate", "--data", "t.txt", "--prompt", "Hello")
    given = {key: pruning.kwargs[key] for key in ("resume", "overwrite", "verify", "evaluate", "data", "prompt")}
    assert given == {
        "resume": True,
        "overwrite": False,
        "verify": False,
        "evaluate": False,
        "data": "t.txt",
        "prompt": "Hello",
    }


def test_json_is_exactly_the_result(run, pruning):
    def chatter(reporter):
        print("a library talks")
        reporter.stage("pruning", 2)
        reporter.warn("damping was raised")

    pruning.during = chatter
    result = run("prune", "m", "-o", "out", "--json")
    assert json.loads(result.out) == pruning.answer.to_dict()
    assert "a library talks" in result.err
    assert "damping was raised" in result.err


def test_people_read_the_table_the_texts_and_the_verdict(run, pruning):
    out = run("prune", "m", "-o", "out").out
    for text in ("before", "after", "11.25", "22.50", "50.00 %", "400.0 MB", "75.0 %", "a cat [0]", "Once"):
        assert text in out
    assert "It is as fast as before." in out
    assert "verified" in out
    assert "resident" not in out  # never measured: no row


@given(
    st.lists(
        st.tuples(
            st.text(min_size=1).filter(str.strip), st.floats(min_value=0, max_value=1, exclude_max=True).map(abs)
        ),
        max_size=3,
    )
)
def test_overrides_are_read_back_whatever_the_pattern_holds(pairs):
    read = command.parse_overrides([f"{match}={value!r}" for match, value in pairs])
    assert [(item["match"], item["sparsity"]) for item in read] == pairs


@given(st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), st.text().map(str.strip), max_size=4))
def test_method_options_are_read_back_whatever_the_value_holds(options):
    assert command.parse_method_options([f"{key}={value}" for key, value in options.items()]) == options


def test_a_method_option_given_twice_is_refused():
    with pytest.raises(UsageError, match="damping"):
        command.parse_method_options(["damping=1", "damping=2"])


def test_earlier_results_stand_beside(run, pruning, tmp_path):
    """As columns between before and after, when they started from the same model; others are named and left out."""
    pruning.answer.source = {"sha256": "same"}
    for name, digest in (("mine", "same"), ("other", "different")):
        (tmp_path / name).mkdir()
        data = {"source": {"sha256": digest}, "after": measured(perplexity=33.75).to_dict()}
        (tmp_path / name / "secateur.json").write_text(json.dumps(data))
    result = run("prune", "demo", "-o", "out", "--beside", str(tmp_path / "mine"), "--beside", str(tmp_path / "other"))
    assert result.status == 0
    header, first = (line for line in result.out.splitlines() if "\u2503" in line or "perplexity" in line)
    assert header.split() == ["\u2503", "before", "\u2503", "mine", "\u2503", "after"]
    assert [word for word in first.split() if word[0].isdigit()] == ["11.25", "33.75", "22.50"]
    assert "--beside other started from another model" in result.err


@pytest.mark.parametrize("words", [["--round-to", "32"], ["--update"], ["--structure", "depth", "--update"]], ids=str)
def test_a_default_that_is_typed_and_not_looked_at_is_refused(run, pruning, words):
    result = run("prune", "demo", "-o", "out", *words)
    assert result.status == 2
    assert "needs --structure" in result.err
    assert not pruning.calls


def test_a_result_beside_that_is_none_is_refused_before_work(run, pruning, tmp_path):
    result = run("prune", "demo", "-o", "out", "--beside", str(tmp_path))
    assert result.status == 2
    assert "has no secateur.json" in result.err
    assert not pruning.calls
