"""The reader gives what safetensors gives, in memory of its own."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.torch import save_file

from secateur.checkpoint.reader import CheckpointReader
from tests.checkpoint.strategies import same_bits, tables
from tests.models import save_tiny


@given(tables())
@settings(max_examples=60, deadline=None)
def test_every_tensor_comes_back_bit_for_bit(table: dict[str, torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(table, path, metadata={"format": "pt"})
        with CheckpointReader(folder) as reader:
            with safe_open(path, framework="pt") as stock:
                # Tensors without bytes share a place, so their order in the file is not defined.
                full = {key for key in table if table[key].numel()}
                assert [k for k in reader.keys if k in full] == [k for k in stock.offset_keys() if k in full]
            assert set(reader.keys) == set(table)
            assert reader.shards[0].metadata == {"format": "pt"}
            for key, tensor in table.items():
                assert same_bits(reader.tensor(key), tensor)
                info = reader.info(key)
                assert (info.shape, info.dtype, info.nbytes) == (tuple(tensor.shape), tensor.dtype, tensor.nbytes)
                pieces = list(reader.chunks(key, nbytes=16))
                assert all(piece.nbytes <= 16 for piece in pieces)
                joined = torch.cat(pieces) if pieces else torch.empty(0, dtype=tensor.dtype)
                assert same_bits(joined, tensor.reshape(-1))


def test_shards_are_found_by_the_index(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama", max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    with CheckpointReader(tmp_path) as reader:
        assert {key: reader.info(key).shard for key in reader.keys} == index["weight_map"]
        assert len(reader.shards) == len(set(index["weight_map"].values())) > 2
        assert [key for shard in reader.shards for key in shard.keys] == reader.keys


def test_tensors_own_their_memory(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    first = reader.tensor("a")
    first.zero_()
    assert reader.tensor("a").sum() == 16
    reader.close()
    assert reader.tensor("a").sum() == 16  # opens again
    reader.close()
