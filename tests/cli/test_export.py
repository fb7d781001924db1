"""``secateur export``: flags become the arguments of the verb, its result a table or one JSON object."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from secateur.result import ExportResult, StoredMatrix


def result(**changes) -> ExportResult:
    values = {
        "out": "m.gguf", "source": {}, "format": "gguf", "options": {"quantize": "q8_0"}, "bytes_disk": 2_000_000,
        "bytes_folder": 8_000_000, "ratio": 4.0, "tensors": {"q8_0": 7, "f32": 3}, "zeros": 1000, "zeros_lost": 100,
        "seconds": 3.0, "peak_rss_bytes": 5_000_000, "verified": True,
    }  # fmt: skip
    return ExportResult(**{**values, **changes})


RAN = {
    "package": "xllamacpp 1", "positions": 256, "mean_difference": 0.0123, "same_best": 0.5, "perplexity": 14.1,
    "perplexity_folder": 14.0, "prefill_tokens_per_second": 99.0, "decode_tokens_per_second": 11.0,
}  # fmt: skip


def test_flags_become_arguments(verb, run, tmp_path):
    export = verb("export")
    export.answer = result()
    done = run("export", "demo", "-o", str(tmp_path / "x.gguf"), "--quantize", "q4_0", "--overwrite", "--no-verify")
    assert done.status == 0
    assert export.args == ("demo", tmp_path / "x.gguf")
    assert export.kwargs.pop("reporter") is not None
    assert export.kwargs == {"format": "gguf", "quantize": "q4_0", "overwrite": True, "verify": False}


def test_without_flags_the_defaults_are_the_verbs_and_the_name_is_the_models(verb, run):
    export = verb("export")
    export.answer = result()
    done = run("export", "some/model")
    assert export.args == ("some/model", Path("model.gguf"))
    assert "quantize" not in export.kwargs
    assert "the result goes to model.gguf" in done.err


@pytest.mark.parametrize(("runtime", "said"), [({}, "verified, but not run"), (RAN, "(verified;")])
def test_people_read_sizes_zeros_and_what_llama_cpp_made_of_it(verb, run, runtime, said):
    verb("export").answer = result(runtime=runtime)
    out = " ".join(run("export", "demo").out.split())
    for text in ("7 q8_0, 3 f32", "8.0 MB", "2.0 MB, 4.00 times smaller", "900 of 1,000", said):
        assert text in out
    assert ("0.0123" in out) == bool(runtime)


def test_json_is_one_object(verb, run):
    verb("export").answer = result(runtime=RAN)
    found = json.loads(run("export", "demo", "--json").out)
    assert (found["format"], found["bytes_disk"], found["verified"]) == ("gguf", 2_000_000, True)
    assert found["runtime"]["positions"] == 256


def test_an_unknown_format_is_refused_before_anything_heavy(run):
    done = run("export", "demo", "--format", "ggfu")
    assert (done.status, done.out) == (2, "")
    assert "unknown format 'ggfu'" in done.err
    assert "did you mean 'gguf'" in done.err


def test_flags_of_the_sparse_format_become_options(verb, run):
    export = verb("export")
    export.answer = result(format="sparse")
    flags = ["--bits", "8", "--group-size", "64", "--embedding-bits", "4", "--force"]
    done = run("export", "some/model", "--format", "sparse", *flags)
    assert done.status == 0
    assert export.args == ("some/model", Path("model-sparse"))
    wanted = {"bits": 8, "group_size": 64, "embedding_bits": 4, "force": True}
    assert export.kwargs.items() >= wanted.items()


def test_people_read_how_each_matrix_is_stored_and_why(verb, run):
    stored = [
        StoredMatrix(f"model.layers.{i}.up_proj", [64, 32], "mask", 8, 1000 + i, 1500, 5.9, "few", in_block=True)
        for i in range(2)
    ]
    stored.append(StoredMatrix("lm_head", [64, 32], "plain", 16, 0, 4096, 16.0, "no zeros", in_block=False))
    runtime = {"package": "transformers, fresh process", "output_difference": 0.0012}
    verb("export").answer = result(format="sparse", matrices=stored, bits_per_weight=5.861, runtime=runtime)
    shown = run("export", "demo", "--format", "sparse").out.replace("│", " ")
    out = [" ".join(line.split()) for line in shown.splitlines()]
    assert "model.layers.*.up_proj 2 64 x 32 mask, 8 bits 49% 3,000 5.86 few" in out
    assert "lm_head 1 64 x 32 plain, 16 bits 0% 4,096 16.00 no zeros" in out
    assert "bits for each weight of the blocks 5.86" in out
    assert "largest difference of an output 0.12 %" in out
    each = run("export", "demo", "--format", "sparse", "--each").out
    assert "model.layers.1.up_proj" in each
