"""Models that run in ways of their own: a cache nobody asked for, a matrix used twice, weights that no file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import nn

import secateur
from secateur.checkpoint.reader import CheckpointReader
from secateur.engine.activations import Watcher
from secateur.engine.binding import Binding
from secateur.engine.blocks import find_structure
from secateur.engine.forward import rehearse, runs_in, stream_forward
from secateur.engine.skeleton import build_skeleton
from tests.coverage.survey import Work
from tests.coverage.tiny import inputs_of, tiny_model


def _saved(name: str, folder: Path) -> tuple[Any, Path]:
    model_class = getattr(transformers, name)
    tiny = tiny_model(model_class.config_class, model_class, decoder="CausalLM" in name)
    tiny.model.save_pretrained(folder)
    return tiny, folder


def _names(config: Any, name: str) -> list[str]:
    with torch.device("meta"):
        return [block.name for block in find_structure(getattr(transformers, name)._from_config(config)).blocks]


def test_lists_side_by_side_run_in_turn_and_a_decoder_of_another_class_is_a_row() -> None:
    config = transformers.XLMConfig(n_layers=2, emb_dim=16, n_heads=2, n_words=32)
    assert _names(config, "XLMWithLMHeadModel") == [
        f"transformer.{part}.{number}" for number in range(2) for part in ("attentions", "ffns")
    ]
    config = transformers.FSMTConfig(
        d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        src_vocab_size=32, tgt_vocab_size=32, langs=["en", "de"],
    )  # fmt: skip
    assert _names(config, "FSMTModel") == ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0"]


@pytest.mark.parametrize("depths", [[1, 2, 3], [2, 2, 2]])
def test_stages_are_taken_apart(depths: list[int]) -> None:
    config = transformers.SwinConfig(image_size=64, embed_dim=8, depths=depths, num_heads=[1, 2, 4])
    assert _names(config, "SwinModel") == [
        f"encoder.layers.{stage}.blocks.{i}" for stage, count in enumerate(depths) for i in range(count)
    ]


def test_experts_are_no_stages() -> None:
    config = transformers.SwitchTransformersConfig(
        d_model=16, d_ff=16, num_layers=2, num_decoder_layers=2, num_experts=2, num_heads=2, vocab_size=32,
        num_sparse_encoder_layers=2, num_sparse_decoder_layers=2,
    )  # fmt: skip
    assert {name.rpartition(".")[0] for name in _names(config, "SwitchTransformersModel")} == {
        "encoder.block", "decoder.block"
    }  # fmt: skip


@pytest.mark.parametrize("structure", [{"method": "wanda", "pattern": "2:4"}, {"structure": "kv-groups"}])
def test_a_block_that_is_run_again_does_not_add_to_a_cache_twice(structure: dict[str, Any], tmp_path: Path) -> None:
    tiny, folder = _saved("XLMWithLMHeadModel", tmp_path / "model")
    if "pattern" in structure:
        assert Work(folder, tmp_path / "out", tiny, secateur.prune).attempt(structure, "2:4")["ok"]
    else:
        why = Work(folder, tmp_path / "out", tiny, secateur.prune).attempt({**structure, "sparsity": 0.1})["why"]
        assert "has no entries" in why


def test_a_matrix_that_runs_twice_on_different_inputs_is_judged_by_both(tmp_path: Path) -> None:
    """Against Wanda written down by hand, on the inputs that hooks of the stock model see in the first block."""
    tiny, folder = _saved("ZayaForCausalLM", tmp_path / "model")
    ids = inputs_of(tiny.model, 4, 48, 5)[0]["input_ids"]
    secateur.prune(
        folder, tmp_path / "out", method="wanda", pattern="2:4", calibration=ids, verify=False, evaluate=False,
        device="cpu", compute_dtype="float32",
    )  # fmt: skip
    name = "model.layers.0.self_attn.qkv_proj.v_proj_delayed"
    stock = type(tiny.model).from_pretrained(folder).eval()
    seen: list[torch.Tensor] = []
    module = stock.get_submodule(name)
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        stock(input_ids=ids, use_cache=False)
    assert len(seen) == 2
    norms = torch.cat(seen).square().sum(0).sqrt()
    scores = (module.weight.abs() * norms).reshape(-1, 4)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(2, dim=1).indices, True)
    after = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
    assert torch.equal(after != 0, kept.reshape(after.shape))


def test_weights_that_the_class_computes_need_not_be_in_the_file(tmp_path: Path) -> None:
    tiny, folder = _saved("MarianMTModel", tmp_path / "model")
    name = "model.encoder.embed_positions.weight"
    weights = load_file(folder / "model.safetensors")
    assert name not in weights
    skeleton = build_skeleton(folder)
    stock = type(tiny.model).from_pretrained(folder).eval()
    assert torch.equal(skeleton.get_parameter(name), stock.get_parameter(name))
    ids = inputs_of(tiny.model, 1, 24, 3)[0]
    with torch.no_grad():
        expected = stock(**ids, use_cache=False).logits
    torch.testing.assert_close(stream_forward(folder, ids), expected, rtol=1e-5, atol=1e-5)


def test_a_narrow_format_is_tried_on_what_will_run_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    _, folder = _saved("xLSTMForCausalLM", tmp_path / "xlstm")
    model = build_skeleton(folder)
    with CheckpointReader(folder) as reader:
        opened = model, find_structure(model), Binding(model, reader.keys), reader
        assert runs_in(torch.bfloat16, *opened)
        assert not runs_in(torch.bfloat16, *opened, {"input_ids": torch.arange(48)[None]})
    _, folder = _saved("CTRLLMHeadModel", tmp_path / "ctrl")
    model = build_skeleton(folder)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with CheckpointReader(folder) as reader:
        opened = model, find_structure(model), Binding(model, reader.keys), reader
        rehearse(*opened)
        assert runs_in(torch.bfloat16, *opened)
    after = dict(model.named_buffers())
    assert all(
        torch.equal(after[name], buffer) and after[name].dtype == buffer.dtype for name, buffer in before.items()
    )


def test_a_vmap_inside_a_forward_is_let_through() -> None:
    with Watcher():
        made = torch.vmap(lambda x: x.sin().new_ones((3,)) * x)(torch.ones(2))
    assert made.shape == (2, 3)


def test_a_product_with_an_absent_weight_is_refused() -> None:
    x, absent = torch.ones(2, 4), torch.empty(4, 4, device="meta")
    with Watcher():
        for product in (lambda: F.linear(x, absent), lambda: x @ absent, lambda: x.addmm(x, absent)):
            with pytest.raises(RuntimeError, match="meta"):
                product()
        assert x.expand_as(absent[:2]).shape == (2, 4)
        assert nn.functional.relu(x).shape == (2, 4)


@pytest.mark.parametrize("name", ["ZayaForCausalLM", "SwitchTransformersForConditionalGeneration"])
def test_errors_are_corrected_where_the_dense_forward_can_be_compared(name: str, tmp_path: Path) -> None:
    """A matrix that runs twice, and experts that are modules of their own, to which other tokens come."""
    tiny, folder = _saved(name, tmp_path / "model")
    done = Work(folder, tmp_path / "out", tiny, secateur.prune).attempt({"method": "best", "sparsity": 0.5})
    assert done["ok"], done


def test_heads_and_channels_of_a_class_that_casts_its_router_while_it_runs(tmp_path: Path) -> None:
    """Refitted weights take the number format that the class has brought them to; experts get other tokens."""
    tiny, folder = _saved("SwitchTransformersForConditionalGeneration", tmp_path / "model")
    asked = {"structure": ("kv-groups", "hidden"), "sparsity": 0.35}
    done = Work(folder, tmp_path / "out", tiny, secateur.prune).attempt(asked)
    assert done["ok"], done
