"""Hidden channels removed end to end: against the stock class with channels at zero, and against naive solves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import secateur
from secateur.engine.inputs import output_tensor
from secateur.errors import Interrupted, RecipeError, SparsityError, UnsupportedModelError
from secateur.result import PruneResult
from secateur.structured import channel_plan
from secateur.structured.channels import Channels
from secateur.verbs.prune import plan
from tests.models import FAMILIES, calibration_for, save_tiny
from tests.structured.test_prune_units import StopAt

CAN = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "smollm3", "mixtral", "qwen3_moe", "t5")
CANNOT = {
    "bert": "hidden channels",
    "bloom": "hidden channels",
    "distilbert": "hidden channels",
    "falcon": "hidden channels",
    "gpt2": "hidden channels",
    "gpt_neox": "hidden channels",
    "opt": "hidden channels",
    "roberta": "hidden channels",
    "vit": "no table of embeddings",
}
"""Families that are refused, and the words that say why."""


def _stock(folder: Path) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32).eval()


def _prune(folder: Path, out: Path, family: str, **changes: Any) -> PruneResult:
    values = {
        "structure": "hidden", "sparsity": 0.25, "round_to": 4, "verify": False, "evaluate": False,
        "compute_dtype": "float32", "calibration": calibration_for(family), **changes,
    }  # fmt: skip
    return secateur.prune(folder, out, **values)


def _inputs(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


def _answer(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return output_tensor(model(**_inputs(model)))


def test_every_family_is_named() -> None:
    assert {*CAN, *CANNOT} == set(FAMILIES)


@pytest.mark.parametrize("family", CAN)
def test_removed_is_what_zeroed_would_compute(family: str, tmp_path: Path) -> None:
    """Without refit and without data: the stock class with slices at zero and norms brought to the same mean."""
    folder = save_tiny(tmp_path / "model", family)
    with torch.no_grad():  # an epsilon in the norms must not matter
        model = _stock(folder)
        embedding = model.get_input_embeddings().weight
        embedding.mul_(4 / embedding.std())
        model.save_pretrained(folder)
    result = _prune(folder, tmp_path / "out", family, method="magnitude", update=False)
    before, after = _stock(folder), _stock(tmp_path / "out")
    assert result.channels_kept is not None
    assert len(result.channels_kept) == 24
    small = {name: tuple(value.shape) for name, value in after.named_parameters()}
    gone = [channel for channel in range(32) if channel not in result.channels_kept]
    scaled = transformers.models.gemma3.modeling_gemma3.Gemma3RMSNorm
    with torch.no_grad():
        for name, parameter in before.named_parameters():
            for dim, (wide, narrow) in enumerate(zip(parameter.shape, small[name], strict=True)):
                if wide != narrow:
                    assert (wide, narrow) == (32, 24)
                    parameter.index_fill_(dim, torch.tensor(gone), 0.0)
                    if parameter.ndim == 1:
                        one = 1.0 if isinstance(before.get_submodule(name.rpartition(".")[0]), scaled) else 0.0
                        parameter.copy_((parameter + one) * (24 / 32) ** 0.5 - one)
    expected = _answer(before)
    torch.testing.assert_close(_answer(after), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    saved = before.num_parameters() - after.num_parameters()
    assert result.before.parameters - result.after.parameters == saved
    assert result.sparsity == pytest.approx(0.25, abs=1e-9)


@pytest.mark.parametrize("family", sorted(CANNOT))
def test_what_cannot_is_refused_with_the_reason(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family)
    with pytest.raises(UnsupportedModelError, match=CANNOT[family]) as caught:
        _prune(folder, tmp_path / "out", family)
    assert "--structure" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_the_proof_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer cut along other channels, and a norm that keeps its weight, are found out before anything is written."""
    folder = save_tiny(tmp_path / "model", "llama")
    cut = Channels.cut

    def shifted(self, name, tensor, keep, scales):
        return cut(self, name, tensor, (keep + name.endswith("1.mlp.down_proj.weight")) % 32, scales)

    def unscaled(self, name, tensor, keep, scales):
        return cut(self, name, tensor, keep, {} if name.endswith("1.input_layernorm.weight") else scales)

    for spoiled in (shifted, unscaled):
        monkeypatch.setattr(Channels, "cut", spoiled)
        with pytest.raises(UnsupportedModelError, match="computes something else without hidden channels"):
            _prune(folder, tmp_path / "out", "llama")
        assert not (tmp_path / "out").exists()


