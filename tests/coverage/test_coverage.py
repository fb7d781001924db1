"""The coverage table: a sample is made anew and compared with what is committed, and its checker catches faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import secateur
from tests.coverage.__main__ import read
from tests.coverage.families import MAPS, families
from tests.coverage.survey import COLUMNS, survey
from tests.coverage.tiny import LAYERS, MOST_WEIGHTS_OF_DEFAULTS, tiny_model

SAMPLE = (
    "causal/qwen3", "causal/gpt2", "causal/mamba", "seq2seq/t5", "seq2seq/bart", "masked/bert", "image/swin",
    "causal/mixtral",
)  # fmt: skip


@pytest.mark.parametrize("key", SAMPLE)
def test_a_sample_of_the_table_is_current(key: str, tmp_path: Path) -> None:
    family = next(one for one in families() if one.key == key)
    made, committed = survey(family, tmp_path), read()[key]
    assert {column: made[column] for column in COLUMNS} == {column: committed[column] for column in COLUMNS}


def test_the_table_has_every_family_and_no_silent_failure() -> None:
    rows = read()
    assert list(rows) == [family.key for family in families()]
    assert not [(key, column) for key, row in rows.items() for column in COLUMNS if row.get(column, {}).get("silent")]


def test_every_class_of_the_maps_has_a_row() -> None:
    classes = {family.class_name for family in families()}
    for kind in ("causal", "seq2seq", "masked", "image"):
        assert {name if isinstance(name, str) else name[0] for name in MAPS[kind].values()} <= classes


@pytest.mark.parametrize(
    ("config", "model"), [("LlamaConfig", "LlamaForCausalLM"), ("T5Config", "T5ForConditionalGeneration")]
)
def test_tiny_models_are_tiny_and_random(config: str, model: str) -> None:
    tiny = tiny_model(getattr(transformers, config), getattr(transformers, model))
    assert tiny.model.num_parameters() < MOST_WEIGHTS_OF_DEFAULTS
    assert tiny.model.config.num_hidden_layers == LAYERS
    assert all(float(parameter.std()) > 0 for parameter in tiny.model.parameters() if parameter.numel() > 1)


def _prune_then(spoil: Any) -> Any:
    """`secateur.prune` whose written result is spoiled, but which reports what it would have."""

    def prune(source: Path, out: Path, **settings: Any) -> Any:
        result = secateur.prune(source, out, **settings)
        if settings.get("structure"):
            spoil(out)
        return result

    return prune


def _swap_two_rows(out: Path) -> None:
    weights = load_file(out / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    weights[name] = weights[name].index_select(0, torch.tensor([1, 0, *range(2, len(weights[name]))])).contiguous()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def _lose_a_tensor(out: Path) -> None:
    weights = load_file(out / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def _name_another_size(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    config["intermediate_size"] -= 1
    (out / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(_swap_two_rows, "differs from the dense one"), (_lose_a_tensor, "complains"), (_name_another_size, "")],
)
def test_a_spoiled_result_is_a_silent_failure(spoil: Any, words: str, tmp_path: Path) -> None:
    family = next(one for one in families() if one.key == "causal/llama")
    row = survey(family, tmp_path, _prune_then(spoil))
    assert row["unstructured"]["ok"]
    for column in ("depth", "ffn", "attention"):
        assert not row[column]["ok"]
        assert row[column]["silent"]
        assert words in row[column]["why"]
