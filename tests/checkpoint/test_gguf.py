"""A converted .gguf file is, bit for bit, the model that the stock loader makes of it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import gguf
import pytest
import torch
import transformers

from secateur.checkpoint.check import check_model_folder
from secateur.checkpoint.demo import MEMBER, SHA256
from secateur.checkpoint.gguf import MANIFEST, convert_gguf, converted_folder, read_manifest
from secateur.checkpoint.pretokenizers import KNOWN, recognise
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.source import open_source
from secateur.errors import CheckpointError, SourceError, UnsupportedModelError
from secateur.progress import Recorder
from tests.checkpoint.strategies import same_bits
from tests.checkpoint.tiny_gguf import write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def stock(path: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantisation", ["Q8_0", "Q4_1", "F16", "F32"])
def test_weights_are_those_of_the_stock_loader(tmp_path: Path, quantisation: str, tied: bool) -> None:
    kind = gguf.GGMLQuantizationType[quantisation]
    path = write_gguf(tmp_path / "tiny.gguf", quantisation=kind, tied=tied)
    recorder = Recorder()
    source = open_source(path, reporter=recorder)
    assert recorder.warnings == []
    assert (source.kind, source.name) == ("gguf", "tiny")
    assert source.original_format == f"GGUF {quantisation}"
    assert source.original_bytes == path.stat().st_size
    config = check_model_folder(source.folder)
    assert "quantization_config" not in config
    assert (config["dtype"], config["architectures"]) == ("float32", ["LlamaForCausalLM"])
    assert config["tie_word_embeddings"] is tied
    expected = stock(path)
    ours = transformers.AutoModelForCausalLM.from_pretrained(source.folder, dtype="auto")
    a, b = expected.state_dict(), ours.state_dict()
    assert a.keys() == b.keys()
    assert all(same_bits(a[key], b[key]) for key in a)
    with CheckpointReader(source.folder) as reader:
        assert ("lm_head.weight" in reader) is not tied
        assert {reader.info(key).dtype for key in reader.keys} == {torch.float32}
    assert ours.generation_config.eos_token_id == expected.config.eos_token_id == 2


def test_tokenizer_and_chat_template_come_along(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    folder = convert_gguf(path)
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert ours("abcab").input_ids == theirs("abcab").input_ids
    assert ours.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


@pytest.mark.parametrize("name", [known.name for known in KNOWN])
def test_the_pre_tokenizer_is_the_one_the_file_names(tmp_path: Path, name: str) -> None:
    folder = convert_gguf(write_gguf(tmp_path / "tiny.gguf", pre=name))
    found = recognise(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
    wanted = next(known for known in KNOWN if known.name == name)
    assert found is not None
    assert (found.steps, found.whole_words) == (wanted.steps, wanted.whole_words)
    assert transformers.AutoTokenizer.from_pretrained(folder)("ab").input_ids


def test_digits_are_cut_off_before_the_white_space_is_divided(tmp_path: Path) -> None:
    cut = {
        pre: transformers.AutoTokenizer.from_pretrained(
            convert_gguf(write_gguf(tmp_path / f"{pre}.gguf", pre=pre))
        ).backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
        for pre in ("gpt-2", "smollm")
    }
    assert [piece for piece, _ in cut["gpt-2"]] == ["a", "Ġ", "Ġ12"]
    assert [piece for piece, _ in cut["smollm"]] == ["a", "ĠĠ", "1", "2"]


def test_files_beside_it_are_not_read(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", None]}}))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    (tmp_path / "config.json").write_text("{broken")
    assert "auto_map" not in (convert_gguf(path) / "tokenizer_config.json").read_text()


def test_the_same_content_is_converted_once(tmp_path: Path, cache: Path) -> None:
    first = convert_gguf(write_gguf(tmp_path / "a.gguf"))
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    second = convert_gguf(write_gguf(tmp_path / "b.gguf"))
    assert first == second
    assert (second / "model.safetensors").stat().st_mtime_ns == stamp
    assert convert_gguf(write_gguf(tmp_path / "a.gguf", tied=False)) != first
    assert not list(cache.rglob("*.partial"))


def test_experts_go_through_the_stock_loader_with_a_warning(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "moe.gguf", architecture="qwen3moe", experts=4)
    recorder = Recorder()
    folder = convert_gguf(path, reporter=recorder)
    assert any("in memory" in warning for warning in recorder.warnings)
    assert "quantization_config" not in check_model_folder(folder)
    a, b = stock(path).state_dict(), transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert a.keys() == b.keys()
    assert all(same_bits(a[key], b[key]) for key in a)


def test_a_tensor_without_a_place_is_not_dropped_silently(tmp_path: Path) -> None:
    recorder = Recorder()
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", extra={"rope_freqs.weight": (4,)}), reporter=recorder)
    assert any("rope_freqs.weight" in warning for warning in recorder.warnings)


def test_a_missing_tensor_is_refused(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", without=("blk.1.ffn_up.weight",))
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight") as caught:
        convert_gguf(path)
    assert caught.value.hint
    assert not [file for file in cache.rglob("*") if file.suffix != ".lock" and file.is_file()]


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", extra={"blk.1.ffn_up.weight": (32, 32)})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight has shape"):
        convert_gguf(path)


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="transformers cannot read") as caught:
        convert_gguf(write_gguf(tmp_path / "tiny.gguf", architecture="nonsense"))
    assert caught.value.hint


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        convert_gguf(tmp_path / "none.gguf")
    path = tmp_path / "text.gguf"
    path.write_text("GGML, not the other")
    with pytest.raises(SourceError, match="not a GGUF file"):
        convert_gguf(path)


def test_a_cut_file_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    data = path.read_bytes()
    cuts = random.Random(0)
    for length in [4, 8, 24, 100, len(data) - 1, *(cuts.randrange(4, len(data)) for _ in range(25))]:
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="truncated or corrupt") as caught:
            convert_gguf(path)
        assert caught.value.hint


def test_a_damaged_cache_says_so(tmp_path: Path) -> None:
    folder = convert_gguf(write_gguf(tmp_path / "tiny.gguf"))
    (folder / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match="damaged"):
        read_manifest(folder)


def test_the_demo_is_the_stock_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the user's own cache
    from secateur.checkpoint.cache import cache_folder

    path = cache_folder() / "demo" / SHA256[:32] / Path(MEMBER).name
    folder = converted_folder(SHA256)
    if not path.exists() or not folder.exists():
        pytest.skip("the demo model was not fetched on this machine")
    expected = stock(path).state_dict()
    with CheckpointReader(folder) as reader:
        assert set(expected) - {"lm_head.weight"} == set(reader.keys)
        assert all(same_bits(reader.tensor(key), expected[key]) for key in reader.keys)
