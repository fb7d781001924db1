"""Folders in the sparse format beside plain ones: what they take, and the causes that are told."""

from __future__ import annotations

import sys

import pytest
from safetensors.torch import load_file

import secateur
from secateur.bench_result import BenchResult, Quantities, RatioResult
from secateur.errors import UnsupportedModelError, UsageError
from secateur.packing.header import Header
from secateur.packing.layout import Entry
from secateur.runtime import kernels
from secateur.verbs.bench_verdict import bench_sentences
from tests.models import save_tiny, tiny_tokenizer

QUICK = {"prompt_tokens": 16, "new_tokens": 4, "rounds": 1, "sequence_length": 64, "threads": 1}
HAVE = kernels.find().module is not None


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Dense, pruned, pruned and packed, dense and packed."""
    root = tmp_path_factory.mktemp("bench")
    dense = save_tiny(root / "dense", "llama", hidden_size=64, intermediate_size=96, head_dim=16)
    tiny_tokenizer().save_pretrained(dense)
    secateur.prune(dense, root / "half", method="magnitude", sparsity=0.5, evaluate=False, verify=False)
    options = {"format": "sparse", "bits": 8, "verify": False}
    secateur.export(root / "half", root / "packed", **options)
    secateur.export(dense, root / "eight", force=True, **options)
    return dense, root / "half", root / "packed", root / "eight"


@pytest.fixture(scope="module")
def result(folders):
    dense, half, packed, eight = folders
    return secateur.bench(packed, against=[dense, half, eight], **QUICK)


def test_what_a_packed_model_takes(result, folders):
    dense, half, eight = result.against
    assert [row.format for row in (result, eight, dense)] == ["sparse int8", "dense int8", "float32"]
    assert result.parameters == dense.parameters == eight.parameters
    assert result.bytes_disk == (folders[2] / "model.safetensors").stat().st_size < eight.bytes_disk < half.bytes_disk
    assert result.bytes_resident is not None
    assert result.decode_tokens_per_second > 0
    assert result.flops_per_token == dense.flops_per_token
    # Rounding makes a few more zeros; what is left out of each product is twice the zeros of the blocks.
    assert 0.98 * half.nonzero <= result.nonzero <= half.nonzero
    blocks = secateur.inspect(folders[2])
    assert result.nonzero == blocks.nonzero
    assert dense.flops_per_token - result.sparse_flops_per_token == pytest.approx(2 * blocks.zeros)
    assert result.efficiency < 1
    assert dense.efficiency == 1
    found = secateur.evaluate(folders[2], sequence_length=64, samples=12)
    assert result.perplexity == pytest.approx(found.perplexity, rel=1e-6)


def test_how_packed_weights_are_multiplied_is_told(result):
    dense, half, eight = result.against
    assert not dense.packed
    assert not half.packed
    for row in (result, eight):
        assert row.packed
        assert (row.kernels is not None) == HAVE
        assert ("kernels" in row.missing) != HAVE
    assert ("activations" if HAVE else "not installed") in result.protocol["packed"]
    assert BenchResult(**result.to_dict()).to_json()


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_non_zeros_are_counted_without_unpacking(folders, tmp_path, bits):
    from secateur.measure.size import measure_size

    secateur.export(folders[1], tmp_path / "packed", format="sparse", bits=bits, verify=False)
    secateur.export(tmp_path / "packed", tmp_path / "plain", format="hf", verify=False)
    found = measure_size(tmp_path / "packed")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert found.zeros == {name: int((weight == 0).sum()) for name, weight in plain.items()}
    assert found.parameters == sum(weight.numel() for weight in plain.values())
    assert found.bytes_disk == (tmp_path / "packed" / "model.safetensors").stat().st_size


def test_number_formats_have_names():
    def named(*kinds):
        return Header({f"m{number}": Entry(*kind) for number, kind in enumerate(kinds)}).number_format

    embedding = ("dense", 900, 64, 8, 57600)
    assert named(("dense", 10, 64, 4, 320, 64)) == "dense int4"
    assert named(embedding, ("mask", 10, 64, 4, 300, 64), ("dense", 20, 64, 4, 640, 64)) == "sparse int4"
    assert named(embedding, ("2:4", 10, 64, 16, 320, 0, "float16")) == "2:4 float16"
    assert named(("mask", 10, 64, 8, 300), ("mask", 20, 64, 16, 640, 0, "bfloat16")) == "sparse bfloat16"


def test_the_dense_model_of_a_packed_one_is_found(folders, tmp_path):
    from secateur.checkpoint.source import open_source
    from secateur.progress import Reporter
    from secateur.verbs.bench_entries import source_of

    dense, half, packed, eight = folders
    secateur.export(packed, tmp_path / "plain", format="hf", verify=False)
    for name in (half, packed, eight, tmp_path / "plain"):
        found, source = source_of(str(name), open_source(name, packed=True), Reporter())
        assert (found, source.folder) == (str(dense), dense)
    (tmp_path / "alone").mkdir()
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "alone" / file).write_bytes((packed / file).read_bytes())
    with pytest.raises(UsageError, match="packed from"):
        secateur.bench(tmp_path / "alone", baselines=True, data=None, **QUICK)


def test_pruning_and_recovering_a_packed_model_say_how_to_unpack_it(folders, tmp_path):
    for verb in (secateur.prune, secateur.recover):
        with pytest.raises(UnsupportedModelError, match="packed in the sparse format") as error:
            verb(folders[2], tmp_path / "out")
        assert "--format hf" in error.value.hint
    assert not list(tmp_path.iterdir())


def test_without_the_wheel_the_reason_is_kept(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, kernels.PACKAGE, None)
    kernels.find.cache_clear()
    try:
        found = secateur.bench(folders[2], data=None, **QUICK)
    finally:
        kernels.find.cache_clear()
    assert found.kernels is None
    assert found.missing["kernels"]
    assert found.protocol["packed"].startswith("unpacked each time")


PROMPT, DECODE = "prefill_tokens_per_second", "decode_tokens_per_second"


def row(kind="plain", nonzero=100, name="m"):
    made = Quantities(name, "transformers", "float32" if kind == "plain" else "sparse int8", 100, nonzero)
    made.kernels = "avx2" if kind == "kernels" else None
    if kind == "slow":
        made.missing["kernels"] = "no wheel"
    return made


def said(ours, theirs, name, median, differs=True):
    found = RatioResult(median, median, median, 0.98, differs)
    (sentence,) = bench_sentences(BenchResult(**vars(ours), against=[theirs], ratio={theirs.label: {name: found}}))
    return sentence


@pytest.mark.parametrize(
    ("ours", "theirs", "name", "median", "cause"),
    [
        (row("kernels", 50), row(), DECODE, 2.0, ": the kernels read its weights packed, and zeros are skipped."),
        (row("kernels", 50), row("kernels", name="n"), DECODE, 1.4, ": the kernels read its weights packed, and zeros"),
        (row("kernels"), row(), DECODE, 2.0, ": the kernels read its weights packed."),
        (row("kernels", 50), row(), DECODE, 0.5, "0.50)."),
        (row(), row("kernels", 50), DECODE, 0.5, ": the kernels read the other's weights packed, and zeros are skip"),
        (row("kernels", 50), row(), PROMPT, 0.8, ": for a prompt its weights are unpacked, and zeros save nothing."),
        (row("kernels"), row(), PROMPT, 0.8, ": for a prompt its weights are unpacked."),
        (row("kernels", 50), row(), PROMPT, 1.2, "1.20)."),
        (row("slow", 50), row(), DECODE, 0.2, ": its packed weights are unpacked each time they are used (no wheel)."),
        (row(), row("slow", 50), DECODE, 5.0, ": the other's packed weights are unpacked each time"),
        (row("slow", 50), row(), DECODE, 1.5, "1.50)."),
    ],
)  # fmt: skip
def test_the_cause_is_told_in_the_direction_in_which_it_works(ours, theirs, name, median, cause):
    assert cause in said(ours, theirs, name, median)


def test_zeros_of_packed_weights_are_never_said_to_bring_nothing():
    sentence = said(row("kernels", 50), row("kernels", name="n"), DECODE, 1.0, differs=False)
    assert sentence.endswith("1.00).")
    assert "dense" not in sentence
    smaller = said(row("kernels", 50), row(), "bytes_disk", 0.3)
    assert smaller.endswith("0.30 times the bytes: of a zero it stores a bit.")
