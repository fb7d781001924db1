"""Bad models are refused before work starts: one class for each cause, a message that names the place, and a hint."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from secateur.checkpoint.check import check_finite, check_model_folder, hash_folder
from secateur.checkpoint.reader import CheckpointReader
from secateur.errors import (
    CheckpointError,
    SecateurError,
    SourceError,
    UnsafeCheckpointError,
    UnsupportedModelError,
    WeightValueError,
)
from tests.models import save_tiny

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("whole"), "llama")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("sharded"), "llama", max_shard_size="20KB")


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "model"))


def refused(folder: Path, kind: type[SecateurError], *words: str) -> None:
    """Refused by exactly this class, naming all of this, with a hint, in one line, leaving everything as it was."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SecateurError) as caught:
        check_model_folder(folder)
    assert type(caught.value) is kind
    for word in (*words, str(folder)):
        assert word in caught.value.message
    assert caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint
    assert caught.value.exit_code == 2
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "vit", "mixtral", "bert"])
def test_whole_models_pass(tmp_path: Path, family: str) -> None:
    save_tiny(tmp_path, family)
    assert check_model_folder(tmp_path) == json.loads((tmp_path / "config.json").read_text())


def test_no_such_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", SourceError, "no such folder")


def test_no_config(model: Path) -> None:
    (model / "config.json").unlink()
    refused(model, SourceError, "config.json")


