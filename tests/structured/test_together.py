"""Heads removed together with hidden channels: against the stock class with both at zero, by hand, and end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import secateur
from secateur.errors import Interrupted, RecipeError, SparsityError, UnsupportedModelError
from secateur.result import PruneResult
from secateur.structured.channels import Channels
from secateur.verbs.prune import plan
from tests import models
from tests.coverage.check import WrongResultError, check
from tests.models import calibration_for, save_tiny
from tests.structured.test_prune_units import StopAt

BART = {
    "vocab_size": 128, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
CAN = {
    # What the smaller config says, beside what was there; 12 is the width of a head in none of them, 8 in all.
    "bart": {"d_model": 24, "encoder_attention_heads": 3, "decoder_attention_heads": 3},
    "bert": {"hidden_size": 24, "num_attention_heads": 3},
    "distilbert": {"dim": 24, "n_heads": 3},
    "gpt2": {"n_embd": 24, "n_head": 3, "n_inner": 128},
    "gpt_neox": {"hidden_size": 24, "num_attention_heads": 3},
    "opt": {"hidden_size": 24, "word_embed_proj_dim": 24, "num_attention_heads": 3},
    "t5": {"d_model": 24, "num_heads": 3},
    "vit": {"hidden_size": 24, "num_attention_heads": 3},
}


@pytest.fixture(autouse=True)
def bart(monkeypatch: pytest.MonkeyPatch) -> None:
    """One family more."""
    monkeypatch.setitem(models.FAMILIES, "bart", ("BartConfig", "BartForConditionalGeneration", BART))


def _stock(folder: Path) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32).eval()


def _prune(folder: Path, out: Path, family: str, **changes: Any) -> PruneResult:
    values = {
        "structure": "heads,hidden", "sparsity": 0.35, "verify": False, "evaluate": False, "compute_dtype": "float32",
        "calibration": calibration_for(family), **changes,
    }  # fmt: skip
    return secateur.prune(folder, out, **values)


def _inputs(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))}
    ids = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


@pytest.mark.parametrize("family", CAN)
def test_removed_is_what_zeroed_would_compute(family: str, tmp_path: Path) -> None:
    """By the check of the coverage table, which asks nothing of what planned and cut."""
    folder, out = save_tiny(tmp_path / "model", family), tmp_path / "out"
    result = _prune(folder, out, family, verify=family in ("bart", "vit"))
    config = json.loads((out / "config.json").read_text())
    assert {key: config[key] for key in CAN[family]} == CAN[family]
    assert result.shape_changes == CAN[family]
    assert len(result.channels_kept or ()) == 24
    check(folder, out, result, _inputs(_stock(folder)))


_LLAMA_LIKE = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
OTHERWISE = {
    # Norms over the queries and over the keys of all heads: one that divides only, one that subtracts the mean as well.
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {**_LLAMA_LIKE, "num_key_value_heads": 4, "rms_norm_eps": 1e-6}),
    "esmc": ("EsmcConfig", "EsmcForMaskedLM", _LLAMA_LIKE),
    # Queries, values and keys in four parts, with two heads in each.
    "codegen": (
        "CodeGenConfig", "CodeGenForCausalLM",
        {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 64, "rotary_dim": 4},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", OTHERWISE)
def test_heads_that_hang_together_or_lie_in_parts(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What feeds a norm over all heads is removed along with them, and the norm's weight; parts keep as many each."""
    monkeypatch.setitem(models.FAMILIES, family, OTHERWISE[family])
    folder, out = save_tiny(tmp_path / "model", family), tmp_path / "out"
    result = _prune(folder, out, family, sparsity=0.5)
    made = _stock(out)
    check(folder, out, result, _inputs(_stock(folder)))
    shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    width = made.config.hidden_size
    assert width < _stock(folder).config.hidden_size
    if family == "codegen":
        assert made.config.n_head == 4
        kept = [one.units or [] for one in result.matrices if "attn.out_proj" in one.name]
        assert len(kept) == 2
        assert all((torch.tensor(units) // 2).tolist() == [0, 1, 2, 3] for units in kept)
    else:
        norms = [shape for name, shape in shapes.items() if name.endswith(("q_norm.weight", "k_norm.weight"))]
        assert norms == [(width,)] * 4


def test_a_norm_over_the_keys_of_fewer_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped queries: the norm of the keys is as long as the groups are."""
    values = {**_LLAMA_LIKE, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
    monkeypatch.setitem(models.FAMILIES, "olmo2", ("Olmo2Config", "Olmo2ForCausalLM", values))
    folder, out = save_tiny(tmp_path / "model", "olmo2"), tmp_path / "out"
    result = _prune(folder, out, "olmo2", structure="kv-groups,hidden", sparsity=0.5)
    check(folder, out, result, _inputs(_stock(folder)))
    assert _stock(out).config.num_key_value_heads == 1
    with pytest.raises(UnsupportedModelError, match="norm over all key-value groups") as caught:
        _prune(folder, tmp_path / "alone", "olmo2", structure="kv-groups", sparsity=0.1)
    assert "--structure kv-groups,hidden" in caught.value.hint
    assert not (tmp_path / "alone").exists()


def test_the_check_can_fail(tmp_path: Path) -> None:
    """Another channel than the result says."""
    folder, out = save_tiny(tmp_path / "model", "bert"), tmp_path / "out"
    result = _prune(folder, out, "bert")
    inputs = _inputs(_stock(folder))
    gone = next(channel for channel in range(32) if channel not in (result.channels_kept or ()))
    result.channels_kept = [gone, *(result.channels_kept or ())[1:]]
    with pytest.raises(WrongResultError, match="holds other numbers"):
        check(folder, out, result, inputs)


def test_parameters_that_go_are_those_of_heads_and_channels(tmp_path: Path) -> None:
    """A BERT by hand: attention on both sides, feed-forward on one, norms, embeddings and head."""
    folder = save_tiny(tmp_path / "model", "bert")
    result = _prune(folder, tmp_path / "out", "bert")

    def parameters(hidden: int) -> int:
        attention = 4 * (hidden * hidden + hidden)
        block = attention + (48 * hidden + 48) + (hidden * 48 + hidden) + 4 * hidden
        embeddings = (128 + 256 + 2) * hidden + 2 * hidden
        head = hidden * hidden + hidden + 2 * hidden + 128
        return 2 * block + embeddings + head

    assert result.before.parameters == parameters(32)
    assert result.after is None or result.after.parameters == parameters(24)
    matrices = [2 * (4 * hidden * hidden + 2 * 48 * hidden) for hidden in (32, 24)]
    assert result.sparsity == pytest.approx(1 - matrices[1] / matrices[0], abs=1e-9)


def test_groups_go_with_their_heads(tmp_path: Path) -> None:
    """Grouped queries: heads,hidden takes heads of every group, kv-groups,hidden whole groups; both in proportion."""
    folder = save_tiny(tmp_path / "model", "qwen2")
    found = {
        kind: _prune(folder, tmp_path / kind, "qwen2", structure=f"{kind},hidden", sparsity=0.55).shape_changes
        for kind in ("heads", "kv-groups")
    }
    assert found["heads"] == {"hidden_size": 16, "num_attention_heads": 2}
    assert found["kv-groups"] == {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    for kind in found:
        assert _stock(tmp_path / kind).config.head_dim == 8


def test_neurons_that_the_config_binds_go_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first GPT has four times as many neurons as channels, whatever its config says."""
    values = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    monkeypatch.setitem(models.FAMILIES, "gpt1", ("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", values))
    folder, out = save_tiny(tmp_path / "model", "gpt1"), tmp_path / "out"
    result = _prune(folder, out, "gpt1", sparsity=0.4)
    assert result.shape_changes == {"n_embd": 24, "n_head": 3}
    neurons = {tuple(one.shape): len(one.units or ()) for one in result.matrices if "mlp.c_proj" in one.name}
    assert neurons == {(24, 96): 96}
    check(folder, out, result, _inputs(_stock(folder)))


def test_vectors_of_an_attention_are_cut_as_the_proof_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeBERTa adds biases of its own to queries and values: as long as the channels are, but along the heads."""
    values = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0,
    }  # fmt: skip
    monkeypatch.setitem(models.FAMILIES, "deberta", ("DebertaConfig", "DebertaForMaskedLM", values))
    folder, out = save_tiny(tmp_path / "model", "deberta"), tmp_path / "out"
    result = _prune(folder, out, "deberta")
    check(folder, out, result, _inputs(_stock(folder)))
    name = "deberta.encoder.layer.1.attention.self.q_bias"
    before, after = (_stock(place).get_parameter(name) for place in (folder, out))
    units = next(one.units for one in result.matrices if "layer.1.attention.output" in one.name)
    assert torch.equal(after, before.reshape(4, 8)[units].reshape(-1))


def test_the_plan_says_what_goes(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "bert")
    planned = plan(folder, recipe=secateur.Recipe(structure=("heads", "hidden"), sparsity=0.35))
    assert planned.units == {"hidden": [32, 24], "heads": [4, 3]}
    assert planned.lines == [
        "hidden channels: 32 -> 24 everywhere, a multiple of 8",
        "heads: 4 -> 3 in each of 2 places, with the hidden channels",
        "norms that subtract the mean take it over the 24 channels that stay",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- what is chosen and solved -------------------------------------------------------------------------------------


def _seen(folder: Path, family: str, name: str) -> tuple[transformers.PreTrainedModel, torch.Tensor]:
    """A stock model, and the inputs of one of its modules on the calibration data."""
    model, found = _stock(folder), []
    model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: found.append(args[0].reshape(-1, args[0].shape[-1]).double())
    )
    with torch.no_grad():
        model(calibration_for(family))
    return model, found[0]


def test_the_output_projection_is_the_direct_solution(tmp_path: Path) -> None:
    """min |narrow W'^T - wide W^T|^2 with a bias, pulled towards the old weights, on what really arrives."""
    folder, out = save_tiny(tmp_path / "model", "opt"), tmp_path / "out"
    result = _prune(folder, out, "opt")
    name = "model.decoder.layers.1.self_attn.out_proj"
    (dense, wide), (made, narrow) = (_seen(place, "opt", name) for place in (folder, out))
    units = next(one.units for one in result.matrices if one.name == f"{name}.weight")
    columns = [*(8 * head + i for head in units for i in range(8)), 32]
    wide, narrow = (torch.cat([x, torch.ones(len(x), 1)], dim=1).double() for x in (wide, narrow))
    whole, small = (
        torch.cat([model.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.bias")[:, None]], 1).double()
        for model in (dense, made)
    )
    pull = 0.1 * narrow.norm(dim=0).diag()
    right = torch.cat([wide @ whole.T, pull @ whole[:, columns].T])
    expected = torch.linalg.lstsq(torch.cat([narrow, pull]), right, driver="gelsd").solution.T
    torch.testing.assert_close(small, expected[result.channels_kept], rtol=2e-3, atol=1e-4)


def test_the_wanda_choice_of_heads_is_by_hand(tmp_path: Path) -> None:
    """Of each block: the energy that a head's columns add on average, on the dense model's inputs."""
    folder = save_tiny(tmp_path / "model", "gpt2")
    result = _prune(folder, tmp_path / "out", "gpt2", method="wanda", update=False)
    for layer in range(2):
        name = f"transformer.h.{layer}.attn.c_proj"
        model, x = _seen(folder, "gpt2", name)
        weight = model.get_parameter(f"{name}.weight").detach().double().T
        score = (weight.square().sum(0) * x.square().sum(0)).reshape(4, 8).sum(1)
        units = next(one.units for one in result.matrices if one.name == f"{name}.weight")
        assert units == sorted(score.argsort(descending=True)[:3].tolist())


def test_blocks_that_share_position_biases_keep_the_same_heads(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "t5")
    result = _prune(folder, tmp_path / "out", "t5", method="wanda")
    kept = {tuple(matrix.units) for matrix in result.matrices if matrix.units is not None}
    assert len(kept) == 1
    planned = plan(folder, recipe=secateur.Recipe(structure=("heads", "hidden"), sparsity=0.35))
    assert any("the same in all" in line for line in planned.lines)


def test_the_refit_brings_the_logits_nearer(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "gpt2")
    ids = calibration_for("gpt2")
    distances = {}
    with torch.no_grad():
        dense = _stock(folder)(ids).logits.log_softmax(-1)
        for update in (True, False):
            _prune(folder, tmp_path / str(update), "gpt2", update=update)
            made = _stock(tmp_path / str(update))(ids).logits.log_softmax(-1)
            distances[update] = float((dense.exp() * (dense - made)).sum(-1).mean())
    assert distances[True] < 0.9 * distances[False]


# --- the rules of every structure ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "opt", "bart"])
def test_generation_with_a_cache_is_generation_without(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family)
    _prune(folder, tmp_path / "out", family)
    model = _stock(tmp_path / "out")
    ids = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(2))
    cached, plain = (model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize(("family", "blocks"), [("gpt2", 1), ("bert", 1)])
def test_resumed_is_the_uninterrupted_run(family: str, blocks: int, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder = save_tiny(tmp_path / "model", family)
    _prune(folder, tmp_path / "whole", family)
    with pytest.raises(Interrupted):
        _prune(folder, tmp_path / "out", family, reporter=StopAt(blocks))
    _prune(folder, tmp_path / "out", family, resume=True)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("family", "kind", "words", "options"),
    [
        ("bert", UnsupportedModelError, "no block has query heads", {"structure": "heads"}),
        ("bert", UnsupportedModelError, "has no entries for", {"structure": "kv-groups"}),
        ("bert", UnsupportedModelError, "hang on the hidden size together", {"structure": "hidden"}),
    ],
)
def test_one_without_the_other_is_refused_with_what_to_ask_for(
    family: str, kind: type[secateur.errors.SecateurError], words: str, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "model", family)
    with pytest.raises(kind, match=words) as caught:
        _prune(folder, tmp_path / "out", family, **options)
    assert "--structure heads,hidden" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("family", "kind", "words", "options"),
    [
        ("bloom", UnsupportedModelError, "computes something else", {}),  # the slopes of its biases go by the number
        ("bert", SparsityError, "cannot go: heads go together", {"sparsity": 0.01}),
        ("bert", RecipeError, "goes alone, or with heads", {"structure": "heads,hidden,ffn"}),
        ("bert", RecipeError, "both cut the same", {"structure": "heads,kv-groups,hidden"}),
    ],
)
def test_refused_before_work(
    family: str, kind: type[Exception], words: str, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "model", family)
    with pytest.raises(kind, match=words):
        _prune(folder, tmp_path / "out", family, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_proof_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value matrix that loses its rows like channels, and biases that blocks share but do not keep alike."""
    folder = save_tiny(tmp_path / "model", "bert")
    cuts = Channels.unit_cuts

    def forgetful(self: Channels) -> Any:
        made = cuts(self)
        wrong = made["bert.encoder.layer.1.attention.self.value.weight"]
        made["bert.encoder.layer.1.attention.self.value.weight"] = [
            (coupling, type(cut)(cut.name, cut.dim, cut.indices.flip(0))) for coupling, cut in wrong
        ]
        return made

    monkeypatch.setattr(Channels, "unit_cuts", forgetful)
    with pytest.raises(UnsupportedModelError, match="computes something else without hidden channels and the units"):
        _prune(folder, tmp_path / "out", "bert")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
