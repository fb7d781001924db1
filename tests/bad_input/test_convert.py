"""Bad input to `convert`: one clear line, exit status 2, nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur
from secateur.errors import (
    BudgetError,
    CheckpointError,
    OutputError,
    SecateurError,
    SourceError,
    TargetError,
    UnknownNameError,
    UnsupportedModelError,
    UsageError,
)
from tests.converting.models import tuned
from tests.models import calibration_for, save_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "base", "llama")


def refused(kind: type[SecateurError], words: str, model: Any, out: Path, to: str, **options: Any) -> None:
    options = {"evaluate": False, "verify": False, **options}
    with pytest.raises(SecateurError) as caught:
        secateur.convert(model, out, to=to, **options)
    assert type(caught.value) is kind, caught.value
    assert words in caught.value.message
    assert caught.value.hint
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2
    assert not out.exists()
    assert not out.with_name(out.name + ".partial").exists()


DATA = {"calibration": calibration_for("llama")}


@pytest.mark.parametrize(("kind", "words", "options"), [
    (UsageError, "needs --rank or --budget", {}),
    (UsageError, "is more than model.layers.0.self_attn.k_proj.weight (16 x 32) has, which is 16", {"rank": 17}),
    (UnknownNameError, "unknown option of conversion factorized 'experts'", {"rank": 4, "experts": 2}),
    (UsageError, "option cores of conversion factorized is 'two'", {"rank": 4, "cores": "two"}),
    (UsageError, "is no product of 5 numbers above 1", {"rank": 2, "cores": 5, "targets": ["*k_proj*"]}),
    (BudgetError, "are in matrices that are not factorised", {"budget": "parameters=0.5", "targets": ["*k_proj*"]}),
    (BudgetError, "rank 1 everywhere takes", {"budget": "parameters=0.01", **DATA}),
    (TargetError, "*nothing*", {"rank": 4, "targets": ["*nothing*"]}),
])  # fmt: skip
def test_what_cannot_be_factorised(kind, words, options, base, tmp_path):
    refused(kind, words, base, tmp_path / "out", "factorized", **options)


def test_an_unknown_conversion_is_named_and_the_nearest_suggested(base, tmp_path):
    refused(UnknownNameError, "unknown conversion 'factorised'", base, tmp_path / "out", "factorised", rank=4)


def test_models_of_other_shapes_or_kinds_or_bases(base, tmp_path):
    wide = save_tiny(tmp_path / "wide", "llama", intermediate_size=64)
    deep = save_tiny(tmp_path / "deep", "llama", num_hidden_layers=3)
    other = save_tiny(tmp_path / "other", "qwen2")
    stranger = tuned(tmp_path / "stranger", "llama", 5, spread=1.0)
    cases = (
        (wide, "model.layers.0.mlp.gate_proj.weight is (48, 32)"),
        (deep, "model.layers.2."),
        (other, "is a qwen2"),
        (stranger, "was not fine-tuned from"),
    )
    for model, words in cases:
        refused(UnsupportedModelError, words, base, tmp_path / "out", "fused", models=(str(model),), rank=4)
    refused(SourceError, "no such file", base, tmp_path / "out", "fused", models=("./nowhere",))


def test_mixtures_of_experts_are_not_fused(tmp_path):
    model = save_tiny(tmp_path / "model", "mixtral")
    refused(UnsupportedModelError, "stack of experts", model, tmp_path / "out", "fused", models=(str(model),), rank=4)


@pytest.mark.parametrize(("kind", "words", "options"), [
    (UsageError, "needs --experts", {"top_k": 2}),
    (UsageError, "7 experts do not divide the 48 neurons of model.layers.0.mlp", {"experts": 7, "top_k": 2}),
    (UsageError, "--top-k 9 of 8 experts", {"experts": 8, "top_k": 9}),
    (UnsupportedModelError, "no block of LlamaForCausalLM has a plain feed-forward network among the chosen matrices",
     {"experts": 8, "top_k": 2, "targets": ["*self_attn*", "*up_proj*"]}),
])  # fmt: skip
def test_what_cannot_be_cut_into_experts(kind, words, options, base, tmp_path):
    refused(kind, words, base, tmp_path / "out", "moe", **options, **DATA)


@pytest.mark.parametrize("family", ["bert", "opt", "mixtral"])
def test_models_without_a_plain_feed_forward_network_are_not_cut(family, tmp_path):
    model = save_tiny(tmp_path / "model", family)
    words = "has a plain feed-forward network among the chosen matrices"
    refused(UnsupportedModelError, words, model, tmp_path / "out", "moe", experts=8, top_k=2, **DATA)


def test_a_model_of_experts_is_not_cut_again(base, tmp_path):
    secateur.convert(base, tmp_path / "once", to="moe", experts=8, top_k=2, evaluate=False, verify=False, **DATA)
    words = "is converted already"
    refused(UnsupportedModelError, words, tmp_path / "once", tmp_path / "out", "moe", experts=4, top_k=2, **DATA)


def test_blocks_that_cannot_be_tied(base, tmp_path):
    out = tmp_path / "out"
    refused(UsageError, "3 groups do not divide 2 blocks", base, out, "shared", groups=3)
    refused(UsageError, "needs --groups or --iterations", base, out, "shared")
    refused(UsageError, "blocks are tied as a whole", base, out, "shared", groups=1, targets=["*mlp*"])
    several = save_tiny(tmp_path / "t5", "t5")
    refused(UnsupportedModelError, "are in several rows", several, out, "shared", groups=1)
    dense = {"decoder_sparse_step": 1, "mlp_only_layers": [0]}
    unlike = save_tiny(tmp_path / "unlike", "qwen3_moe", **dense)
    refused(UnsupportedModelError, "is built in another way", unlike, out, "shared", groups=1)


def test_a_model_that_shares_nothing_or_does_not_say_what_is_not_run_with_fewer_iterations(base, tmp_path):
    out = tmp_path / "out"
    refused(UnsupportedModelError, "shares nothing", base, out, "shared", iterations=1)
    chain = {"cores": 3, "rank": "full", "share_central": True, "weighting": "none"}
    for name, options in (("factors", {"rank": 4, "weighting": "none"}), ("chain", chain)):
        secateur.convert(base, tmp_path / name, to="factorized", evaluate=False, verify=False, **options)
    refused(UnsupportedModelError, "shares nothing", tmp_path / "factors", out, "shared", iterations=1)
    refused(UnsupportedModelError, "has no map of its blocks", tmp_path / "chain", out, "shared", iterations=1)
    secateur.convert(base, tmp_path / "tied", to="shared", groups=1, evaluate=False, verify=False)
    refused(UsageError, "3 iterations of 2 blocks", tmp_path / "tied", out, "shared", iterations=3)
    refused(UnsupportedModelError, "is converted already", tmp_path / "tied", out, "shared", groups=1)
    config = json.loads((tmp_path / "tied" / "config.json").read_text())
    config["quantization_config"]["sharing"]["step"] = -1
    (tmp_path / "tied" / "config.json").write_text(json.dumps(config))
    refused(CheckpointError, "gives -1 as the step of its blocks", tmp_path / "tied", out, "shared", iterations=1)


def test_out_must_not_be_a_model_that_is_read(base, tmp_path):
    one = tuned(tmp_path / "one", "llama", 1)
    with pytest.raises(OutputError, match="is a model that is read"):
        secateur.convert(base, one, to="fused", models=(str(one),), overwrite=True)
    assert (one / "model.safetensors").is_file()


def test_a_delta_of_another_base_or_damaged_is_refused(base, tmp_path):
    one = tuned(tmp_path / "one", "llama", 1)
    delta = tmp_path / "delta"
    secateur.convert(base, delta, to="fused", models=(str(one),), rank=4, format="delta")
    refused(SourceError, "has other weights", delta, tmp_path / "out", "fused", base=str(one))
    refused(SourceError, "is no delta", base, tmp_path / "out", "fused", base=str(base))
    tensors = load_file(delta / "delta.safetensors")
    name = next(name for name in tensors if name.endswith(".up"))
    save_file({**tensors, name: torch.zeros(3, 3)}, delta / "delta.safetensors")
    refused(CheckpointError, "its sha256 differs", delta, tmp_path / "out", "fused", base=str(base))


@pytest.mark.parametrize(("path", "value", "words"), [
    (["version"], 9, "version 9"),
    (["modules"], 3, "no table of its layers"),
    (["modules", "model.layers.0.mlp.up_proj", "kind"], "exec", "says nothing known of model.layers.0.mlp.up_proj"),
    (["modules", "model.layers.0.mlp.up_proj", "rank"], -1, "gives -1 as rank"),
    (["modules", "model.layers.9.mlp.up_proj"], {"kind": "low_rank", "rank": 2}, "model.layers.9.mlp.up_proj"),
])  # fmt: skip
def test_a_converted_folder_with_a_damaged_config_is_refused(path, value, words, base, tmp_path):
    out = tmp_path / "out"
    secateur.convert(base, out, to="factorized", rank=4, weighting="none", evaluate=False, verify=False)
    damaged = Path(shutil.copytree(out, tmp_path / "damaged"))
    config = json.loads((damaged / "config.json").read_text())
    entry = config["quantization_config"]
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words) as caught:
        secateur.inspect(damaged)
    assert caught.value.hint
