"""Blocks left out of models that are built in ways of their own, each against the stock model that skips them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

import secateur
from secateur.checkpoint.reader import CheckpointReader
from secateur.engine.binding import Binding
from secateur.engine.blocks import find_structure
from secateur.engine.forward import rehearse
from secateur.engine.skeleton import build_skeleton
from secateur.errors import UnsupportedModelError
from secateur.structured.depth import without_blocks
from secateur.structured.fewer import Row, fewer_blocks
from tests.coverage.survey import Work
from tests.coverage.tiny import tiny_model


def _saved(name: str, folder: Path) -> tuple[Any, Path]:
    model_class = getattr(transformers, name)
    tiny = tiny_model(model_class.config_class, model_class)
    tiny.model.save_pretrained(folder)
    return tiny, folder


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", [
    "SwinForImageClassification",  # every second block shifts its windows: those that stay keep their numbers
    "SwiftFormerForImageClassification",  # the last block of a stage is another one
    "ConvNextForImageClassification",
    "PvtV2ForImageClassification",
])  # fmt: skip
def test_a_list_of_depths_says_how_many_blocks_the_stages_have(name: str, tmp_path: Path) -> None:
    tiny, folder = _saved(name, tmp_path / "model")
    found = Work(folder, tmp_path / "out", tiny, secateur.prune).attempt({"structure": "depth", "sparsity": 0.5})
    assert found["ok"], found
    before, after = _config(folder), _config(tmp_path / "out")
    assert after["depths"] == [count // 2 for count in before["depths"]]
    changed = {key for key in before if before[key] != after.get(key)}
    assert changed <= {"depths", "transformers_version"}, "lists of two, such as an image size, are no lists of blocks"


@pytest.mark.parametrize("name", [
    "JambaForCausalLM",  # every so many blocks an attention, and experts
    "RecurrentGemmaForCausalLM",
    "NeoMMEForMaskedLM",  # the only block with full attention
    "FSMTForConditionalGeneration",  # encoder and decoder of two classes
    "MobileBertForMaskedLM",  # no norms, and a head made of two weights
    "CTRLLMHeadModel",  # a buffer that the model casts for good
])  # fmt: skip
def test_a_quarter_of_the_blocks_goes(name: str, tmp_path: Path) -> None:
    tiny, folder = _saved(name, tmp_path / "model")
    found = Work(folder, tmp_path / "out", tiny, secateur.prune).attempt({"structure": "depth", "sparsity": 0.25})
    assert found["ok"], found


def test_a_factor_divided_by_the_root_of_the_number_of_blocks_is_made_good(tmp_path: Path) -> None:
    tiny, folder = _saved("MiniCPM3ForCausalLM", tmp_path / "model")
    found = Work(folder, tmp_path / "out", tiny, secateur.prune).attempt({"structure": "depth", "sparsity": 0.5})
    assert found["ok"], found
    before, after = _config(folder), _config(tmp_path / "out")
    scale = [entries["scale_depth"] / entries["num_hidden_layers"] ** 0.5 for entries in (before, after)]
    assert scale[1] == pytest.approx(scale[0], rel=1e-12)


def test_the_proof_sees_what_differs_between_tokens(tmp_path: Path) -> None:
    """Without its first block a stage of a Funnel pools before another one: on biases of one it drowned in 1e-5."""
    _, folder = _saved("FunnelForMaskedLM", tmp_path / "model")
    config, model = transformers.AutoConfig.from_pretrained(folder), build_skeleton(folder)
    with CheckpointReader(folder) as reader:
        structure, binding = find_structure(model), Binding(model, reader.keys)
        rehearse(model, structure, binding, reader)
        firsts = [block.index for block in structure.blocks if block.name.endswith(".0") and "blocks" in block.name]
        assert without_blocks(config, model, structure, binding, reader, [i + 3 for i in firsts]).difference < 1e-6
        with pytest.raises(UnsupportedModelError, match=r"differ by 0\.0"):
            without_blocks(config, model, structure, binding, reader, firsts)


def test_numbers_of_some_of_the_rows_and_of_all() -> None:
    config = transformers.FunnelConfig(block_sizes=[4, 3, 4], num_decoder_layers=2)
    rows = [Row([0, 1, 2, 3], {0}), Row([4, 5, 6], {5, 6}), Row([7, 8, 9, 10], ()), Row([11, 12], {11})]
    assert any(
        entries.get(("block_sizes",)) == [3, 1, 4] and entries.get(("num_decoder_layers",)) == 1
        for entries in fewer_blocks(config, rows)
    )
