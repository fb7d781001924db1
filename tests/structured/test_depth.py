"""Blocks left out: against the stock model with these blocks taken out by hand, and the choices against brute force."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import secateur
from secateur.engine.inputs import output_tensor
from secateur.errors import RecipeError, SparsityError, UnknownNameError, UsageError
from secateur.result import PruneResult
from tests.models import FAMILIES, calibration_for, save_tiny

FOUR = {
    "gpt2": {"n_layer": 4},
    "bloom": {"n_layer": 4},
    "distilbert": {"n_layers": 4},
    "gemma3": {"layer_types": ["sliding_attention", "full_attention"] * 2},
}


def _save(folder: Path, family: str, **changes: Any) -> Path:
    more = FOUR.get(family, {})
    layers = {} if any("layer" in key and "types" not in key for key in more) else {"num_hidden_layers": 4}
    return save_tiny(folder, family, **{**layers, **more, **changes})


def _stock(folder: Path) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32).eval()


def _prune(folder: Path, out: Path, family: str, **changes: Any) -> PruneResult:
    values = {"structure": "depth", "verify": False, "evaluate": False, "calibration": calibration_for(family)}
    return secateur.prune(folder, out, **{**values, **changes})


def _kept(out: Path) -> list[int]:
    lines = (out / "secateur.json").read_text()
    return json.loads(lines)["blocks_kept"]


def _row(model: nn.Module) -> nn.ModuleList:
    """The module list with four entries."""
    return next(part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == 4)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"t5"}))
def test_result_is_the_stock_model_without_the_blocks(family: str, tmp_path: Path) -> None:
    folder = _save(tmp_path / "model", family)
    result = _prune(folder, tmp_path / "out", family, sparsity=0.5, depth_by="influence")
    before, after = _stock(folder), _stock(tmp_path / "out")
    kept = _kept(tmp_path / "out")
    assert len(kept) == 2
    row = _row(before)
    for index in sorted(set(range(4)) - set(kept), reverse=True):
        del row[index]
    for config in {id(part.config): part.config for part in before.modules() if hasattr(part, "config")}.values():
        config.num_hidden_layers = 2  # what the forward of some families counts with
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i] for i in kept]
    generator = torch.Generator().manual_seed(5)
    inputs = (
        {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
        if family == "vit"
        else {"input_ids": torch.randint(3, 128, (2, 24), generator=generator)}
    )
    cache = {} if family in ("vit", "bert", "roberta", "distilbert") else {"use_cache": False}
    with torch.no_grad():
        expected, found = (output_tensor(model(**inputs, **cache)) for model in (before, after))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert result.sparsity == pytest.approx(0.5, abs=1e-9)
    assert result.after.parameters == after.num_parameters()


def test_generation_with_a_cache_is_generation_without(tmp_path: Path) -> None:
    folder = _save(tmp_path / "model", "gemma3")
    _prune(folder, tmp_path / "out", "gemma3", sparsity=0.25, verify=True)
    model = _stock(tmp_path / "out")
    ids = torch.randint(3, 128, (1, 20), generator=torch.Generator().manual_seed(2))
    cached, plain = (model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(config["layer_types"]) == config["num_hidden_layers"] == 3


def test_greedy_takes_the_block_that_costs_least_each_time(tmp_path: Path) -> None:
    """Brute force on the stock model: its loss on the same windows with every block taken out in turn."""
    folder = _save(tmp_path / "model", "llama")
    ids = calibration_for("llama")
    _prune(folder, tmp_path / "out", "llama", sparsity=0.5, depth_by="greedy", calibration=ids, compute_dtype="float32")

    def loss(kept: list[int]) -> float:
        model = _stock(folder)
        model.model.layers = nn.ModuleList([model.model.layers[i] for i in kept])
        model.config.num_hidden_layers = len(kept)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))

    kept = [0, 1, 2, 3]
    for _ in range(2):
        kept = min(([i for i in kept if i != gone] for gone in kept), key=loss)
    assert _kept(tmp_path / "out") == kept


@pytest.mark.parametrize("way", ["influence", "angular"])
def test_influence_and_angle_are_those_of_the_hidden_states(way: str, tmp_path: Path) -> None:
    folder = _save(tmp_path / "model", "llama")
    ids = calibration_for("llama")
    _prune(folder, tmp_path / "out", "llama", sparsity=0.5, depth_by=way, calibration=ids, compute_dtype="float32")
    seen: list[torch.Tensor] = []
    model = _stock(folder)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model.model.layers[-1].register_forward_hook(lambda m, args, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    states = [state.double() for state in seen]
    if way == "influence":
        cosines = [float(torch.cosine_similarity(a, b, dim=-1).mean()) for a, b in itertools.pairwise(states)]
        gone = sorted(range(4), key=lambda i: 1 - cosines[i])[:2]
    else:
        angles = [
            float(torch.cosine_similarity(states[i][:, -1], states[i + 2][:, -1], dim=-1).acos().mean()) / math.pi
            for i in range(3)
        ]
        start = angles.index(min(angles))
        gone = [start, start + 1]
    assert _kept(tmp_path / "out") == sorted(set(range(4)) - set(gone))


def test_depth_together_with_neurons(tmp_path: Path) -> None:
    folder = _save(tmp_path / "model", "qwen2", intermediate_size=64)
    result = _prune(
        folder, tmp_path / "out", "qwen2", structure="depth,ffn", sparsity=0.5, depth_by="influence", round_to=8,
        verify=True,
    )  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 3
    assert config["intermediate_size"] < 64
    assert result.verified
    assert result.sparsity == pytest.approx(0.5, abs=0.05)


def test_what_stays_is_copied_byte_for_byte(tmp_path: Path) -> None:
    folder = _save(tmp_path / "model", "mixtral")
    _prune(folder, tmp_path / "out", "mixtral", sparsity=0.25, depth_by="influence", verify=True)
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    kept = _kept(tmp_path / "out")
    for key, tensor in after.items():
        parts = key.split(".")
        if "layers" in parts:
            place = parts.index("layers") + 1
            parts[place] = str(kept[int(parts[place])])
        assert torch.equal(tensor, before[".".join(parts)]), key
    assert len(after) < len(before)


@pytest.mark.parametrize(
    ("kind", "words", "options"),
    [
        (SparsityError, "of 4 blocks cannot be left out", {"sparsity": 0.05}),
        (SparsityError, "of 4 blocks cannot be left out", {"sparsity": 0.99}),
        (UnknownNameError, "did you mean 'greedy'", {"depth_by": "gredy"}),
        (RecipeError, "depth_by needs --structure depth", {"structure": "ffn", "depth_by": "greedy"}),
        (RecipeError, "depth_by needs --structure", {"structure": (), "depth_by": "greedy"}),
    ],
)
def test_refused_before_work(kind: type[Exception], words: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder = _save(tmp_path / "model", "llama")
    with pytest.raises(kind) as caught:
        _prune(folder, tmp_path / "out", "llama", **options)
    assert words in f"{caught.value} {caught.value.hint}"
    assert not list(tmp_path.glob("out*"))


def _t5(folder: Path) -> tuple[Path, list[list[str]]]:
    return save_tiny(folder, "t5", num_layers=4, num_decoder_layers=8), [["encoder.block"], ["decoder.block"]]


def _bart(folder: Path) -> tuple[Path, list[list[str]]]:
    config = transformers.BartConfig(
        vocab_size=128, d_model=32, encoder_layers=4, decoder_layers=8, encoder_ffn_dim=48, decoder_ffn_dim=48,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=256, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BartForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    return folder, [["model.encoder.layers"], ["model.decoder.layers"]]


@pytest.mark.parametrize("make", [_t5, _bart])
@pytest.mark.parametrize("way", ["greedy", "influence"])
def test_every_row_of_blocks_gives_its_share(make: Any, way: str, tmp_path: Path) -> None:
    """An encoder of 4 and a decoder of 8 blocks lose 1 and 2; the rest is the stock model with these taken out."""
    folder, rows = make(tmp_path / "model")
    _prune(folder, tmp_path / "out", "t5", sparsity=0.25, depth_by=way, verify=True)
    before, after = _stock(folder), _stock(tmp_path / "out")
    kept = _kept(tmp_path / "out")
    encoder, decoder = [i for i in kept if i < 4], [i - 4 for i in kept if i >= 4]
    assert (len(encoder), len(decoder)) == (3, 6)
    for (name,), stay in zip(rows, (encoder, decoder), strict=True):
        row = before.get_submodule(name)
        for index in sorted(set(range(len(row))) - set(stay), reverse=True):
            del row[index]
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected, found = (
            model(input_ids=ids, decoder_input_ids=ids.flip(1), use_cache=False).logits for model in (before, after)
        )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_block_that_holds_what_all_others_need_stays(tmp_path: Path) -> None:
    """The first block of a T5 row has the position biases of all: whatever the choice would be, it is kept."""
    folder, _ = _t5(tmp_path / "model")
    _prune(folder, tmp_path / "out", "t5", sparsity=0.6, depth_by="influence")
    assert {0, 4} <= set(_kept(tmp_path / "out"))


def test_angular_is_refused_for_two_rows(tmp_path: Path) -> None:
    folder, _ = _t5(tmp_path / "model")
    with pytest.raises(UsageError, match="2 rows"):
        _prune(folder, tmp_path / "out", "t5", sparsity=0.25, depth_by="angular")
