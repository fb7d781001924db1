"""The proof can fail: a coupling that is not one is found out, and no such coupling is ever proposed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers

from secateur.checkpoint.reader import CheckpointReader
from secateur.engine.binding import Binding
from secateur.engine.blocks import find_structure
from secateur.engine.skeleton import build_skeleton
from secateur.errors import UnsupportedModelError
from secateur.structured.configure import shrink
from secateur.structured.couplings import Cut
from secateur.structured.explore import visit_blocks
from secateur.structured.plan import couplings_of_blocks
from secateur.structured.proof import prove, spread_units
from tests.models import save_tiny


def _proved(folder: Path, kind: str, spoil) -> list[float]:
    """Difference of the first block, its coupling spoiled first."""
    model = build_skeleton(folder)
    structure = find_structure(model)
    with CheckpointReader(folder) as reader:
        binding = Binding(model, reader.keys)
        every = couplings_of_blocks(model, structure, binding, reader)
        chosen = [one for couplings in every.values() for one in couplings if one.kind == kind]
        stay = chosen[0].units // 2
        small = shrink(transformers.AutoConfig.from_pretrained(folder), chosen, {kind: stay}).skeleton
        found: list[float] = []

        def visit(block, module, call, tensors):
            own = [spoil(one) for one in every[block.index] if one.kind == kind]
            found.append(prove(block, model, small, call, tensors, [(one, spread_units(one, stay)) for one in own]))

        visit_blocks(model, structure, binding, reader, visit)
    return found


def _shifted(coupling, number: int):
    """The rows of one matrix that feeds the consumer belong to the next unit instead."""
    cuts = list(coupling.cuts)
    cuts[number] = dataclasses.replace(cuts[number], indices=cuts[number].indices.roll(1, 0))
    return dataclasses.replace(coupling, cuts=tuple(cuts))


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "ffn"), ("llama", "kv-groups"), ("phi3", "ffn"), ("gpt2", "ffn")]
)
def test_a_wrong_row_is_found_out(family: str, kind: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family)
    assert max(_proved(folder, kind, lambda one: one)) <= 1e-5
    with pytest.raises(UnsupportedModelError, match="computes something else"):
        _proved(folder, kind, lambda one: _shifted(one, 1))


def test_a_norm_over_all_heads_is_no_obstacle_that_is_overlooked(tmp_path: Path) -> None:
    """OLMo 2 normalises queries over all heads: its groups hang together, and nothing must claim otherwise."""
    config = transformers.Olmo2Config(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    transformers.Olmo2ForCausalLM(config).save_pretrained(tmp_path / "model")
    skeleton = build_skeleton(tmp_path / "model")
    structure = find_structure(skeleton)
    with CheckpointReader(tmp_path / "model") as reader:
        every = couplings_of_blocks(skeleton, structure, Binding(skeleton, reader.keys), reader)
    kinds = {one.kind for couplings in every.values() for one in couplings}
    assert "ffn" in kinds
    if "kv-groups" in kinds:
        with pytest.raises(UnsupportedModelError):
            _proved(tmp_path / "model", "kv-groups", lambda one: one)


def test_a_cut_keeps_what_belongs_to_the_units_that_stay() -> None:
    cut = Cut("x", 1, torch.tensor([[0, 3], [1, 4], [2, 5]]))
    tensor = torch.arange(12).reshape(2, 6)
    made = cut.apply(tensor, torch.tensor([0, 2]))
    assert torch.equal(made, tensor[:, [0, 2, 3, 5]])


def test_spread_units_takes_the_same_number_from_each_part(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama", hidden_size=48, num_attention_heads=12,
                       num_key_value_heads=3, head_dim=4)  # fmt: skip
    model = build_skeleton(folder)
    structure = find_structure(model)
    with CheckpointReader(folder) as reader:
        every = couplings_of_blocks(model, structure, Binding(model, reader.keys), reader)
    (heads,) = (one for one in every[0] if one.kind == "heads")
    assert heads.parts == 3
    units = spread_units(heads, 6)
    assert units.tolist() == sorted(set(units.tolist()))
    assert [unit // 4 for unit in units.tolist()] == [0, 0, 1, 1, 2, 2]
