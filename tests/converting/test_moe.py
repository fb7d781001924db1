"""Models cut into experts: the identity, what is written and loaded, decoding, resuming, and what is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur
from secateur.checkpoint.ledger import Ledger
from secateur.checkpoint.reader import CheckpointReader
from secateur.engine.blocks import find_structure
from secateur.engine.feed_forward import FeedForwards
from secateur.engine.skeleton import build_skeleton
from secateur.errors import CheckpointError, Interrupted
from secateur.layers.moe import MoeFfn
from secateur.measure.flops import count_flops
from secateur.measure.model import load_model
from secateur.pages.commands import command_of
from secateur.pages.inputs import read_inputs
from tests.converting.models import logits
from tests.models import calibration_for, save_tiny, tiny_model

FRESH_INTERPRETERS = True  # there secateur comes after transformers, and before its registries
FAMILIES = ["llama", "gpt2", "falcon"]  # a gate; biases and turned matrices; a bias-free one without a gate


def convert(model: Path, out: Path, **options: Any) -> Any:
    options = {"experts": 8, "top_k": 3, "evaluate": False, "verify": False, **options}
    options.setdefault("calibration", calibration_for("llama"))
    return secateur.convert(model, out, to="moe", **options)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "base", "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_are_the_identity_and_parameters_are_the_same_but_for_routers(family, tmp_path):
    model = save_tiny(tmp_path / "model", family)
    result = convert(model, tmp_path / "out", top_k=8, seed=3)
    assert not any("--seed" in line for line in result.warnings)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), atol=1e-4, rtol=1e-4)
    assert result.after.parameters - result.before.parameters == 2 * (8 * 32 + 8 * 8)
    assert result.after.parameters == load_model(tmp_path / "out").num_parameters()
    assert not any("not sparse" in line for line in result.verdict)


def test_the_result_is_verified_in_a_fresh_process_and_experts_are_equal(tmp_path):
    model = save_tiny(tmp_path / "model", "gpt2")
    result = convert(model, tmp_path / "out", verify=True)
    assert result.verified
    assert result.verification["tensors_unchanged"] > 0
    assert any("is not sparse" in line for line in result.verdict)
    layers = [m for m in load_model(tmp_path / "out").modules() if isinstance(m, MoeFfn)]
    assert len(layers) == 2
    assert all(layer.neurons % layer.experts == 0 and layer.top == 3 for layer in layers)
    rows = [row for row in result.matrices if row.kind == "moe" and row.error is not None]
    assert len(rows) == 2
    assert all(0 < row.error < 1 for row in rows)


def test_the_weights_of_an_expert_belong_together(base, tmp_path):
    """Every neuron of the result is one of the source: the same rows of gate and up, the same column of down."""
    convert(base, tmp_path / "out")
    with CheckpointReader(base) as old, CheckpointReader(tmp_path / "out") as new:
        for block in range(2):
            at = f"model.layers.{block}.mlp"
            parts = [old.tensor(f"{at}.{name}_proj.weight") for name in ("gate", "up", "down")]
            was = torch.cat([parts[0], parts[1], parts[2].t()], dim=1)
            now = torch.cat([new.tensor(f"{at}.{name}") for name in ("gate", "up", "down")], dim=1)
            assert sorted(map(tuple, was.tolist())) == sorted(map(tuple, now.tolist()))
            assert not was.equal(now)


def test_decoding_with_the_cache_is_the_same_as_without(base, tmp_path):
    convert(base, tmp_path / "out")
    model, prompt = load_model(tmp_path / "out"), calibration_for("llama")[:1, :8]
    with torch.no_grad():
        found = [
            model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=cached, pad_token_id=0).tolist()
            for cached in (True, False)
        ]
    assert found[0] == found[1]
    assert len(found[0][0]) == 20


def test_training_reaches_the_experts_that_are_chosen_and_leaves_the_router(base, tmp_path):
    convert(base, tmp_path / "out")
    model, ids = load_model(tmp_path / "out"), calibration_for("llama")[:2]
    model(ids, labels=ids).loss.backward()
    layer = model.model.layers[0].mlp
    assert layer.router_in.grad is None
    assert layer.router_out.grad is None
    for matrix in (layer.gate, layer.up, layer.down):
        assert bool(matrix.grad.any())


def test_it_runs_in_bfloat16_and_is_on_the_page_of_a_report(base, tmp_path):
    convert(base, tmp_path / "out", router="similarity")
    with torch.no_grad():
        model, ids = load_model(tmp_path / "out", dtype="bfloat16"), calibration_for("llama")[:1, :8]
        assert model(ids).logits.isfinite().all()
        assert model(ids[:, :1]).logits.dtype == torch.bfloat16  # one token goes another way
    secateur.report([tmp_path / "out"], tmp_path / "page.html")
    flags = "--to moe --experts 8 --top-k 3 --router similarity"
    assert command_of(read_inputs([tmp_path / "out"])[0].result, "X").endswith(f"-o X {flags}")


@pytest.mark.parametrize(("name", "value", "words"), [
    ("experts", 7, "cuts 48 neurons into 7 experts"), ("top", 9, "takes 9 of 8 experts"),
    ("router", "chance", "as router of model.layers.0.mlp"), ("up", "nothing", "parts of model.layers.0.mlp"),
])  # fmt: skip
def test_a_damaged_config_is_refused(name, value, words, base, tmp_path):
    convert(base, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["modules"]["model.layers.0.mlp"][name] = value
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        secateur.inspect(tmp_path / "out")


def test_the_oracle_is_no_worse_than_the_router_and_needs_none(base, tmp_path):
    errors = {}
    for router in ("oracle", "mlp"):
        result = convert(base, tmp_path / router, router=router)
        errors[router] = sum(row.error for row in result.matrices if row.error)
    assert errors["oracle"] < errors["mlp"]
    assert load_model(tmp_path / "oracle").num_parameters() == load_model(base).num_parameters()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_a_token_does_not_come_to_is_what_learns_nothing_from_it(family, tmp_path):
    model = save_tiny(tmp_path / "model", family)
    for router in ("similarity", "oracle"):
        convert(model, tmp_path / router, router=router)
    loaded = load_model(tmp_path / "similarity")
    loaded(calibration_for("llama")[:1, :1]).logits.square().sum().backward()
    for layer in (module for module in loaded.modules() if isinstance(module, MoeFfn)):
        parts = [part for name, part in layer.named_parameters() if not name.startswith("router")]
        assert layer.unread == sum(int((part.grad == 0).sum()) for part in parts) > 0
    neurons = loaded.config.intermediate_size if family == "llama" else 4 * 32
    for layer in (module for module in load_model(tmp_path / "oracle").modules() if isinstance(module, MoeFfn)):
        assert layer.unread == neurons * 5 // 8 * 32  # all are computed to choose; five of eight are then left out


def test_a_relu_is_not_called_dense(tmp_path):
    model = save_tiny(tmp_path / "model", "gpt2", activation_function="relu")
    result = convert(model, tmp_path / "out", split="activations")
    assert not any("not sparse" in line for line in result.verdict)


def test_experts_by_coactivation_are_the_identity_together_and_the_same_each_time(tmp_path):
    pytest.importorskip("pymetis", reason="the extra 'metis' is not installed")
    model = save_tiny(tmp_path / "model", "gpt2", activation_function="relu")
    for name in ("out", "again"):
        convert(model, tmp_path / name, top_k=8, split="coactivation")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), atol=1e-4, rtol=1e-4)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert files[0] == files[1]
    convert(model, tmp_path / "weights", top_k=8)
    assert files[0] != (tmp_path / "weights" / "model.safetensors").read_bytes()


def test_targets_choose_the_blocks(base, tmp_path):
    result = convert(base, tmp_path / "out", targets=["model.layers.1.*"])
    assert {row.name.split(".")[2] for row in result.matrices if row.kind == "moe"} == {"1"}
    model = load_model(tmp_path / "out")
    assert [isinstance(layer.mlp, MoeFfn) for layer in model.model.layers] == [False, True]


def test_a_run_that_was_stopped_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    model = save_tiny(tmp_path / "model", "gpt2")  # biases are permuted with their neurons
    convert(model, tmp_path / "whole")
    append = Ledger.append

    def stop(self: Ledger, step: Any) -> None:
        append(self, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "append", stop)
        with pytest.raises(Interrupted):
            convert(model, tmp_path / "out")
    convert(model, tmp_path / "out", resume=True)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_other_verbs_open_the_result(base, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 20)
    convert(base, tmp_path / "all", top_k=8)
    found = [secateur.evaluate(folder, data=str(text), sequence_length=64) for folder in (base, tmp_path / "all")]
    assert found[1].perplexity == pytest.approx(found[0].perplexity, rel=1e-4)
    convert(base, tmp_path / "out")
    added = secateur.inspect(tmp_path / "out").parameters - secateur.inspect(base).parameters
    assert added == 2 * (8 * 32 + 8 * 8)
    ours, theirs = (count_flops(build_skeleton(folder), context=16) for folder in (tmp_path / "out", base))
    spared = 2 * 2 * 3 * 32 * 48 * 5 / 8  # of 8 experts 5 are not computed
    routers = 2 * 2 * (8 * 32 + 8 * 8)
    assert theirs.per_token - ours.per_token == spared - routers


def test_a_plain_network_is_known_by_what_it_computes():
    for family, gated in (("llama", True), ("gpt2", False), ("t5", False)):
        model = tiny_model(family)
        blocks = find_structure(model).blocks
        found = [one for block in blocks for one in FeedForwards(model).of(block)]
        assert len(found) == len(blocks)
        assert all(bool(one.gate) == gated for one in found)
        if gated:
            assert (found[0].gate, found[0].up) == ("gate_proj", "up_proj")  # SiLU(G x) * U x, not the other way round
    for family in ("opt", "bloom", "bert", "mixtral"):
        model = tiny_model(family)
        assert not [one for block in find_structure(model).blocks for one in FeedForwards(model).of(block)]


def test_a_network_that_computes_something_else_is_none():
    model = tiny_model("llama")

    class Odd(type(model.model.layers[0].mlp)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x

    for layer in model.model.layers:
        layer.mlp.__class__ = Odd
    assert isinstance(model.model.layers[0].mlp, nn.Module)
    assert not FeedForwards(model).of(find_structure(model).blocks[0])
