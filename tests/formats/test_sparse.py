"""The sparse format from end to end: exported, read by others, run by transformers, unpacked again."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

import secateur
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.source import open_source
from secateur.errors import OutputError, UnsupportedModelError, UsageError, VerificationError, WeightValueError
from secateur.formats.hf import HF
from secateur.formats.sparse import Sparse
from secateur.progress import Recorder, Reporter
from secateur.runtime import kernels
from secateur.verbs.export import export
from tests.models import save_tiny, tiny_model, tiny_tokenizer
from tests.oracles.sparse_reader import read_folder, read_tensors

FRESH_INTERPRETERS = True  # there secateur comes after transformers, and before its registries
IDS = torch.arange(3, 35).reshape(2, 16)


def pruned(family: str, share: float = 0.6, dtype: torch.dtype = torch.bfloat16, **changes):
    """A model whose block matrices have ``share`` zeros."""
    model = tiny_model(family, **changes)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and any(f".{part}." in f".{name}" for part in ("layers", "h", "block", "layer")):
                weight[torch.rand(weight.shape, generator=generator) < share] = 0
    return model.to(dtype)


def save(folder, model, **options):
    model.save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def opened(folder, like):
    return type(like).from_pretrained(folder, dtype="auto")


def logits(model):
    extra = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(IDS, **extra).logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a pruned Llama of 40 x 136 matrices, so that words have tails, and the model."""
    model = pruned("llama", intermediate_size=136, hidden_size=40, head_dim=10)
    return save(tmp_path_factory.mktemp("llama") / "llama", model), model


@pytest.fixture
def whole_activations(monkeypatch):
    """Where there are kernels, they do not round activations."""
    monkeypatch.setenv(kernels.ACTIVATIONS, "float")
    kernels.activations.cache_clear()
    yield
    kernels.activations.cache_clear()


@pytest.mark.usefixtures("whole_activations")
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "mixtral", "gemma3", "qwen3"])
def test_each_family_is_packed_run_saved_and_unpacked(family, tmp_path):
    model = pruned(family)
    folder = save(tmp_path / "m", model)
    for bits in (16, 8):
        packed, plain, again = (tmp_path / f"{bits}-{name}" for name in ("packed", "plain", "again"))
        export(folder, packed, format="sparse", bits=bits, verify=False)
        export(packed, plain, format="hf")
        ours, theirs = opened(packed, model), opened(plain, model)
        assert ours.dtype == theirs.dtype == torch.bfloat16
        wide = logits(ours).float(), logits(theirs).float()
        assert (wide[0] - wide[1]).abs().max() <= 0.02 * wide[1].abs().max()
        if bits == 16:
            stored = theirs.state_dict()
            assert all(torch.equal(weight, stored[name]) for name, weight in model.state_dict().items())
        assert any("values" in name for name, _ in ours.named_buffers())
        ours.save_pretrained(again)
        assert read_tensors(again) == read_tensors(packed)
        assert torch.equal(logits(opened(again, model)), logits(ours))


def test_weights_on_a_grid_are_proved_without_rounding_activations(tmp_path):
    """Nothing is rounded in such an export, so its outputs must be those of the source."""
    model = pruned("llama", intermediate_size=136, hidden_size=64).float()
    folder = save(tmp_path / "m", model)
    secateur.prune(folder, tmp_path / "grid", method="sparsegpt", sparsity=0.5, bits=8, group_size=64, verify=False,
                   evaluate=False, calibration=IDS)  # fmt: skip
    result = export(tmp_path / "grid", tmp_path / "out", format="sparse", bits=8, group_size=64, embedding_bits=16)
    assert result.verification["largest_difference"]["8 bits"] == 0
    assert result.runtime["output_difference"] < 1e-5


def test_a_verified_export_says_what_it_did(llama, tmp_path):
    folder, model = llama
    result = export(folder, tmp_path / "out", format="sparse")
    assert result.verified
    assert result.runtime["output_difference"] < 1e-5  # the kernels add up in another order
    assert result.verification["largest_difference"] == {"16 bits": 0.0}
    blocks = [matrix for matrix in result.matrices if matrix.in_block]
    assert len(blocks) == 14
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for matrix in blocks:
        weight = model.get_parameter(f"{matrix.name}.weight")
        assert matrix.zeros == (weight == 0).sum()
        own = [tensor for name, tensor in tensors.items() if name.rpartition(".")[0] == matrix.name]
        assert matrix.nbytes == sum(tensor.nbytes for tensor in own)
    weights = sum(model.get_parameter(f"{matrix.name}.weight").numel() for matrix in blocks)
    assert result.bits_per_weight == pytest.approx(8 * sum(matrix.nbytes for matrix in blocks) / weights)
    told = json.loads((tmp_path / "out" / "secateur.json").read_text())
    assert told["shards"] == result.shards
    assert "import secateur" in (tmp_path / "out" / "README.md").read_text()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(("bits", "group"), [(16, None), (8, None), (8, 64), (4, 64), (4, 0)])
