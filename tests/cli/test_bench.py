"""``secateur bench``: flags become arguments, the result a table or one JSON object."""

from __future__ import annotations

import json
from pathlib import Path

from secateur.bench_result import BenchResult, Quantities, RatioResult

KEY = "dense (transformers, float32)"


def result():
    dense = Quantities("dense", "transformers", "float32", parameters=2_000_000, bytes_disk=8_000_000, perplexity=10.0)
    return BenchResult(
        "pruned", "transformers", "float32", parameters=1_000_000, bytes_disk=4_000_000, perplexity=11.0,
        decode_tokens_per_second=33.3, missing={"joules_per_token": "there is no meter"}, against=[dense],
        ratio={KEY: {"bytes_disk": RatioResult(0.5, 0.5, 0.5, 1.0, True)}},
        verdict=[
            f"Against {KEY}: the file takes 0.50 times the bytes.",
            f"Against {KEY}: quality is worse.",
            "It wins.",
        ],
    )  # fmt: skip


def test_flags_become_arguments(verb, run):
    bench = verb("bench")
    bench.answer = result()
    done = run(
        "bench", "pruned", "--against", "dense", "--against", "small", "--baselines", "--data", "none", "--rounds", "9",
        "-o", "bench.json", "--overwrite",
        "--prompt-tokens", "64", "--new-tokens", "8", "--region", "FRA", "--threads", "2",
    )  # fmt: skip
    assert done.status == 0
    assert bench.args == ("pruned",)
    assert bench.kwargs.pop("reporter") is not None
    assert bench.kwargs == {
        "out": Path("bench.json"), "overwrite": True,
        "against": ("dense", "small"), "baselines": True, "data": None, "sequence_length": None, "prompt_tokens": 64,
        "new_tokens": 8, "rounds": 9, "region": "FRA", "threads": 2, "device": "auto", "dtype": "auto",
    }  # fmt: skip


def test_people_read_a_table_and_sentences_by_model(verb, run):
    verb("bench").answer = result()
    out = run("bench", "pruned").out
    assert "33.3" in out
    assert "J/token" not in out
    lines = [line.strip() for line in out.splitlines()]
    assert lines.count(f"Against {KEY}:") == 1
    assert "the file takes 0.50 times the bytes." in lines
    assert "It wins." in lines
    assert "not measured: joules_per_token: there is no meter" in lines


def test_json_is_one_object_with_the_agreed_keys(verb, run):
    verb("bench").answer = result()
    found = json.loads(run("bench", "pruned", "--json").out)
    assert {
        "bytes_disk", "bytes_resident", "parameters", "nonzero", "flops_per_token", "prefill_tokens_per_second",
        "decode_tokens_per_second", "joules_per_token", "ratio",
    } <= found.keys()  # fmt: skip
    assert found["ratio"][KEY]["bytes_disk"]["median"] == 0.5
