"""Models whose blocks are tied: what is stored and loaded, training, fewer and larger steps, and counts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import secateur
from secateur.checkpoint.ledger import Ledger
from secateur.checkpoint.reader import CheckpointReader
from secateur.engine.blocks import find_structure
from secateur.errors import Interrupted, UnsupportedModelError, UsageError
from secateur.measure.model import load_model
from tests.converting.models import logits
from tests.models import calibration_for, save_tiny

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 60


def convert(model: Path, out: Path, **options: Any) -> Any:
    return secateur.convert(model, out, to="shared", **{"evaluate": False, "verify": False, **options})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "base", "llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def tied(base: Path) -> Path:
    convert(base, base.with_name("tied"), groups=2)
    return base.with_name("tied")


def test_a_seed_is_told_to_change_nothing(base, tmp_path):
    told = convert(base, tmp_path / "out", groups=2, seed=3).warnings
    assert "--seed has no effect: conversion shared draws nothing at random" in told
    one, other = (place / "model.safetensors" for place in (tmp_path / "out", tmp_path / "again"))
    assert not any("--seed" in line for line in convert(base, other.parent, groups=2).warnings)
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(("family", "count"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_the_tied_model_is_the_one_whose_blocks_are_means(family, count, tmp_path):
    model = save_tiny(tmp_path / "model", family, **{count: 4})
    convert(model, tmp_path / "out", groups=2)
    wanted = load_model(model)
    blocks = [wanted.get_submodule(block.name) for block in find_structure(wanted).blocks]
    with torch.no_grad():
        for pair in (blocks[:2], blocks[2:]):
            for first, second in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
                first.copy_((first + second) / 2)
                second.copy_(first)
        torch.testing.assert_close(
            logits(tmp_path / "out"), wanted(calibration_for("llama")[:3]).logits, atol=1e-5, rtol=1e-5
        )


def test_what_is_shared_is_in_the_file_once_and_in_memory_once(base, tmp_path):
    result = convert(base, tmp_path / "out", groups=2, verify=True)
    assert result.verified
    assert result.needs_training
    assert any("no use until it is trained" in line for line in result.verdict)
    model = load_model(tmp_path / "out")
    block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    rest = model.num_parameters() - 2 * block
    assert result.before.parameters == 4 * block + rest
    assert result.after.parameters == 2 * block + rest == model.num_parameters()
    one, two, other = (list(model.model.layers[n].parameters()) for n in (0, 1, 2))
    assert all(a is b for a, b in zip(one, two, strict=True))
    assert not any(a is b for a, b in zip(one, other, strict=True))
    with CheckpointReader(tmp_path / "out") as reader:
        assert {key.split(".")[2] for key in reader.keys if ".layers." in key} == {"0", "2"}
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(tmp_path / "again"), logits(tmp_path / "out"), atol=0, rtol=0)


def test_counts_of_the_demo_model_are_those_of_the_formula():
    """SmolLM2-135M, without its weights: G blocks, the embedding and the last norm."""
    config = transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49_152, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert block == 3_540_096
    assert model.num_parameters() - 30 * block == 28_312_128


def test_as_many_groups_as_blocks_change_nothing(base, tmp_path):
    result = convert(base, tmp_path / "out", groups=4)
    assert logits(tmp_path / "out").equal(logits(base))
    assert not result.needs_training


def test_recover_trains_the_shared_weights_and_keeps_them_shared(tied, tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)
    options = {"dense": True, "data": str(tmp_path / "text.txt"), "tokens": 1500, "evaluate": False, "verify": False}
    for mode in ("lora", "blocks"):
        with pytest.raises(UsageError, match="several blocks share"):
            secateur.recover(tied, tmp_path / mode, mode=mode, **options)
        assert not (tmp_path / mode).exists()
    trained = secateur.recover(tied, tmp_path / "out", **options)
    assert trained.training["held_out_loss"] < trained.training["held_out_loss_before"]
    was, now = load_model(tied), load_model(tmp_path / "out")
    assert not was.model.layers[1].mlp.up_proj.weight.equal(now.model.layers[1].mlp.up_proj.weight)
    assert now.model.layers[0].mlp.up_proj.weight is now.model.layers[1].mlp.up_proj.weight
    assert now.num_parameters() == was.num_parameters()
    convert(tmp_path / "out", tmp_path / "fewer", iterations=2)  # a trained one still says which blocks share
    assert load_model(tmp_path / "fewer").config.num_hidden_layers == 2


def test_all_iterations_are_the_model_bit_for_bit(tied, tmp_path):
    convert(tied, tmp_path / "out", iterations=4)
    assert logits(tmp_path / "out").equal(logits(tied))


def test_fewer_iterations_are_larger_steps_of_the_blocks_that_are_left(tied, tmp_path):
    result = convert(tied, tmp_path / "out", iterations=2)
    model = load_model(tmp_path / "out")
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    assert result.after.parameters == result.before.parameters == model.num_parameters()
    wanted = copy.deepcopy(load_model(tied))
    ids = calibration_for("llama")[:3]
    entered: list[torch.Tensor] = []
    wanted.model.layers = torch.nn.ModuleList([wanted.model.layers[0], wanted.model.layers[2]])
    wanted.config.num_hidden_layers = 2
    for block in wanted.model.layers:
        block.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
        block.register_forward_hook(lambda module, args, output: entered[-1] + 2 * (output - entered[-1]))
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "out"), wanted(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)


def test_fewer_and_fewer_are_as_few_at_once(tied, tmp_path):
    convert(tied, tmp_path / "small", iterations=4, step=0.5)  # all of them, to be trained with small steps
    convert(tmp_path / "small", tmp_path / "fewer", iterations=2)
    config = json.loads((tmp_path / "fewer" / "config.json").read_text())
    assert config["quantization_config"]["sharing"] == {"row": "model.layers", "groups": [0, 1], "step": 1.0}
    assert not logits(tmp_path / "small").equal(logits(tied))


def test_a_step_of_one_only_leaves_blocks_out(tied, tmp_path):
    convert(tied, tmp_path / "out", iterations=2, step=1)
    wanted = load_model(tied)
    wanted.model.layers = torch.nn.ModuleList([wanted.model.layers[0], wanted.model.layers[2]])
    wanted.config.num_hidden_layers = 2
    with torch.no_grad():
        assert wanted(calibration_for("llama")[:3], use_cache=False).logits.equal(logits(tmp_path / "out"))


def test_decoding_with_the_cache_is_the_same_as_without(tied, tmp_path):
    convert(tied, tmp_path / "out", iterations=2)
    model, prompt = load_model(tmp_path / "out"), calibration_for("llama")[:1, :8]
    with torch.no_grad():
        found = [
            model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=cached, pad_token_id=0).tolist()
            for cached in (True, False)
        ]
    assert found[0] == found[1]


def test_pruning_would_change_what_others_share_and_is_refused(tied, base, tmp_path):
    with pytest.raises(UnsupportedModelError, match="its blocks share their weights"):
        secateur.prune(tied, tmp_path / "out", method="magnitude", evaluate=False)
    secateur.convert(
        base, tmp_path / "factors", to="factorized", rank=4, weighting="none", evaluate=False, verify=False
    )
    with pytest.raises(UnsupportedModelError, match="cannot be pruned by structures"):
        secateur.prune(tmp_path / "factors", tmp_path / "out", structure="depth", sparsity=0.5, evaluate=False)
    assert not (tmp_path / "out").exists()


def test_lists_with_an_entry_for_each_block_are_shortened(tmp_path):
    kinds = ["sliding_attention", "full_attention"] * 2
    model = save_tiny(tmp_path / "model", "gemma3", num_hidden_layers=4, layer_types=kinds)
    convert(model, tmp_path / "tied", groups=1)
    convert(tmp_path / "tied", tmp_path / "out", iterations=1)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["layer_types"]) == (1, ["sliding_attention"])
    assert logits(tmp_path / "out").isfinite().all()


def test_a_run_that_was_stopped_goes_on_and_ends_the_same(base, tmp_path, monkeypatch):
    convert(base, tmp_path / "whole", groups=2)
    append = Ledger.append

    def stop(self: Ledger, step: Any) -> None:
        append(self, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "append", stop)
        with pytest.raises(Interrupted):
            convert(base, tmp_path / "out", groups=2)
    convert(base, tmp_path / "out", groups=2, resume=True)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_other_verbs_open_the_result(tied, tmp_path):
    convert(tied, tmp_path / "out", iterations=2)
    for folder in (tied, tmp_path / "out"):
        found = secateur.inspect(folder)
        with CheckpointReader(folder) as reader:
            assert found.parameters == sum(reader.info(key).numel for key in reader.keys)
        assert secateur.generate(folder, "The", new_tokens=4) is not None
