"""``secateur convert``: what the flags become, and the table."""

from __future__ import annotations

import json

import pytest

from secateur.cli.app import main
from secateur.cli.convert import spread_values
from secateur.result import ConvertResult, Measured


def result() -> ConvertResult:
    side = Measured(100, 100, 0.0, 400, "float32", perplexity=10.0)
    return ConvertResult("out", {}, "fused", {}, [], 1.0, 1000, side, side, True, verdict=["It is smaller."])


def test_flags_become_options(verb, capsys):
    convert = verb("convert")
    convert.answer = result()
    command = [
        "convert",
        "BASE",
        "--to",
        "fused",
        "--models",
        "A",
        "B",
        "-o",
        "OUT",
        "--rank",
        "16",
        "--router-rank",
        "4",
    ]
    assert main([*command, "--json"]) == 0
    assert convert.args == ("BASE", convert.args[1])
    assert str(convert.args[1]) == "OUT"
    assert convert.kwargs["models"] == ("A", "B")
    assert (convert.kwargs["rank"], convert.kwargs["router_rank"], convert.kwargs["to"]) == ("16", 4, "fused")
    assert "cores" not in convert.kwargs
    assert json.loads(capsys.readouterr().out)["conversion"] == "fused"


def test_the_table_has_both_sides_and_the_verdict(verb, capsys):
    convert = verb("convert")
    convert.answer = result()
    assert main(["convert", "BASE", "--to", "factorized", "--budget", "parameters=0.8", "--cores", "3"]) == 0
    assert str(convert.args[1]) == "BASE-factorized"
    shown = capsys.readouterr()
    assert "It is smaller." in shown.out
    assert "perplexity" in shown.out
    assert "verified" in shown.out


@pytest.mark.parametrize(("given", "made"), [
    ("m --models A B -o out", "m --models A --models B -o out"),
    ("m --models A --models B", "m --models A --models B"),
    ("--models A B --rank 3 m", "--models A --models B --rank 3 m"),
    ("m -o out", "m -o out"),
])  # fmt: skip
def test_every_word_after_models_is_a_model(given, made):
    assert spread_values(given.split()) == made.split()


@pytest.mark.parametrize("arguments", ["m --to fused --models", "m --to fused --models --rank 3", "m"])
def test_what_cannot_be_parsed_is_bad_usage(arguments, capsys):
    assert main(["convert", *arguments.split()]) == 2
    assert capsys.readouterr().err.count("error:") == 1


def test_methods_tell_the_options_of_a_conversion(capsys):
    assert main(["methods", "factorized", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "conversions"
    assert {"cores", "rank", "budget", "share_central"} <= {option["name"] for option in told["options"]}
