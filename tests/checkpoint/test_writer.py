"""The writer's bytes are those of safetensors, whatever the order of writing and however often it was interrupted."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.writer import CheckpointWriter, layout_for, layout_like
from secateur.errors import DiskSpaceError, OutputError, RunError
from tests.checkpoint.strategies import random_tensor, same_bits, stock_tensors, tables
from tests.models import save_tiny


def entries(table: dict[str, torch.Tensor]) -> list[tuple[str, torch.dtype, torch.Size]]:
    return [(key, tensor.dtype, tensor.shape) for key, tensor in table.items()]


@given(tables(), st.randoms())
@settings(max_examples=60, deadline=None)
def test_bytes_are_those_of_save_file(table: dict[str, torch.Tensor], order: random.Random) -> None:
    keys = list(table)
    order.shuffle(keys)
    with tempfile.TemporaryDirectory() as folder:
        with CheckpointWriter(folder, layout_for(entries(table))) as writer:
            for key in keys:
                writer.write(key, table[key])
                assert same_bits(writer.tensor(key), table[key])
            hashes = writer.finish()
        stock = Path(folder) / "stock"
        save_file(table, stock, metadata={"format": "pt"})
        ours = (Path(folder) / "model.safetensors").read_bytes()
        assert ours == stock.read_bytes()
        assert hashes == {"model.safetensors": hashlib.sha256(ours).hexdigest()}


@given(tables(), st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_shards_hold_everything_once_and_no_more_than_allowed(table: dict[str, torch.Tensor], limit: int) -> None:
    layout = layout_for(entries(table), max_shard_bytes=limit)
    assert sorted(layout.keys) == sorted(table)
    for shard in layout.shards:
        assert (
            sum(entry.nbytes for entry in shard.entries) <= limit
            or len(shard.entries) == 1
            or all(entry.nbytes == 0 for entry in shard.entries[1:])
        )
    with tempfile.TemporaryDirectory() as folder:
        with CheckpointWriter(folder, layout) as writer:
            for key, tensor in table.items():
                writer.write(key, tensor)
            writer.finish()
        assert sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) == layout.nbytes
        with CheckpointReader(folder) as reader:
            assert all(same_bits(reader.tensor(key), table[key]) for key in table)


def test_a_copied_model_is_the_same_file_by_file(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "in", "llama", max_shard_size="20KB")
    out = tmp_path / "out"
    out.mkdir()
    with CheckpointReader(source) as reader, CheckpointWriter(out, layout_like(reader)) as writer:
        for key in reversed(reader.keys):
            writer.copy(reader, key)
        writer.finish()
    for path in source.glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    index = "model.safetensors.index.json"
    old, new = json.loads((source / index).read_text()), json.loads((out / index).read_text())
    assert old["weight_map"] == new["weight_map"]
    assert old["metadata"]["total_size"] == new["metadata"]["total_size"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_number_format_changes_floats_only(tmp_path: Path, dtype: torch.dtype) -> None:
    table = {
        "a.weight": random_tensor(torch.float32, [3, 5], 0),
        "b.steps": random_tensor(torch.int16, [3], 1),
        "c.mask": random_tensor(torch.bool, [7], 2),
        "d.half": random_tensor(torch.bfloat16, [5], 3),
    }
    save_file(table, tmp_path / "model.safetensors", metadata={"format": "pt", "note": "kept"})
    out = tmp_path / "out"
    out.mkdir()
    with CheckpointReader(tmp_path) as reader, CheckpointWriter(out, layout_like(reader, dtype)) as writer:
        for key in reader.keys:
            writer.copy(reader, key)
        writer.finish()
    got = stock_tensors(out / "model.safetensors")
    for key, tensor in table.items():
        assert same_bits(got[key], tensor.to(dtype) if tensor.is_floating_point() else tensor)
    with CheckpointReader(out) as reader:
        assert reader.shards[0].metadata == {"format": "pt", "note": "kept"}
        offsets = [reader.info(key) for key in reader.keys]
        assert all(info.offset % info.dtype.itemsize == 0 for info in offsets)


def test_stock_transformers_loads_what_was_sharded_here(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "in", "gpt2")
    out = tmp_path / "out"
    out.mkdir()
    with CheckpointReader(source) as reader:
        infos = [reader.info(key) for key in reader.keys]
        layout = layout_for(((i.key, i.dtype, i.shape) for i in infos), max_shard_bytes=30_000)
        with CheckpointWriter(out, layout) as writer:
            for key in reader.keys:
                writer.copy(reader, key)
            writer.finish()
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    a = transformers.AutoModelForCausalLM.from_pretrained(source).state_dict()
    b = transformers.AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@given(tables(), st.data())
@settings(max_examples=40, deadline=None)
def test_a_resumed_run_ends_with_the_same_bytes(table: dict[str, torch.Tensor], data: st.DataObject) -> None:
    done = data.draw(st.integers(0, len(table)))
    layout = layout_for(entries(table), max_shard_bytes=20)
    with tempfile.TemporaryDirectory() as folder:
        first = CheckpointWriter(folder, layout)
        for key in list(table)[:done]:
            first.write(key, table[key])
        first.sync()
        if done < len(table):  # a tensor torn by the kill: it is not in the ledger and will be written again
            key = list(table)[done]
            first.write(key, torch.zeros_like(table[key]))
        first.close()
        with CheckpointWriter(folder, layout, resume=True) as second:
            second.mark_written(list(table)[:done])
            for key in list(table)[done:]:
                second.write(key, table[key])
            second.finish()
        with CheckpointReader(folder) as reader:
            assert all(same_bits(reader.tensor(key), table[key]) for key in table)


def test_a_damaged_file_cannot_be_resumed(tmp_path: Path) -> None:
    layout = layout_for([("a", torch.float32, (4,)), ("b", torch.float32, (4,))], max_shard_bytes=16)
    with CheckpointWriter(tmp_path, layout) as writer:
        writer.write("a", torch.ones(4))
        writer.write("b", torch.ones(4))
    path = tmp_path / layout.shards[0].name
    path.write_bytes(path.read_bytes()[:-1])
    with CheckpointWriter(tmp_path, layout, resume=True) as writer:
        writer.mark_written(["b"])
        with pytest.raises(OutputError, match="tensor a"):
            writer.mark_written(["a"])


def test_what_does_not_fit_the_layout_is_refused(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, layout_for([("a", torch.float32, (4,)), ("b", torch.float32, ())])) as writer:
        with pytest.raises(ValueError, match="not in the layout"):
            writer.write("c", torch.ones(4))
        with pytest.raises(ValueError, match="the layout has"):
            writer.write("a", torch.ones(5))
        with pytest.raises(ValueError, match="the layout has"):
            writer.write("a", torch.ones(4).half())
        with pytest.raises(ValueError, match="not written yet"):
            writer.tensor("a")
        writer.write("a", torch.ones(8)[::2])  # strided
        assert writer.tensor("a").tolist() == [1, 1, 1, 1]
        with pytest.raises(RunError, match="the first is b"):
            writer.finish()


def no_space(*_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot reserve space")
def test_a_full_disk_shows_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(DiskSpaceError) as caught:
        CheckpointWriter(tmp_path, layout_for([("a", torch.float32, (4,))]))
    assert caught.value.hint


@pytest.mark.skipif(not hasattr(os, "pwrite"), reason="other system call")
def test_a_full_disk_during_the_work_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointWriter(tmp_path, layout_for([("a", torch.float32, (4,))])) as writer:
        monkeypatch.setattr(os, "pwrite", no_space)
        with pytest.raises(RunError) as caught:
            writer.write("a", torch.ones(4))
    assert caught.value.exit_code == 1
    assert "--resume" in caught.value.hint
