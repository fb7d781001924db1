"""Opening a folder whole: what config and weights do not agree on is an error of ours, never made-up weights."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from secateur.errors import CheckpointError
from secateur.measure.model import load_model
from tests.models import save_tiny, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("m") / "m", "llama")


def changed(folder, tmp_path, **values):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, **values}), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return tmp_path


def test_a_folder_is_opened_with_its_own_weights(folder):
    stored = tiny_model("llama").state_dict()
    assert all(
        torch.equal(weight, stored[name]) for name, weight in load_model(folder, device="cpu").state_dict().items()
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_hidden_layers": 3, "layer_types": None}, r"lacks weights of the model, the first is model\.layers\.2\."),
        ({"intermediate_size": 56}, "cannot be opened by transformers: RuntimeError"),
        ({"head_dim": 7}, "cannot be opened by transformers"),
        ({"use_cache": 5}, "cannot be opened by transformers: .*use_cache"),
        ({"dtype": 1.5}, "cannot be opened by transformers"),
        ({"dtype": []}, "cannot be opened by transformers: IndexError"),
    ],
)
def test_a_config_that_is_not_of_these_weights_is_refused(folder, tmp_path, values, said):
    with pytest.raises(CheckpointError, match=said) as caught:
        load_model(changed(folder, tmp_path, **values), device="cpu")
    assert str(tmp_path) in caught.value.message
    assert "config.json" in caught.value.hint


@pytest.mark.parametrize("headed", [False, True])
def test_a_pooler_may_be_missing_where_nothing_looks_at_it(headed, tmp_path):
    """A bare encoder without one is opened; a classifier, whose head reads it, is not."""
    kind = transformers.BertForSequenceClassification if headed else transformers.BertModel
    whole = kind(tiny_model("bert").config)
    tensors = {name: one.clone() for name, one in whole.state_dict().items() if "pooler" not in name}
    whole.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    if headed:
        with pytest.raises(CheckpointError, match=r"lacks weights of the model, the first is bert\.pooler"):
            load_model(tmp_path, device="cpu")
    else:
        assert type(load_model(tmp_path, device="cpu")) is transformers.BertModel