def test_parameters_that_go_are_those_of_the_channels(tmp_path: Path) -> None:
    """A channel of a Llama: its column of the embedding, of every reader, its row of every writer, its norms."""
    folder = save_tiny(tmp_path / "model", "llama", tie_word_embeddings=False)
    result = _prune(folder, tmp_path / "out", "llama")
    block = (32 + 16 + 16) + 32 + 3 * 48
    assert result.before.parameters - result.after.parameters == 8 * (2 * block + 2 * 2 + 1 + 2 * 128)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["hidden_size"], config["head_dim"], config["intermediate_size"]) == (24, 8, 48)
    assert result.shape_changes["hidden_size"] == 24


def test_the_nearest_legal_number_is_taken_and_its_step_is_said(tmp_path: Path) -> None:
    """Llama wants a multiple of its heads; with 12 of them no multiple of 32 or 16 is near 72, but one of 4 is."""
    folder = save_tiny(tmp_path / "model", "llama", hidden_size=96, num_attention_heads=12, num_key_value_heads=3)
    run = {"round_to": 32, "method": "magnitude", "update": False}
    result = _prune(folder, tmp_path / "out", "llama", **run)
    assert result.shape_changes["hidden_size"] == 72
    assert len(result.channels_kept or ()) == 72
    planned = plan(folder, recipe=secateur.Recipe(structure=("hidden",), sparsity=0.25))
    assert planned.lines == ["hidden channels: 96 -> 72 everywhere, a multiple of 8"]
    assert planned.units == {"hidden": [96, 72]}
    assert planned.weights_before - planned.weights_after == round(0.25 * planned.weights_before)


# --- what is chosen and solved, by hand ------------------------------------------------------------------------------


class _Seen:
    """Inputs of modules of a stock model on the calibration data."""

    def __init__(self, folder: Path, family: str, names: list[str]) -> None:
        self.model = _stock(folder)
        self.inputs: dict[str, torch.Tensor] = {}
        for name in names:
            self.model.get_submodule(name).register_forward_pre_hook(self._keep(name))
        with torch.no_grad():
            self.model(calibration_for(family))

    def _keep(self, name: str):
        def hook(module, args):
            self.inputs[name] = args[0].reshape(-1, args[0].shape[-1]).double()

        return hook


