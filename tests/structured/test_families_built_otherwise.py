"""Structures that only some families have: gates, sinks, several widths, ratios. Each against the stock class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import secateur
from secateur.errors import Interrupted, UnsupportedModelError
from secateur.progress import Reporter
from secateur.result import PruneResult
from tests.coverage.check import check
from tests.models import VOCABULARY, save_tiny

LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip


def _save(folder: Path, name: str, config: str | None = None, **values: Any) -> Path:
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config or name.split("For")[0] + "Config")(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    return folder


def _ids(rows: int = 8) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, 24), generator=torch.Generator().manual_seed(7))


def _pruned(folder: Path, out: Path, **settings: Any) -> PruneResult:
    """A result that the coverage table's own check has looked into."""
    values = {"verify": False, "evaluate": False, "calibration": _ids(), "round_to": 4, **settings}
    result = secateur.prune(folder, out, **values)
    inputs = values["calibration"] if isinstance(values["calibration"], list) else [{"input_ids": _ids(2)}]
    check(folder, out, result, inputs[0])
    return result


def _config(out: Path) -> dict[str, Any]:
    return json.loads((out / "config.json").read_text())


def test_a_gate_of_an_attention_is_cut_with_its_heads_and_is_no_feed_forward_network(tmp_path: Path) -> None:
    """AFMoE multiplies what the heads give by a sigmoid of another matrix: rows one to one, and yet no neurons."""
    values = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_dense_layers": 1}
    folder = _save(tmp_path / "model", "AfmoeForCausalLM", **LLAMA, **values)
    result = _pruned(folder, tmp_path / "groups", structure="kv-groups", sparsity=0.1)
    gate = "model.layers.0.self_attn.gate_proj.weight"
    before, after = (load_file(place / "model.safetensors")[gate] for place in (folder, tmp_path / "groups"))
    assert len(after) == len(before) * len(result.matrices[0].units) // 4
    result = _pruned(folder, tmp_path / "neurons", structure="ffn", sparsity=0.1)
    assert not any("o_proj" in matrix.name for matrix in result.matrices)


def test_a_sink_for_every_head_goes_with_it(tmp_path: Path) -> None:
    values = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"]}
    folder = _save(tmp_path / "model", "GptOssForCausalLM", **LLAMA, **values)
    result = _pruned(folder, tmp_path / "out", structure="kv-groups", sparsity=0.08)
    sinks = "model.layers.0.self_attn.sinks"
    before, after = (load_file(place / "model.safetensors")[sinks] for place in (folder, tmp_path / "out"))
    stay = torch.tensor(result.matrices[0].units)
    assert torch.equal(after, before.reshape(4, 2)[stay].reshape(-1))


@pytest.mark.parametrize("method", ["obs", "magnitude"])
def test_every_expert_chooses_its_own_neurons(method: str, tmp_path: Path) -> None:
    """Gate and up rows in turn, biases, and two layouts of the file: the result answers as with columns at zero."""
    values = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2}
    folder = _save(tmp_path / "model", "GptOssForCausalLM", **LLAMA, **values)
    result = _pruned(folder, tmp_path / "out", structure="ffn", sparsity=0.25, method=method)
    for matrix in result.matrices:
        assert len(matrix.units) == 4
        assert len({len(units) for units in matrix.units}) == 1
        assert len({tuple(units) for units in matrix.units}) > 1
    folder = save_tiny(tmp_path / "mixtral", "mixtral")
    _pruned(folder, tmp_path / "small", structure="ffn", sparsity=0.25, method=method, verify=True)


def test_experts_of_a_dictionary_are_cut_alike_also_those_that_no_token_reached(tmp_path: Path) -> None:
    values = {
        "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2,
        "num_heads": 4, "num_experts": 24, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
        "decoder_start_token_id": 0,
    }  # fmt: skip
    folder = _save(tmp_path / "model", "SwitchTransformersForConditionalGeneration", **values)
    batches = [{"input_ids": _ids(4), "decoder_input_ids": _ids(4)}]
    result = _pruned(folder, tmp_path / "out", structure="ffn", sparsity=0.2, calibration=batches)
    assert sum("expert_" in matrix.name for matrix in result.matrices) == 24 * 2
    assert _config(tmp_path / "out")["d_ff"] < 48


def test_experts_shared_experts_and_dense_blocks_shrink_alike(tmp_path: Path) -> None:
    """Three widths and two entries: that of the experts says that of the shared expert, twice as wide, as well."""
    values = {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 2,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    }  # fmt: skip
    llama = {key: value for key, value in LLAMA.items() if key != "head_dim"} | {
        "num_key_value_heads": 8,
        "intermediate_size": 96,
    }
    folder = _save(tmp_path / "model", "DeepseekV3ForCausalLM", **llama, **values)
    _pruned(folder, tmp_path / "out", structure="ffn", sparsity=0.2, round_to=8)
    config = _config(tmp_path / "out")
    assert config["moe_intermediate_size"] == 24
    assert config["intermediate_size"] < 96


def test_a_width_that_a_ratio_says(tmp_path: Path) -> None:
    values = {
        "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
        "num_labels": 3,
    }  # fmt: skip
    folder = _save(tmp_path / "model", "SwinForImageClassification", **values)
    batches = [{"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))}]
    _pruned(folder, tmp_path / "out", structure="ffn", sparsity=0.15, calibration=batches)
    assert 2 < _config(tmp_path / "out")["mlp_ratio"] < 4


def test_encoder_and_decoder_widths_change_together(tmp_path: Path) -> None:
    values = {
        "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64, "decoder_start_token_id": 2,
    }  # fmt: skip
    folder = _save(tmp_path / "model", "BartForConditionalGeneration", **values)
    batches = [{"input_ids": _ids(2), "decoder_input_ids": _ids(2)}]
    _pruned(folder, tmp_path / "out", structure="ffn", sparsity=0.1, calibration=batches)
    config = _config(tmp_path / "out")
    assert config["encoder_ffn_dim"] == config["decoder_ffn_dim"] < 48


def test_a_norm_over_all_neurons_is_refused(tmp_path: Path) -> None:
    values = {key: value for key, value in LLAMA.items() if key != "head_dim"}
    folder = _save(tmp_path / "model", "BitNetForCausalLM", **values)
    with pytest.raises(UnsupportedModelError):
        _pruned(folder, tmp_path / "out", structure="ffn", sparsity=0.2)


class _StopAt(Reporter):
    """Ctrl-C after a block."""

    def __init__(self, blocks: int) -> None:
        self.left, self.on = blocks, False

    def stage(self, name: str, total: int) -> None:
        self.on = name == "pruning"

    def advance(self, detail: str = "") -> None:
        self.left -= self.on
        if self.on and not self.left:
            raise KeyboardInterrupt


def test_a_killed_run_over_experts_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "mixtral")
    run = {"structure": "ffn", "sparsity": 0.25}
    _pruned(folder, tmp_path / "whole", **run)
    with pytest.raises(Interrupted):
        _pruned(folder, tmp_path / "out", reporter=_StopAt(1), **run)
    _pruned(folder, tmp_path / "out", resume=True, **run)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]