def test_a_reader_written_from_the_page_reads_the_same_numbers(llama, tmp_path, bits, group):
    folder, model = llama
    with torch.no_grad():  # one matrix that is 2:4, one without zeros
        model.model.layers[0].mlp.up_proj.weight.normal_().view(-1, 4)[:, ::2] = 0
        model.model.layers[1].mlp.gate_proj.weight.fill_(0.25).mul_(torch.arange(1, 41) / 8)
    folder = save(tmp_path / "m", model)
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    embedding = 4 if bits < 16 else None
    export(folder, packed, format="sparse", bits=bits, group_size=group, embedding_bits=embedding, verify=False)
    config = json.loads((packed / "config.json").read_text())
    config["dtype"] = "float32"  # in which numbers of 8 and 4 bits are exact
    (packed / "config.json").write_text(json.dumps(config))
    export(packed, plain, format="hf", verify=False)
    kinds = {entry["kind"] for entry in config["quantization_config"]["matrices"].values()}
    assert kinds == ({"mask", "2:4"} if bits == 16 else {"mask", "2:4", "dense"})
    found = load_file(plain / "model.safetensors")
    for name, rows in read_folder(packed).items():
        assert torch.equal(torch.tensor(rows), found[f"{name}.weight"].float()), name


def test_a_reader_written_from_the_page_reads_conv1d_and_float16(tmp_path):
    model = pruned("gpt2", dtype=torch.float16)
    export(save(tmp_path / "m", model), tmp_path / "out", format="sparse", verify=False)
    found = read_folder(tmp_path / "out")
    assert "transformer.h.0.attn.c_attn" in found
    for name, rows in found.items():
        assert torch.equal(torch.tensor(rows).T, model.get_parameter(f"{name}.weight").float())
    assert opened(tmp_path / "out", model).dtype == torch.float16


@pytest.mark.parametrize("bits", [8, 4])
def test_what_was_rounded_stays_within_what_rounding_explains(llama, tmp_path, bits):
    folder, _ = llama
    plan = Sparse(bits=bits).plan(open_source(folder), Reporter())
    export(folder, tmp_path / "out", format="sparse", bits=bits, verify=False)
    found = plan.check(tmp_path / "out", Reporter())
    assert 0 < found["largest_difference"][f"{bits} bits"] < {8: 0.008, 4: 0.31}[bits]
    dense, sparse = secateur.inspect(folder), secateur.inspect(tmp_path / "out")
    assert [matrix.name for matrix in sparse.matrices] == [matrix.name for matrix in dense.matrices]
    assert all(ours.zeros >= theirs.zeros for ours, theirs in zip(sparse.matrices, dense.matrices, strict=True))
    assert sparse.parameters == dense.parameters
    assert f"mask of {bits} bits" in sparse.dtype


