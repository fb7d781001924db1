"""The other commands: what reaches the verb, what is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from secateur.plugins import available, describe
from secateur.result import EvaluateResult, InspectResult, Matrix, Unprunable


@pytest.fixture
def inspecting(verb):
    stand_in = verb("inspect")
    names = [f"model.layers.{block}.mlp.up_proj.weight" for block in range(12)]
    stand_in.answer = InspectResult(
        model="m",
        architecture="SomeForCausalLM",
        dtype="bfloat16",
        parameters=1000,
        nonzero=900,
        prunable=480,
        zeros=96,
        sparsity=0.2,
        bytes_disk=2_000_000,
        blocks=12,
        matrices=[Matrix(name, [8, 5], 8) for name in names],
        unprunable=[Unprunable("embed", [10, 4], "embedding [tied]"), Unprunable("norm", [4], "a vector")],
    )
    return stand_in


def test_inspect_groups_matrices_by_kind(run, inspecting):
    out = run("inspect", "m").out
    rows = [line for line in out.splitlines() if "up_proj" in line]
    assert len(rows) == 1
    assert "model.layers.*.mlp.up_proj.weight" in rows[0]
    assert "12" in rows[0]
    assert "96" in rows[0]
    assert "embedding [tied]" in out
    assert "20.00 %" in out


def test_inspect_each_lists_them_all(run, inspecting):
    out = run("inspect", "m", "--each").out
    assert all(matrix.name in out for matrix in inspecting.answer.matrices)


def test_inspect_json_is_exactly_the_result(run, inspecting):
    assert json.loads(run("inspect", "m", "--json").out) == inspecting.answer.to_dict()


def test_evaluate_passes_all_and_shows_errors_and_protocol(run, verb):
    stand_in = verb("evaluate")
    stand_in.answer = EvaluateResult(
        model="m",
        perplexity=12.5,
        perplexity_stderr=0.25,
        tokens=4096,
        accuracy={"pairs.jsonl": 0.8},
        accuracy_stderr={"pairs.jsonl": 0.01},
        protocol={"window": 64},
    )
    arguments = ["m", "--data", "t.txt", "--sequence-length", "64", "--samples", "3", "--files", "a.jsonl"]
    arguments += ["--files", "b.jsonl", "--tasks", "arc", "--device", "cpu", "--dtype", "float32"]
    result = run("evaluate", *arguments)
    kwargs = {key: value for key, value in stand_in.kwargs.items() if key != "reporter"}
    assert stand_in.args == ("m",)
    assert kwargs == {
        "data": "t.txt",
        "sequence_length": 64,
        "samples": 3,
        "files": (Path("a.jsonl"), Path("b.jsonl")),
        "tasks": ("arc",),
        "against": None,
        "device": "cpu",
        "dtype": "float32",
    }
    for text in ("12.50 ± 0.25", "4,096", "80.0 % ± 1.0 %", "window", "64"):
        assert text in result.out
    assert json.loads(run("evaluate", *arguments, "--json").out) == stand_in.answer.to_dict()


def test_generate_passes_on_what_loading_warns_of(run, verb):
    stand_in = verb("generate")
    stand_in.answer = "text"
    stand_in.during = lambda reporter: reporter.warn("a tensor has no place")
    assert "warning: a tensor has no place" in run("generate", "m", "--prompt", "Once", "--quiet").err


def test_generate_prints_the_text_as_it_is(run, verb):
    stand_in = verb("generate")
    stand_in.answer = " a [red]cat[/red]\n  indented"
    result = run(
        "generate", "m", "--prompt", "Once", "--new-tokens", "5", "--temperature", "0.5", "--seed", "3", "--chat"
    )
    assert result.out == stand_in.answer + "\n"
    assert stand_in.args == ("m", "Once")
    assert stand_in.kwargs.pop("reporter") is not None
    assert stand_in.kwargs == {
        "new_tokens": 5,
        "seed": 3,
        "temperature": 0.5,
        "chat": True,
        "device": "auto",
        "dtype": "auto",
        "stream": stand_in.kwargs["stream"],
    }
    answer = json.loads(run("generate", "m", "--prompt", "Once", "--json").out)
    assert answer == {"model": "m", "prompt": "Once", "text": stand_in.answer}


def test_methods_lists_every_plugin_with_its_line(run):
    kinds = (
        "combinations",
        "methods",
        "criteria",
        "expert_criteria",
        "allocation",
        "schedules",
        "conversions",
        "formats",
    )
    found = {kind: available(kind) for kind in kinds}
    assert len(found["methods"]) >= 4
    out = run("methods").out
    for lines in found.values():
        for name, line in lines.items():
            assert any(row.split()[:1] == [name] and line in row for row in out.splitlines())
    assert json.loads(run("methods", "--json").out) == found


@pytest.mark.parametrize(
    ("kind", "name"), [(k, name) for k in ("methods", "criteria", "expert_criteria") for name in available(k)]
)
def test_methods_tells_the_options_of_one(run, kind, name):
    described = describe(kind, name, "method")
    result = run("methods", name)
    assert result.status == 0
    for option in described.options:
        assert option.help, f"option {option.name} of {name} has no docstring"
        assert option.name in result.out
    answer = json.loads(run("methods", name, "--json").out)
    (own,) = (one for one in [answer, *answer["others"]] if one["kind"] == kind)
    assert [option["name"] for option in own["options"]] == [option.name for option in described.options]


def test_an_unknown_method_gets_the_nearest_name(run):
    assert "did you mean 'wanda'?" in run("methods", "wandda").err


def test_version(run):
    assert run("--version").out.startswith("secateur ")
