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
from tests.coverage.survey import COLUMNS, Work, survey
from tests.coverage.tiny import LAYERS, MOST_WEIGHTS_OF_DEFAULTS, Tiny, tiny_model

SAMPLE = (
    "causal/qwen3", "causal/gpt2", "causal/mamba", "seq2seq/t5", "seq2seq/bart", "masked/bert", "image/vit",
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
    assert all(float(parameter.detach().std()) > 0 for parameter in tiny.model.parameters() if parameter.numel() > 1)


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


def _turn_the_embedding(out: Path) -> None:
    weights = load_file(out / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].roll(1, 1).contiguous()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def _say_more_heads(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    config["num_attention_heads"], config["head_dim"] = 2 * config["num_attention_heads"], config["head_dim"] // 2
    (out / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, Path]:
    tiny = tiny_model(transformers.LlamaConfig, transformers.LlamaForCausalLM)
    folder = tmp_path_factory.mktemp("llama") / "model"
    tiny.model.save_pretrained(folder)
    return tiny, folder


@pytest.mark.parametrize(
    ("structure", "spoil", "words"),
    [
        ("ffn", _swap_two_rows, "differs from the dense one"),
        ("depth", _swap_two_rows, "differs from the dense one"),
        ("ffn", _lose_a_tensor, "complains"),
        ("ffn", _name_another_size, ""),
        ("heads,hidden", _turn_the_embedding, "holds other numbers"),
        ("heads,hidden", _say_more_heads, ""),
    ],
)
def test_a_spoiled_result_is_a_silent_failure(
    structure: str, spoil: Any, words: str, tiny_llama: tuple[Tiny, Path], tmp_path: Path
) -> None:
    tiny, folder = tiny_llama
    share = 0.5 if "hidden" in structure else 0.25
    settings = {"structure": structure, "sparsity": share, **({"round_to": 8} if structure == "ffn" else {})}
    assert Work(folder, tmp_path / "good", tiny, secateur.prune).attempt(settings)["ok"]
    found = Work(folder, tmp_path / "bad", tiny, _prune_then(spoil)).attempt(settings)
    assert not found["ok"]
    assert found["silent"]
    assert words in found["why"]


def test_a_weight_that_came_back_is_found(tiny_llama: tuple[Tiny, Path], tmp_path: Path) -> None:
    def spoil(out: Path) -> None:
        weights = load_file(out / "model.safetensors")
        weight = weights["model.layers.1.mlp.up_proj.weight"]
        weight[(weight == 0).nonzero()[0].tolist()[0], (weight == 0).nonzero()[0].tolist()[1]] = 1e-3
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})

    def prune(source: Path, out: Path, **settings: Any) -> Any:
        result = secateur.prune(source, out, **settings)
        spoil(out)
        return result

    tiny, folder = tiny_llama
    found = Work(folder, tmp_path / "out", tiny, prune).attempt({"method": "magnitude", "sparsity": 0.5})
    assert found["silent"]
    assert "zeros of" in found["why"]
