"""An exported .gguf file is the folder's model, by the stock GGUF loader, by llama.cpp, and number by number."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

import secateur
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.source import open_source
from secateur.errors import (
    CheckpointError,
    SecateurError,
    UnknownNameError,
    UnsupportedModelError,
    VerificationError,
    WeightValueError,
)
from secateur.formats.gguf import FAMILIES, GGUF
from secateur.progress import Recorder, Reporter
from tests.checkpoint.tiny_gguf import write_gguf
from tests.formats.tokenizers import ROWS, byte_level, sentencepiece
from tests.models import save_tiny, tiny_model

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": ROWS, "max_position_embeddings": 512}
NARROW = {"intermediate_size": 160, "num_attention_heads": 2, "num_key_value_heads": 1}
"""A model after width pruning: heads that do not fill the hidden size, one group, another inner size."""
GEMMA = {"sliding_window": 32, "query_pre_attn_scalar": 16}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128, "factor": 4.0,
        "long_factor": [1.0 + i for i in range(8)], "short_factor": [1.0 + i / 10 for i in range(8)]}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {}, "gpt-2"),
    "llama, narrow, biases": ("llama", NARROW | {"attention_bias": True, "mlp_bias": True}, "smollm"),
    "llama, untied": ("llama", {"tie_word_embeddings": False}, "smaug-bpe"),
    "llama, llama3": ("llama", {"rope_parameters": LLAMA3}, "llama-bpe"),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, "gpt-2"),
    "mistral": ("mistral", {"sliding_window": None}, "spm"),
    "mistral, narrow": ("mistral", NARROW | {"sliding_window": None}, "tekken"),
    "qwen2": ("qwen2", {}, "qwen2"),
    "qwen2, narrow": ("qwen2", NARROW, "qwen2"),
    "qwen3": ("qwen3", {}, "qwen2"),
    "qwen3, narrow, yarn": ("qwen3", NARROW | {"rope_parameters": YARN}, "qwen2"),
    "gemma3": ("gemma3", GEMMA, "spm, no space"),
    "gemma3, narrow": ("gemma3", NARROW | GEMMA, "spm, no space"),
    "gemma3, irregular": (
        "gemma3",
        GEMMA | {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
        "spm, no space",
    ),
    "phi3": ("phi3", {}, "spm"),
    "phi3, partial": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
        "gpt-4o",
    ),
    "phi3, long": ("phi3", {"original_max_position_embeddings": 128, "rope_parameters": LONG}, "gpt-4o"),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}, "llama-bpe"),
}
STOCK = {
    "llama": True, "llama, untied": True, "mistral": True, "mistral, narrow": True, "qwen2": True,
    "qwen2, narrow": True, "llama, llama3": False, "llama, linear": False, "gemma3": False, "gemma3, narrow": False,
}  # fmt: skip
"""What transformers reads back, and whether as the same model: it passes over scaled frequencies and patterns of
windows. Of the other cases it reads less than that."""


def save(folder: Path, case: str, **changes: Any) -> Path:
    family, values, tokens = CASES[case]
    save_tiny(folder, family, **{**SIZES, **values, **changes})
    tokenizer = sentencepiece(prefix=tokens == "spm") if tokens.startswith("spm") else byte_level(tokens)
    tokenizer.save_pretrained(folder)
    return folder


def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(3, 600, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model.eval()(ids).logits


def stored(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
        for tensor in gguf.GGUFReader(path).tensors
    }


def test_every_family_has_a_case() -> None:
    used = {tiny_model(family, **{**SIZES, **values}).config.model_type for family, values, _ in CASES.values()}
    assert used == set(FAMILIES)


@pytest.mark.parametrize("case", STOCK)
def test_the_stock_loader_reads_the_same_model_back(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.verbs.llama_proof.is_installed", lambda: False)  # the next test is about llama.cpp
    folder, out = save(tmp_path / "model", case), tmp_path / "file" / "model.gguf"
    result = secateur.export(folder, out, quantize="f32")
    assert (result.verified, result.zeros_lost) == (True, 0)
    wanted = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found = transformers.AutoModelForCausalLM.from_pretrained(out.parent, gguf_file=out.name, dtype=torch.float32)
    weights = found.state_dict()
    if type(found) is type(wanted):
        assert all(torch.allclose(weights[key], value, atol=1e-6) for key, value in wanted.state_dict().items())
    if STOCK[case]:
        expected = logits(wanted)
        assert float((logits(found) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
@pytest.mark.parametrize(
    ("case", "quantize"),
    [*((case, "f32") for case in CASES), *((case, "q8_0") for case in CASES if "," not in case or "narrow" in case)],
)
def test_llama_cpp_predicts_what_transformers_does(tmp_path: Path, case: str, quantize: str) -> None:
    recorder = Recorder()
    result = secateur.export(
        save(tmp_path / "model", case), tmp_path / "model.gguf", quantize=quantize, reporter=recorder
    )
    ran = result.runtime
    assert recorder.warnings == []
    assert ran["positions"] >= 200
    assert ran["mean_difference"] <= {"f32": 1e-3, "q8_0": 0.05}[quantize]
    assert ran["texts_tokenised_alike"] == ran["texts"] >= 40
    assert ran["perplexity_transformers"] == pytest.approx(ran["perplexity"], rel=0.01)
    assert ran["prefill_tokens_per_second"] > 0 < ran["decode_tokens_per_second"]


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
def test_llama_cpp_refutes_a_wrong_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.formats import _gguf_rope

    right = _gguf_rope.rope_facts

    def wrong(*given: Any, **named: Any) -> Any:
        facts, tensors = right(*given, **named)
        return facts | {"llama.rope.freq_base": 100.0}, tensors

    monkeypatch.setattr("secateur.formats._gguf_families.rope_facts", wrong)
    with pytest.raises(VerificationError, match="log-probabilities") as caught:
        secateur.export(save(tmp_path / "model", "llama"), tmp_path / "model.gguf", quantize="f32")
    assert caught.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_without_llama_cpp_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.verbs.llama_proof.is_installed", lambda: False)
    result = secateur.export(save(tmp_path / "model", "llama"), tmp_path / "model.gguf")
    assert (result.verified, result.runtime) == (True, {})
    assert any("pip install 'secateur[gguf]'" in warning for warning in result.warnings)


@pytest.mark.parametrize("quantize", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_stored_numbers_are_those_of_the_library_and_zeros_are_counted(tmp_path: Path, quantize: str) -> None:
    folder = save(tmp_path / "model", "qwen3")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:, ::2] = 0
    model.save_pretrained(folder)
    result = secateur.export(folder, tmp_path / "model.gguf", quantize=quantize)
    found = stored(tmp_path / "model.gguf")
    kind = gguf.GGMLQuantizationType[quantize.upper()]
    weight = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    expected = gguf.dequantize(gguf.quantize(weight, kind), kind)
    assert np.array_equal(found["blk.0.ffn_up.weight"], expected)
    assert np.array_equal(found["blk.0.attn_norm.weight"], model.model.layers[0].input_layernorm.weight.detach())
    lost = sum(
        int(((weights := layer.mlp.up_proj.weight.detach().numpy()) == 0).sum())
        - int(((weights == 0) & (found[f"blk.{i}.ffn_up.weight"] == 0)).sum())
        for i, layer in enumerate(model.model.layers)
    )
    assert result.zeros == 2 * 96 * 32
    assert result.zeros_lost == lost
    assert (lost > 0) == quantize.endswith("_1") == any("no longer zero" in one for one in result.warnings)
    few = quantize.startswith(("q4", "q5"))
    assert result.tensors.get("q8_0", 0) == (2 if few else 16 if quantize == "q8_0" else 0)  # embedding and head
    assert result.bytes_disk == (tmp_path / "model.gguf").stat().st_size
    assert result.ratio == pytest.approx(result.bytes_folder / result.bytes_disk)


def test_rows_that_no_block_divides_are_stored_as_f16_with_a_warning(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama", intermediate_size=72)
    result = secateur.export(folder, tmp_path / "model.gguf", quantize="q8_0")
    assert result.tensors["f16"] == 2
    assert any("2 matrices are stored as f16" in warning for warning in result.warnings)


@pytest.mark.parametrize("quantize", ["f32", "f16", "q8_0", "q4_1"])
def test_a_changed_file_does_not_pass(tmp_path: Path, quantize: str) -> None:
    plan = GGUF(quantize=quantize).plan(open_source(save(tmp_path / "model", "llama")), Reporter())
    path = tmp_path / "model.gguf"
    plan.write(path, Reporter())
    plan.check(path, Reporter())
    whole = path.read_bytes()
    tensor = next(one for one in gguf.GGUFReader(path).tensors if one.name == "blk.1.ffn_down.weight")
    place = int(tensor.data_offset) + int(tensor.n_bytes) // 2
    for changed in (
        whole[:place] + bytes(byte ^ 0xFF for byte in whole[place : place + 8]) + whole[place + 8 :],
        whole.replace(b"llama.rope.freq_base", b"llama.rope.freq_bose"),
        whole[:2000],
    ):
        path.write_bytes(changed)
        with pytest.raises(VerificationError):
            plan.check(path, Reporter())


def test_gguf_in_gguf_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    given = write_gguf(tmp_path / "given.gguf", pre="smollm", quantisation=gguf.GGMLQuantizationType.Q8_0)
    secateur.export(given, tmp_path / "made.gguf", quantize="q8_0")
    before, after = (gguf.GGUFReader(path).fields for path in (given, tmp_path / "made.gguf"))
    for key, value in before.items():
        if key.startswith(("llama.", "tokenizer.")):
            assert after[key].contents() == value.contents(), key
    ours, theirs = stored(tmp_path / "made.gguf"), stored(given)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_model_in_memory_is_exported(tmp_path: Path) -> None:
    model = tiny_model("qwen3", **SIZES)
    secateur.export(model, tmp_path / "model.gguf", tokenizer=byte_level("qwen2"), quantize="f32")
    norm = stored(tmp_path / "model.gguf")["output_norm.weight"]
    assert np.array_equal(norm, model.model.norm.weight.detach())
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_the_file_says_how_to_tokenise(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "gemma3")
    secateur.export(folder, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    said = {key.removeprefix("tokenizer."): field.contents() for key, field in fields.items()}
    assert said["ggml.model"] == "llama"
    assert len(said["ggml.tokens"]) == len(said["ggml.scores"]) == len(said["ggml.token_type"]) == ROWS
    assert said["ggml.tokens"][1] == "<s>" == tokenizer.convert_ids_to_tokens(said["ggml.bos_token_id"])
    assert (said["ggml.add_bos_token"], said["ggml.add_eos_token"], said["ggml.add_space_prefix"]) == (
        True,
        False,
        False,
    )
    assert said["chat_template"] == tokenizer.chat_template
    types = dict(zip(said["ggml.tokens"], said["ggml.token_type"], strict=True))
    assert [types[one] for one in ("<unk>", "<s>", "<0x0A>", "<tool>", "▁▁", "[PAD699]")] == [2, 3, 6, 4, 1, 5]


REFUSED: dict[str, tuple[str, dict[str, Any], str, type[SecateurError]]] = {
    "family": ("gpt_neox", {}, "no mapping to GGUF", UnsupportedModelError),
    "activation": ("llama", {"hidden_act": "gelu"}, "its activation is gelu", UnsupportedModelError),
    "softcap": ("gemma3", {"final_logit_softcapping": 30.0, "query_pre_attn_scalar": 8}, "caps its logits",
                UnsupportedModelError),
    "scale": ("gemma3", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar is 99", UnsupportedModelError),
    "rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'",
             UnsupportedModelError),
    "phi3 width": ("phi3", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}, "32 outputs|16 outputs",
                   UnsupportedModelError),
    "rotary": ("smollm3", {"no_rope_layers": [0, 1]}, "not every fourth", UnsupportedModelError),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_cannot_run_is_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    family, changes, message, kind = REFUSED[name]
    folder = save_tiny(tmp_path / "model", family, **changes)
    byte_level().save_pretrained(folder)
    with pytest.raises(kind, match=message) as caught:
        secateur.export(folder, tmp_path / "model.gguf")
    assert (caught.value.exit_code, bool(caught.value.hint)) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_without_a_name_in_llama_cpp_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    with pytest.raises(UnsupportedModelError, match="pre-tokenizer has no name"):
        secateur.export(folder, tmp_path / "model.gguf")
    tokens = byte_level()
    content = json.loads(tokens.backend_tokenizer.to_str())
    content["model"]["merges"] = []
    tokens.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UnsupportedModelError, match="it has no merges"):
        secateur.export(folder, tmp_path / "model.gguf")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UnsupportedModelError, match="no tokenizer"):
        secateur.export(folder, tmp_path / "model.gguf")


def test_a_foreign_tensor_and_a_wrong_shape_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(CheckpointError, match=r"has shape \[64, 96\], the config says \[64, 128\]"):
        secateur.export(folder, tmp_path / "model.gguf")
    model = tiny_model("llama", **SIZES)
    model.model.layers[0].self_attn.register_parameter("sinks", torch.nn.Parameter(torch.zeros(4)))
    model.save_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match="no place for tensor model.layers.0.self_attn.sinks"):
        secateur.export(folder, tmp_path / "model.gguf")


def test_weights_that_the_format_cannot_hold_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for value, quantize, message in ((7e4, "f16", "too large for f16"), (float("nan"), "f32", "NaN or infinite")):
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 5] = value
        model.save_pretrained(folder)
        with pytest.raises(WeightValueError, match=message):
            secateur.export(folder, tmp_path / "model.gguf", quantize=quantize)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_unknown_names_are_refused_with_the_nearest(tmp_path: Path) -> None:
    for given, message, hint in (
        ({"format": "gguff"}, "unknown format 'gguff'", "did you mean 'gguf'"),
        ({"quantize": "q8"}, "unknown quantisation 'q8'", "did you mean 'q8_0'"),
        ({"quantise": "q8_0"}, "unknown option of format gguf 'quantise'", "did you mean 'quantize'"),
    ):
        with pytest.raises(UnknownNameError) as caught:
            secateur.export(tmp_path / "none", tmp_path / "model.gguf", **given)
        assert message in caught.value.message
        assert hint in caught.value.hint


def test_frequencies_of_llama3_are_those_of_transformers(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama, llama3")
    secateur.export(folder, tmp_path / "model.gguf", verify=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    plain = 5e5 ** -(np.arange(0, 16, 2) / 16)
    factors = stored(tmp_path / "model.gguf")["rope_freqs.weight"]
    assert np.allclose(plain / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)
    assert not np.allclose(factors, 1)


def test_a_sliding_window_shortens_the_context(tmp_path: Path) -> None:
    result = secateur.export(save(tmp_path / "m", "mistral", sliding_window=300), tmp_path / "model.gguf")
    assert any("300 tokens (not 512)" in warning for warning in result.warnings)
    assert gguf.GGUFReader(tmp_path / "model.gguf").fields["llama.context_length"].contents() == 300


def test_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    whole = CheckpointReader.tensor
    monkeypatch.setattr(CheckpointReader, "tensor", lambda self, key: read.append(key) or whole(self, key))
    secateur.export(save(tmp_path / "model", "llama"), tmp_path / "model.gguf", verify=False)
    with CheckpointReader(tmp_path / "model") as reader:
        assert sorted(read) == sorted(reader.keys)