def _ridge(narrow: torch.Tensor, wide: torch.Tensor, weight: torch.Tensor, keep: list[int]) -> torch.Tensor:
    """min |narrow W'^T - wide W^T|^2 + 0.01 sum_j |narrow_j|^2 |W'_j - W_j|^2, as one stacked least-squares problem."""
    pull = 0.1 * narrow.norm(dim=0).diag()
    left = torch.cat([narrow, pull])
    right = torch.cat([wide @ weight.T, pull @ weight[:, keep].T])
    return torch.linalg.lstsq(left, right, driver="gelsd").solution.T


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_readers_are_the_direct_solution(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family, tie_word_embeddings=False)
    result = _prune(folder, tmp_path / "out", family)
    keep = result.channels_kept
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "lm_head"]
    names.append("model.layers.0.mlp.gate" if family == "mixtral" else "model.layers.1.mlp.up_proj")
    dense, made = (_Seen(place, family, names) for place in (folder, tmp_path / "out"))
    for name in names:
        weight = dense.model.get_parameter(f"{name}.weight").detach().double()
        expected = _ridge(made.inputs[name], dense.inputs[name], weight, keep)
        found = made.model.get_parameter(f"{name}.weight").detach().double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    if family == "mixtral":  # experts read what the router reads
        fused = "model.layers.0.mlp.experts.gate_up_proj"
        weight = dense.model.get_parameter(fused).detach().double()
        for expert in range(4):
            expected = _ridge(made.inputs[names[-1]], dense.inputs[names[-1]], weight[expert], keep)
            found = made.model.get_parameter(fused)[expert].detach().double()
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_biases_take_in_the_constant_part(tmp_path: Path) -> None:
    """Qwen 2: queries, keys and values have biases, their refit is that of inputs with a column of ones."""
    folder = save_tiny(tmp_path / "model", "qwen2")
    keep = _prune(folder, tmp_path / "out", "qwen2").channels_kept
    name = "model.layers.1.self_attn.k_proj"
    dense, made = (_Seen(place, "qwen2", [name]) for place in (folder, tmp_path / "out"))
    narrow, wide = (
        torch.cat([seen.inputs[name], torch.ones(len(seen.inputs[name]), 1)], dim=1) for seen in (made, dense)
    )
    both = [
        torch.cat([seen.model.get_parameter(f"{name}.weight"), seen.model.get_parameter(f"{name}.bias")[:, None]], 1)
        for seen in (dense, made)
    ]
    expected = _ridge(narrow, wide, both[0].detach().double(), [*keep, 32])
    torch.testing.assert_close(both[1].detach().double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_norms_are_scaled_by_the_energy_that_stays_and_the_last_is_refitted(family: str, tmp_path: Path) -> None:
    """The embedding is the head: only the norm before it can make up, by factors solved from all logits at once."""
    folder = save_tiny(tmp_path / "model", family, tie_word_embeddings=True)
    keep = _prune(folder, tmp_path / "out", family).channels_kept
    offset = 1.0 if family == "gemma3" else 0.0
    first, last = "model.layers.1.input_layernorm", "model.norm"
    dense, made = (_Seen(place, family, [first, last, "lm_head"]) for place in (folder, tmp_path / "out"))
    scale = {}
    for name in (first, last):
        squares = dense.inputs[name].square()
        scale[name] = float((squares / squares.mean(dim=1, keepdim=True)).mean(dim=0)[keep].mean().sqrt())
    gain = {name: (dense.model.get_parameter(f"{name}.weight")[keep] + offset) * scale[name] for name in scale}
    found = made.model.get_parameter(f"{first}.weight") + offset
    torch.testing.assert_close(found, gain[first], rtol=1e-4, atol=1e-5)
    wide, narrow = (seen.model.get_input_embeddings().weight.detach().double() for seen in (dense, made))
    now = made.model.get_parameter(f"{last}.weight").detach().double() + offset
    start = gain[last].detach().double() * (float(wide[:, keep].norm() / narrow.norm()) if offset else 1.0)
    logits = dense.inputs["lm_head"] @ (wide - wide.mean(0)).T
    inputs = made.inputs["lm_head"] / now * start
    design = (inputs[:, None] * (narrow - narrow.mean(0))).reshape(-1, 24)
    pull = (0.01 * design.square().sum(0).mean()).sqrt() * torch.eye(24)
    wanted = torch.cat([logits.reshape(-1), pull.sum(1)])[:, None]
    solved = torch.linalg.lstsq(torch.cat([design, pull]), wanted).solution
    torch.testing.assert_close(now, start * solved[:, 0], rtol=2e-3, atol=1e-4)


def test_the_wanda_choice_is_the_sum_over_all_readers(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama", tie_word_embeddings=False)
    result = _prune(folder, tmp_path / "out", "llama", method="wanda", update=False)
    groups = [["lm_head"]]
    for layer in ("model.layers.0", "model.layers.1"):
        groups.append([f"{layer}.self_attn.{part}_proj" for part in "qkv"])
        groups.append([f"{layer}.mlp.{part}_proj" for part in ("gate", "up")])
    seen = _Seen(folder, "llama", [group[0] for group in groups])
    score = torch.zeros(32, dtype=torch.float64)
    for group in groups:
        weight = torch.cat([seen.model.get_parameter(f"{name}.weight").detach().double() for name in group])
        x = seen.inputs[group[0]]
        score += weight.square().sum(0) * x.square().sum(0) / (x @ weight.T).square().sum()
    assert result.channels_kept == sorted(score.argsort(descending=True)[:24].tolist())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_refit_brings_the_logits_nearer(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family)
    ids = calibration_for(family)
    distances = {}
    with torch.no_grad():
        dense = _stock(folder)(ids).logits.log_softmax(-1)
        for update in (True, False):
            _prune(folder, tmp_path / str(update), family, update=update)
            made = _stock(tmp_path / str(update))(ids).logits.log_softmax(-1)
            distances[update] = float((dense.exp() * (dense - made)).sum(-1).mean())
    assert distances[True] < 0.9 * distances[False]


# --- the rules of every structure ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["t5", "qwen3_moe"])
def test_it_passes_its_verification(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family, max_shard_size="20KB")
    result = _prune(folder, tmp_path / "out", family, verify=True)
    assert result.verified
    assert result.verification["output_difference"] <= 1e-4
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_identity_at_sparsity_zero(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    result = _prune(folder, tmp_path / "out", "llama", sparsity=0.0)
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert result.channels_kept is None


@pytest.mark.parametrize(("blocks", "tied"), [(1, True), (3, False)])
def test_resumed_is_the_uninterrupted_run(blocks: int, tied: bool, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder = save_tiny(tmp_path / "model", "qwen2", num_hidden_layers=3, tie_word_embeddings=tied)
    _prune(folder, tmp_path / "whole", "qwen2")
    with pytest.raises(Interrupted):
        _prune(folder, tmp_path / "out", "qwen2", reporter=StopAt(blocks))
    _prune(folder, tmp_path / "out", "qwen2", resume=True)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


def test_spilled_activations_change_nothing(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder = save_tiny(tmp_path / "model", "mixtral")
    for name, memory in (("kept", "auto"), ("spilled", "0")):
        _prune(folder, tmp_path / name, "mixtral", activation_memory=memory)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("kept", "spilled")]
    assert weights[0] == weights[1]


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    _prune(folder, tmp_path / "out", "llama")
    keys = [set(load_file(place / "model.safetensors")) for place in (folder, tmp_path / "out")]
    assert keys[0] == keys[1]
    assert "lm_head.weight" not in keys[1]
    model = _stock(tmp_path / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_generation_with_a_cache_is_generation_without(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family)
    _prune(folder, tmp_path / "out", family)
    model = _stock(tmp_path / "out")
    ids = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(2))
    cached, plain = (model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("method", ["obs", "magnitude", "wanda", "flap", "taylor"])
def test_every_criterion_chooses_channels(method: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    result = _prune(folder, tmp_path / "out", "llama", method=method, dtype="bfloat16")
    kept = result.channels_kept
    assert kept is not None
    assert kept == sorted(set(kept))
    assert len(kept) == 24


@pytest.mark.parametrize(
    ("kind", "words", "options"),
    [
        (RecipeError, "goes alone", {"structure": "hidden,ffn"}),
        (SparsityError, "cannot stay", {"sparsity": 0.001}),
        (SparsityError, "cannot stay", {"sparsity": 0.995}),
    ],
)
def test_refused_before_work(kind: type[Exception], words: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    with pytest.raises(kind) as caught:
        _prune(folder, tmp_path / "out", "llama", **options)
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_number_the_config_refuses_names_the_nearest(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama", hidden_size=96, num_attention_heads=24, num_key_value_heads=24)
    with pytest.raises(SparsityError, match="not legal in a LlamaConfig") as caught:
        _prune(folder, tmp_path / "out", "llama", sparsity=0.12)
    assert "nearest numbers that are: 72" in caught.value.hint


def test_a_reader_without_a_refit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a matrix gets its input is not found: it is cut like the others, and the user hears of it."""
    folder = save_tiny(tmp_path / "model", "llama")
    original = channel_plan.find_readers

    def forgetful(*args: Any) -> Any:
        groups, loose = original(*args)
        assert not loose
        left = {index: [g for g in own if "mlp" not in g.module] for index, own in groups.items()}
        return left, tuple(r.name for own in groups.values() for g in own if "mlp" in g.module for r in g.readers)

    monkeypatch.setattr(channel_plan, "find_readers", forgetful)
    told = _prune(folder, tmp_path / "out", "llama", verify=True).warnings
    for name in ("gate_proj", "up_proj"):
        assert sum(f"mlp.{name}.weight loses channels without a refit" in line for line in told) == 2
    assert not _prune(folder, tmp_path / "plain", "llama", update=False).warnings
