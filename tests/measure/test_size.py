"""Sizes against a count with the stock safetensors reader."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.errors import SecateurError
from secateur.measure.size import measure_size
from tests.models import save_tiny


@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_counts_equal_those_of_the_stock_reader(tmp_path, shard):
    folder = save_tiny(tmp_path / "model", "llama", max_shard_size=shard)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1 or shard == "5GB"
    for file in files:
        tensors = load_file(file)
        for tensor in tensors.values():
            tensor.flatten()[::3] = 0
        save_file(tensors, file, metadata={"format": "pt"})
    everything = {key: tensor for file in files for key, tensor in load_file(file).items()}
    asked = [key for key in everything if "mlp" in key]
    found = measure_size(folder, asked)
    assert found.parameters == sum(tensor.numel() for tensor in everything.values())
    assert found.nonzero == sum(int(tensor.count_nonzero()) for tensor in everything.values())
    assert found.zeros_of_keys == sum(int((everything[key] == 0).sum()) for key in asked)
    assert found.bytes_disk == sum(file.stat().st_size for file in files)
    assert found.dtype == "float32"
    assert found.bytes_as(torch.bfloat16) == 2 * found.parameters
    assert found.bytes_as(torch.float32) == 4 * found.parameters


def test_integers_are_no_parameters_and_keep_their_bytes(tmp_path):
    save_file(
        {"w": torch.tensor([0.0, -0.0, 1.0], dtype=torch.float16), "ids": torch.zeros(5, dtype=torch.int64)},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text("{}")
    found = measure_size(tmp_path)
    assert (found.parameters, found.nonzero) == (3, 1)
    assert found.bytes_as(torch.float32) == 3 * 4 + 5 * 8


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(SecateurError):
        measure_size(tmp_path)