@pytest.mark.parametrize("text", ["", "{", "[1]", '"text"', "[" * 100_000, "\x00"])
def test_config_that_is_not_json(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    refused(model, SourceError, "config.json")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_remote_code(model: Path, name: str) -> None:
    edit(model / name, lambda config: config.update(auto_map={"AutoModel": "modeling_x.X"}))
    refused(model, UnsafeCheckpointError, name, "auto_map")


def test_unknown_model_type_and_class(model: Path) -> None:
    edit(model / "config.json", lambda config: config.update(architectures=["MyOwnForCausalLM"]))
    refused(model, UnsafeCheckpointError, "MyOwnForCausalLM")
    edit(model / "config.json", lambda config: config.update(model_type="my_own"))
    refused(model, UnsafeCheckpointError, "my_own")
    edit(model / "config.json", lambda config: config.pop("model_type"))
    refused(model, SourceError, "model_type")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickled_weights_only(model: Path, name: str) -> None:
    (model / "model.safetensors").rename(model / name)
    refused(model, UnsafeCheckpointError, name)


def test_no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    refused(model, CheckpointError, "no weights")


def test_an_adapter_is_not_a_model(model: Path) -> None:
    (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    refused(model, CheckpointError, "adapter")


def test_quantised_weights(model: Path) -> None:
    edit(model / "config.json", lambda config: config.update(quantization_config={"quant_method": "gptq"}))
    refused(model, UnsupportedModelError, "gptq")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_that_config_does_not_mention(model: Path, dtype: torch.dtype) -> None:
    key = "model.layers.0.mlp.up_proj.weight"
    table = load_file(model / "model.safetensors")
    table[key] = table[key].to(dtype)
    save_file(table, model / "model.safetensors")
    refused(model, UnsupportedModelError, key)


def test_missing_shard(shards: Path) -> None:
    first = sorted(shards.glob("*.safetensors"))[0]
    first.unlink()
    refused(shards, CheckpointError, first.name)


def test_missing_index(shards: Path) -> None:
    (shards / INDEX).unlink()
    refused(shards, CheckpointError, INDEX)


@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x.safetensors", "..", "", 3, None]
)
def test_index_naming_a_file_outside_the_folder(shards: Path, place: Any) -> None:
    edit(shards / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": place}))
    refused(shards, CheckpointError, "model.norm.weight", repr(place))


def test_index_naming_a_pickle(shards: Path) -> None:
    edit(shards / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": "x.bin"}))
    refused(shards, UnsafeCheckpointError, "x.bin")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_broken_index(shards: Path, text: str) -> None:
    (shards / INDEX).write_text(text)
    refused(shards, CheckpointError, INDEX)


def test_index_listing_a_tensor_that_is_not_in_its_shard(shards: Path) -> None:
    edit(shards / INDEX, lambda index: index["weight_map"].update({"extra": sorted(index["weight_map"].values())[0]}))
    refused(shards, CheckpointError, "extra")


def test_tensor_in_two_shards(shards: Path) -> None:
    first, second = sorted(shards.glob("*.safetensors"))[:2]
    table = load_file(first)
    key = next(iter(table))
    save_file({**load_file(second), key: table[key]}, second)
    refused(shards, CheckpointError, key, first.name, second.name)


@given(share=st.floats(0, 0.9999))
@settings(max_examples=30, deadline=None)
def test_a_shard_cut_anywhere(whole: Path, tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    model = Path(shutil.copytree(whole, tmp_path_factory.mktemp("cut") / "model"))
    path = model / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused(model, CheckpointError, "model.safetensors", "truncated or corrupt")
    path.write_bytes(data + b"\0")
    refused(model, CheckpointError, "model.safetensors", "truncated or corrupt")


def header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + length])
    change(table)
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


KEY = "model.norm.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop(KEY),
        lambda t: t[KEY].pop("shape"),
        lambda t: t[KEY].update(shape=[33]),
        lambda t: t[KEY].update(shape=[-32]),
        lambda t: t[KEY].update(shape=[32.0]),
        lambda t: t[KEY].update(shape="32"),
        lambda t: t[KEY].update(shape=[2**70]),
        lambda t: t[KEY].update(dtype="F16"),
        lambda t: t[KEY].update(dtype=["F32"]),
        lambda t: t[KEY].update(data_offsets=[0, 128]),
        lambda t: t[KEY].update(data_offsets=[2**60, 2**60 + 128]),
        lambda t: t[KEY].update(data_offsets=[0]),
        lambda t: t[KEY].update(data_offsets=[True, 129]),
        lambda t: t.update({KEY: [1]}),
        lambda t: t.update(__metadata__=[1]),
        lambda t: t.update(__metadata__={"a": 1}),
    ],
)
def test_headers_that_make_no_sense(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    header(model / "model.safetensors", change)
    refused(model, CheckpointError, "model.safetensors", "truncated or corrupt")


def test_unknown_number_format(model: Path) -> None:
    header(model / "model.safetensors", lambda table: table[KEY].update(dtype="F4"))
    refused(model, CheckpointError, KEY, "F4")


@given(noise=st.binary(min_size=1, max_size=64), place=st.integers(0, 2000))
@settings(max_examples=60, deadline=None)
def test_damaged_headers_never_surprise(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, noise: bytes, place: int
) -> None:
    folder = tmp_path_factory.mktemp("noise")
    data = bytearray((whole / "model.safetensors").read_bytes())
    data[place : place + len(noise)] = noise
    (folder / "model.safetensors").write_bytes(data)
    # Either refused as ours, or the damage only renamed something and everything can still be read.
    with contextlib.suppress(CheckpointError), CheckpointReader(folder) as reader:
        for key in reader.keys:
            reader.tensor(key)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_named(model: Path, value: float) -> None:
    with CheckpointReader(model) as reader:
        check_finite(reader)
    bad = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
    table = load_file(model / "model.safetensors")
    for key in bad:
        table[key].view(-1)[-1] = value
    save_file({**table, "steps": torch.tensor(3)}, model / "model.safetensors")
    with CheckpointReader(model) as reader, pytest.raises(WeightValueError) as caught:
        check_finite(reader)
    assert all(key in caught.value.message for key in bad)
    assert "lm_head" not in caught.value.message


def test_the_hash_of_a_folder_is_that_of_its_weights(model: Path) -> None:
    first = hash_folder(model)
    (model / "tokenizer.json").write_text("other")
    assert hash_folder(model) == first
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert hash_folder(model) != first