def test_shards_are_kept_and_a_tied_head_is_stored_once(tmp_path):
    model = pruned("llama", share=0.7)
    folder = save(tmp_path / "m", model, max_shard_size="9KB")
    export(folder, tmp_path / "out", format="sparse", bits=8, verify=False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert "model.embed_tokens.values" in index["weight_map"]
    assert not any(key.startswith("lm_head") for key in index["weight_map"])
    ours = opened(tmp_path / "out", model)
    assert torch.equal(ours.lm_head.weight, ours.model.embed_tokens.weight)
    largest = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert all(path.stat().st_size <= largest + 4096 for path in (tmp_path / "out").glob("*.safetensors"))


def test_a_float32_model_is_rounded_and_told_so(tmp_path):
    model = pruned("llama", dtype=torch.float32)
    recorder = Recorder(Reporter())
    export(save(tmp_path / "m", model), tmp_path / "out", format="sparse", reporter=recorder, verify=False)
    assert any("F32 are rounded to bfloat16: the file is not lossless" in warning for warning in recorder.warnings)
    with CheckpointReader(tmp_path / "out") as reader:
        assert reader.info("model.norm.weight").dtype == torch.float32
        assert reader.info("model.embed_tokens.weight").dtype == torch.bfloat16
    ours = opened(tmp_path / "out", model)
    rounded = model.model.layers[0].mlp.up_proj.weight.to(torch.bfloat16).float()
    assert torch.equal(ours.model.layers[0].mlp.up_proj.weight, rounded)


def test_a_model_without_zeros_is_refused_with_what_it_would_cost(tmp_path):
    folder = save(tmp_path / "m", tiny_model("llama").to(torch.bfloat16))
    for bits in (16, 8):
        with pytest.raises(UnsupportedModelError, match=r"0\.0% of .* are zero\); the file would take .* bits"):
            export(folder, tmp_path / "out", format="sparse", bits=bits)
    with pytest.raises(UnsupportedModelError, match="nothing to round at 16 bits"):
        export(folder, tmp_path / "out", format="sparse", force=True)
    assert not (tmp_path / "out").exists()
    result = export(folder, tmp_path / "out", format="sparse", bits=8, force=True, verify=False)
    assert {matrix.kind for matrix in result.matrices} == {"dense"}
    assert len(result.warnings) == 1


@pytest.mark.parametrize(("bits", "kind"), [(16, "plain"), (8, "dense"), (4, "dense")])
def test_a_matrix_in_which_zeros_do_not_pay_stays_dense_and_the_table_says_why(bits, kind, tmp_path):
    model = pruned("llama")
    with torch.no_grad():
        full = model.model.layers[1].self_attn.o_proj.weight
        full[full == 0] = 0.5
        few = model.model.layers[0].mlp.down_proj.weight
        few.fill_(0.5)[0, :3] = 0
    folder = save(tmp_path / "m", model)
    result = export(folder, tmp_path / "out", format="sparse", bits=bits, verify=False)
    told = {matrix.name: matrix for matrix in result.matrices}
    for name in ("model.layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj"):
        assert told[name].kind == kind
        assert re.fullmatch(
            r"\d+% zeros as stored do not pay: \d+\.\d\d bits a weight with a mask, \d+\.\d\d without",
            told[name].reason,
        )
        mask, dense = (float(number) for number in re.findall(r"\d+\.\d\d", told[name].reason))
        assert mask > dense
    others = [one for one in told.values() if one.in_block and one.kind != kind]
    assert len(others) == len([one for one in told.values() if one.in_block]) - 2
    assert all("without a mask" in one.reason or "every four" in one.reason for one in others)


@pytest.mark.parametrize(
    "options", [{"bits": 5}, {"group_size": 32, "bits": 8}, {"embedding_bits": 3}, {"group_size": 64}, {"bits": "x"}]
)
def test_options_that_make_no_sense(options, tmp_path):
    with pytest.raises(UsageError):
        export("nowhere", tmp_path / "out", format="sparse", **options)


def test_bad_weights_and_places_are_refused(llama, tmp_path):
    folder, _ = llama
    broken = pruned("llama")
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(WeightValueError, match="up_proj"):
        export(save(tmp_path / "b", broken), tmp_path / "out", format="sparse")
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists"):
        export(folder, tmp_path / "there", format="sparse")
    export(folder, tmp_path / "packed", format="sparse", verify=False)
    with pytest.raises(UnsupportedModelError, match="packed in the sparse format"):
        export(tmp_path / "packed", tmp_path / "twice", format="sparse")


def test_a_failure_leaves_nothing_behind(llama, tmp_path, monkeypatch):
    folder, _ = llama
    monkeypatch.setattr("secateur.formats.sparse.SparsePlan.check", lambda *_: (_ for _ in ()).throw(ValueError("x")))
    with pytest.raises(ValueError, match="x"):
        export(folder, tmp_path / "out", format="sparse")
    assert list(tmp_path.iterdir()) == []


def test_a_changed_number_is_found_by_the_check(llama, tmp_path):
    folder, _ = llama
    for made in (Sparse(bits=8), Sparse()):
        out = tmp_path / str(made.bits)
        out.mkdir()
        plan = made.plan(open_source(folder), Reporter())
        plan.write(out, Reporter())
        plan.check(out, Reporter())
        with CheckpointReader(out) as reader:
            info = reader.info("model.layers.1.mlp.down_proj.values")
        with (out / info.shard).open("r+b") as file:
            file.seek(info.offset + 3)
            octet = file.read(1)[0]
            file.seek(info.offset + 3)
            file.write(bytes([octet ^ 0x40]))
        with pytest.raises(VerificationError, match="down_proj"):
            plan.check(out, Reporter())


def test_a_changed_number_of_an_unpacked_folder_is_found_too(llama, tmp_path):
    plan = HF().plan(open_source(llama[0]), Reporter())
    plan.write(tmp_path, Reporter())
    plan.check(tmp_path, Reporter())
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(VerificationError, match="differs from the source"):
        plan.check(tmp_path, Reporter())


def test_verbs_take_a_packed_folder(llama, tmp_path):
    folder, _ = llama
    packed = tmp_path / "packed"
    export(folder, packed, format="sparse", verify=False)
    pieces: list[str] = []
    text = secateur.generate(packed, "abc", new_tokens=8, device="cpu", stream=pieces.append)
    assert text == secateur.generate(folder, "abc", new_tokens=8, device="cpu") == "".join(pieces)
    measured = [
        secateur.evaluate(one, sequence_length=64, samples=2, device="cpu").perplexity for one in (folder, packed)
    ]
    assert measured[0] == pytest.approx(measured[1], rel=1e-6)
    pipeline = transformers.pipeline("text-generation", model=str(packed), device="cpu")
    made = pipeline("abc", max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert made == text
    shutil.rmtree(packed)


def test_an_ordinary_folder_becomes_an_ordinary_folder(tmp_path):
    folder = save_tiny(tmp_path / "m", "qwen2")
    result = export(folder, tmp_path / "out", format="hf")
    assert result.verified
    assert read_tensors(tmp_path / "out") == read_tensors(folder)
