"""Size, operations, quality and speed of models beside each other."""

from __future__ import annotations

import json
import math

import pytest
import torch

import secateur
from secateur.bench_result import BenchResult, Quantities, RatioResult
from secateur.errors import OutputError, SourceError, UnsupportedModelError, UsageError
from secateur.formats import torchao
from secateur.measure.llama_cpp import is_installed
from secateur.verbs.bench import efficiency, quality_ratio
from secateur.verbs.bench_verdict import bench_sentences
from tests.formats.tokenizers import ROWS, byte_level
from tests.models import save_tiny, tiny_tokenizer

QUICK = {"prompt_tokens": 16, "new_tokens": 4, "rounds": 1, "sequence_length": 64, "threads": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense model that llama.cpp knows, and one with half of its weights zero."""
    root = tmp_path_factory.mktemp("bench")
    dense = save_tiny(root / "dense", "llama", vocab_size=ROWS, hidden_size=64, intermediate_size=96, head_dim=16)
    byte_level().save_pretrained(dense)
    secateur.prune(dense, root / "sparse", method="magnitude", sparsity=0.5, evaluate=False, verify=False)
    return dense, root / "sparse"


@pytest.fixture(scope="module")
def result(folders):
    dense, sparse = folders
    return secateur.bench(sparse, against=[dense], baselines=True, **QUICK)


def test_sizes_and_operations_are_exact(result, folders):
    dense, sparse = folders
    (other,) = [row for row in result.against if row.format == "float32"]
    assert result.parameters == other.parameters
    matrices = sum(one.shape[0] * one.shape[1] for one in secateur.inspect(sparse).matrices)
    assert other.nonzero - result.nonzero == matrices // 2
    assert result.bytes_disk == sum(file.stat().st_size for file in sparse.glob("*.safetensors"))
    assert result.flops_per_token == other.flops_per_token
    # Two operations for each of the weights that are zero.
    assert result.flops_per_token - result.sparse_flops_per_token == pytest.approx(matrices)
    ratio = result.ratio[f"{dense} (transformers, float32)"]
    assert ratio["nonzero"].median == result.nonzero / other.nonzero
    assert not ratio["bytes_disk"].differs


def test_perplexity_is_that_of_evaluate(result, folders):
    found = secateur.evaluate(folders[1], sequence_length=64, samples=12)
    assert result.perplexity == pytest.approx(found.perplexity, rel=1e-6)
    ratio = result.ratio[f"{folders[0]} (transformers, float32)"]["perplexity"]
    assert ratio.low <= ratio.median <= ratio.high
    assert ratio.coverage >= 0.95
    assert result.protocol["perplexity"] == found.protocol["perplexity"]


def test_baselines_are_the_dense_model_in_other_formats(result, folders):
    rows = {(row.name, row.runtime, row.format): row for row in result.against}
    dense = str(folders[0])
    assert (dense, "transformers", "float32") in rows
    half = rows[dense, "transformers", "bfloat16"]
    whole = rows[dense, "transformers", "float32"]
    assert half.bytes_disk == 2 * half.parameters
    assert half.perplexity == pytest.approx(whole.perplexity, rel=0.02)
    # The dense float32 model was there already; without llama.cpp there is a row that says what torchao lacks.
    assert len(rows) == len(result.against) == (4 if is_installed() else 5)
    if is_installed():
        eight, four = (rows[dense, "llama.cpp", kind] for kind in ("q8_0", "q4_0"))
        assert four.bytes_disk < eight.bytes_disk < half.bytes_disk
        assert eight.perplexity == pytest.approx(whole.perplexity, rel=0.02)
        assert eight.decode_tokens_per_second > 0
        assert eight.bytes_resident > 0


@pytest.mark.torchao
@pytest.mark.skipif(not torchao.is_installed(), reason="torchao is not installed; make test runs this apart")
def test_what_llama_cpp_does_not_know_is_rounded_by_torchao(tmp_path):
    folder = save_tiny(tmp_path / "bert", "bert")
    tiny_tokenizer().save_pretrained(folder)
    found = secateur.bench(folder, baselines=True, **QUICK)
    (eight,) = [row for row in found.against if row.format == "torchao int8"]
    assert eight.bytes_disk < found.bytes_disk
    assert eight.prefill_tokens_per_second > 0
    assert (eight.parameters, eight.nonzero) == (found.parameters, found.nonzero)
    assert eight.label in found.ratio


def test_without_torchao_the_row_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(torchao, "is_installed", lambda: False)
    folder = save_tiny(tmp_path / "bert", "bert")
    tiny_tokenizer().save_pretrained(folder)
    found = secateur.bench(folder, baselines=True, **QUICK)
    (eight,) = [row for row in found.against if row.format == "torchao int8"]
    assert eight.missing == {"everything": "--format torchao needs torchao"}


def test_everything_not_measured_has_its_reason(result):
    for row in [result, *result.against]:
        for name in ("joules_per_token", "grams_co2_per_token", "decode_tokens_per_second_batch_8"):
            assert getattr(row, name) is not None or row.missing[name]


def test_the_result_is_plain_data(result):
    BenchResult(**result.to_dict())
    assert result.to_json()


def test_the_result_is_kept_for_a_report_and_never_replaced_unasked(folders, tmp_path):
    out = tmp_path / "bench.json"
    found = secateur.bench(folders[1], out=out, against=[folders[0]], **QUICK)
    assert json.loads(out.read_text()) == json.loads(found.to_json())
    page = secateur.report([folders[1], out], run=False)
    assert {model.kind for model in page.models} >= {"dense", "pruned"}
    with pytest.raises(OutputError, match="exists"):
        secateur.bench(folders[1], out=out, **QUICK)
    with pytest.raises(OutputError, match=r"\.json"):
        secateur.bench(folders[1], out=tmp_path / "bench.txt", **QUICK)
    with pytest.raises(OutputError, match="inside the model"):
        secateur.bench(folders[1], out=folders[1] / "bench.json", **QUICK)


def test_a_model_in_memory_is_measured_like_its_folder(folders):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folders[1])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = secateur.bench(model, tokenizer=byte_level(), data=None, **QUICK)
    assert found.nonzero == secateur.inspect(folders[1]).nonzero
    assert found.missing["perplexity"] == "not asked for"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_encoder_reads_but_does_not_decode(tmp_path):
    folder = save_tiny(tmp_path / "bert", "bert")
    tiny_tokenizer().save_pretrained(folder)
    found = secateur.bench(folder, **QUICK)
    assert found.prefill_tokens_per_second > 0
    assert found.decode_tokens_per_second is None
    assert found.perplexity is None
    assert "next-token logits" in found.missing["perplexity"]


def test_models_with_other_vocabularies_are_compared_by_bits_per_byte(folders, tmp_path):
    other = save_tiny(tmp_path / "other", "llama")
    tiny_tokenizer().save_pretrained(other)
    found = secateur.bench(folders[0], against=[other], **QUICK)
    (theirs,) = found.against
    assert theirs.perplexity is None
    assert "another vocabulary" in theirs.missing["perplexity"]
    ratio = found.ratio[f"{other} (transformers, float32)"]
    assert "perplexity" not in ratio
    assert ratio["bits_per_byte"].low <= ratio["bits_per_byte"].median <= ratio["bits_per_byte"].high
    assert ratio["bits_per_byte"].median == pytest.approx(found.bits_per_byte / theirs.bits_per_byte, rel=0.1)
    said = " ".join(found.verdict)
    assert (
        f"bits per byte, as their vocabularies differ: {found.bits_per_byte:.3f} and {theirs.bits_per_byte:.3f}" in said
    )
    assert "At equal bytes" in said
    assert " bits per byte" in found.verdict[-1]


def test_bits_per_byte_of_one_vocabulary_follow_from_the_perplexity(result, folders):
    """Twelve windows of 64 tokens of a byte-level tokenizer: nats of all by the bytes that 63 of each stand for."""
    (dense,) = [row for row in result.against if row.format == "float32"]
    ours, theirs = math.log(result.perplexity), math.log(dense.perplexity)
    assert result.bits_per_byte / dense.bits_per_byte == pytest.approx(ours / theirs)
    assert "bits_per_byte" not in result.ratio[f"{folders[0]} (transformers, float32)"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"prompt_tokens": 3}, "prompt_tokens is 3"),
        ({"new_tokens": 1}, "new_tokens is 1"),
        ({"threads": 0}, "threads is 0"),
        ({"dtype": "float12"}, "float12"),
        ({"new_tokens": 250}, "no room for a prompt"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(folders, changes, said):
    with pytest.raises(UsageError, match=said):
        secateur.bench(folders[0], **{**QUICK, **changes})


def test_a_model_that_is_not_there_is_refused_before_anything_is_measured(folders):
    with pytest.raises(SourceError):
        secateur.bench(folders[0], against=["no/where/at-all"], **QUICK)


def test_a_model_that_takes_no_row_of_tokens_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="no row of tokens"):
        secateur.bench(save_tiny(tmp_path / "t5", "t5"), **QUICK)


def row(**values):
    return Quantities("dense", "transformers", "float32", **values)


def test_efficiency_is_the_mean_of_four_shares():
    dense = row(parameters=100, flops_per_token=1000.0, bytes_disk=400)
    assert efficiency(dense, dense) == 1.0
    # Half of the parameters in half of the bits: a quarter of the bytes, and here 0.6 of the operations.
    small = row(parameters=50, flops_per_token=600.0, bytes_disk=100)
    assert efficiency(small, dense) == pytest.approx((0.5 + 0.6 + 0.25 + 0.5) / 4)
    assert efficiency(row(parameters=50), dense) is None


def ratio(median, low=None, high=None, differs=True):
    return RatioResult(median, low or median, high or median, 0.98, differs)


def compared(ours, theirs, **ratios):
    key = f"{theirs.name} ({theirs.runtime}, {theirs.format})"
    return bench_sentences(BenchResult(**vars(ours), against=[theirs], ratio={key: ratios}))


def test_zeros_in_dense_kernels_are_the_cause_that_is_named():
    said = " ".join(
        compared(
            row(parameters=100, nonzero=50), row(parameters=100, nonzero=100),
            decode_tokens_per_second=ratio(1.01, 0.97, 1.04, False), bytes_disk=ratio(1.0, differs=False),
        )
    )  # fmt: skip
    assert "no difference shown in decoding (ratio 1.01, between 0.97 and 1.04)" in said
    assert "zeros do not make them faster" in said
    assert "stores a zero like any other number" in said


def test_without_more_zeros_no_cause_is_made_up():
    same = row(parameters=100, nonzero=100)
    said = " ".join(compared(same, same, decode_tokens_per_second=ratio(1.0, differs=False)))
    assert "zeros" not in said


def test_faster_slower_better_and_worse_are_said():
    said = " ".join(
        compared(
            row(perplexity=20.0), row(perplexity=10.0), decode_tokens_per_second=ratio(1.3, 1.2, 1.4),
            prefill_tokens_per_second=ratio(0.7, 0.6, 0.8), perplexity=ratio(2.0), joules_per_token=ratio(0.5),
        )
    )  # fmt: skip
    assert "decoding is faster (ratio 1.30" in said
    assert "reading a prompt is slower (ratio 0.70" in said
    assert "quality is worse (perplexity 20.00 and 10.00; ratio of a window 2.000, between 2.000 and 2.000)" in said
    assert "takes less energy" in said


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ([0.05] * 12, True),
        ([-0.05] * 12, True),
        ([0.0] * 12, False),
        ([0.004] * 12, False),  # sure, but nothing
        ([0.3, -0.2] * 6, False),  # much, but not sure
        ([0.3] * 10 + [-0.2] * 2, True),
        ([0.3] * 5, False),  # five windows are never sure
    ],
)
def test_quality_differs_when_the_windows_agree_on_it(changes, differs):
    theirs = [3.0 + place / 10 for place in range(len(changes))]
    found = quality_ratio([one + change for one, change in zip(theirs, changes, strict=True)], theirs)
    assert found.median == pytest.approx(math.exp(sorted(changes)[len(changes) // 2]), rel=0.3)
    assert found.differs == differs
    word = "quality is worse" if changes[0] > 0 else "quality is better"
    if not differs:
        word = "no difference shown in quality" if len({*changes}) > 1 or len(changes) < 6 else "quality is the same"
    (sentence,) = compared(row(perplexity=20.0), row(perplexity=20.1), perplexity=found)
    assert word in sentence


def test_a_window_that_is_destroyed_is_no_overflow():
    assert quality_ratio([3.0] * 5 + [900.0], [3.0] * 6).high > 1e300


@pytest.mark.parametrize(
    ("bytes_disk", "perplexity", "winner"),
    [(300, 11.0, "other"), (405, 11.0, "other"), (300, 13.0, "ours")],
)
def test_at_equal_bytes_the_table_says_who_wins(bytes_disk, perplexity, winner):
    ours = Quantities("ours", "transformers", "float32", bytes_disk=400, perplexity=12.0)
    other = Quantities("other", "llama.cpp", "q4_0", bytes_disk=bytes_disk, perplexity=perplexity)
    (sentence,) = bench_sentences(BenchResult(**vars(ours), against=[other]))
    assert sentence.startswith(f"At equal bytes {winner} as ")


def test_at_equal_bytes_another_vocabulary_is_weighed_by_its_bytes():
    ours = Quantities("ours", "transformers", "float32", bytes_disk=4e6, perplexity=12.0, bits_per_byte=0.9)
    same = Quantities("same", "transformers", "bfloat16", bytes_disk=2e6, perplexity=12.1, bits_per_byte=0.91)
    other = Quantities("other", "transformers", "float32", bytes_disk=4e6, bits_per_byte=0.8)
    (sentence,) = bench_sentences(BenchResult(**vars(ours), against=[same, other]))
    assert sentence == (
        "At equal bytes other as float32 wins (4.0 MB, 0.800 bits per byte) over ours as float32 (4.0 MB, 0.900 bits "
        "per byte)."
    )
    (sentence,) = bench_sentences(BenchResult(**vars(ours), against=[same]))
    assert "perplexity" in sentence


def test_who_is_compared_with_larger_models_only_does_not_win():
    ours = Quantities("ours", "transformers", "float32", bytes_disk=4_000_000, perplexity=500.0)
    larger = [
        Quantities(name, "transformers", "float32", bytes_disk=size, perplexity=12.0)
        for name, size in (("far", 9_000_000), ("near", 5_000_000))
    ]
    (sentence,) = bench_sentences(BenchResult(**vars(ours), against=larger))
    assert " wins" not in sentence
    assert "the smallest compared is near as float32 (5.0 MB, perplexity 12.00)" in sentence


def test_weights_and_operations_are_said_with_what_zeros_would_save():
    same = row(parameters=100, nonzero=100)
    half = {"parameters": ratio(1.0, differs=False), "nonzero": ratio(0.5)}
    weights, operations = compared(
        same, same, **half, flops_per_token=ratio(1.0, differs=False), sparse_flops_per_token=ratio(0.6)
    )
    assert weights.endswith("it has the same number of weights, and 0.50 times as many that are not zero.")
    assert operations.endswith(
        "a token takes the same operations, and would take 0.60 times with kernels that leave zeros out."
    )
    small = [ratio(0.8), ratio(0.8)]
    (operations,) = compared(same, same, flops_per_token=small[0], sparse_flops_per_token=small[1])
    assert operations.endswith("a token takes 0.80 times the operations.")
