"""Experts removed end to end: against the stock class cut by hand, and the choice against naive sums over tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import nn

import secateur
from secateur.cli.app import main
from secateur.engine.inputs import output_tensor
from secateur.errors import Interrupted, RecipeError, SparsityError, UnknownNameError, UnsupportedModelError, UsageError
from secateur.progress import Reporter
from secateur.result import PruneResult
from secateur.structured.routing import Use, difference_of_sum, read_call
from tests.models import MIXTURES, calibration_for, save_tiny, tiny_model
from tests.structured.test_prune_units import StopAt

CANNOT = {"jetmoe": "are not one module in each block", "llama4": "is called in an unknown way"}
"""Where experts cannot go, and the words that say why."""


MIXTURE = r"\.(?:mlp|block_sparse_moe)\."
"""What stands between the name of a block and those of its experts."""


def _stock(folder: Path) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32).eval()


def _prune(folder: Path, out: Path, **changes: Any) -> PruneResult:
    ids = calibration_for("llama", rows=4)
    values = {"verify": False, "evaluate": False, "calibration": ids, "sparsity": 0.15, **changes}
    return secateur.prune(folder, out, structure=values.pop("structure", "experts"), **values)


def _answer(model: transformers.PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(5))
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    with torch.no_grad():
        return output_tensor(model(**inputs))


def _kept(result: PruneResult) -> dict[str, list[int]]:
    """By block: the experts that stayed."""
    return {re.split(MIXTURE, matrix.name)[0]: matrix.units for matrix in result.matrices}


def _cut_by_hand(folder: Path, config: dict[str, Any], kept: dict[str, list[int]]) -> transformers.PreTrainedModel:
    """The stock class with fewer experts: slices of eight along the first dimension, and modules ``expert_N``."""
    whole = _stock(folder)
    small = type(whole)._from_config(type(whole.config).from_dict(config)).eval()
    state = {}
    for name, tensor in whole.state_dict().items():
        own = kept.get(re.split(MIXTURE, name)[0]) if ".shared" not in name else None
        if own is not None and ".expert_" in name:  # Switch: modules in a list
            number = int(name.split(".expert_")[1].split(".")[0])
            if number in own:
                state[name.replace(f".expert_{number}.", f".expert_{own.index(number)}.")] = tensor
        elif own is not None and re.search(MIXTURE, name) and ".expert_" not in name and 8 in tensor.shape[:2]:
            state[name] = tensor.index_select(tensor.shape.index(8), torch.tensor(own))
        else:
            state[name] = tensor
    small.load_state_dict(state, strict=True)
    return small


@pytest.fixture(scope="module", params=sorted(MIXTURES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    return request.param, save_tiny(folder, request.param)


def test_result_is_the_stock_model_cut_by_hand(family: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = family
    out = tmp_path / "out"
    if name in CANNOT:
        with pytest.raises(UnsupportedModelError, match=CANNOT[name]):
            _prune(folder, out)
        assert not out.exists()
        return
    result = _prune(folder, out)
    config = json.loads((out / "config.json").read_text())
    (stay,) = set(result.shape_changes.values())
    assert 2 <= stay < 8
    assert all(config[entry] == stay for entry in result.shape_changes)
    kept = _kept(result)
    assert {len(units) for units in kept.values()} == {stay}
    before, after = _stock(folder), _stock(out)
    by_hand = _cut_by_hand(folder, config, kept)
    for key, tensor in by_hand.state_dict().items():
        assert torch.equal(after.state_dict()[key], tensor), key
    torch.testing.assert_close(_answer(after), _answer(by_hand), rtol=1e-5, atol=1e-6)
    saved = before.num_parameters() - after.num_parameters()
    assert saved > 0
    assert result.before.parameters - result.after.parameters >= saved
    assert load_file(out / "model.safetensors").keys() <= load_file(folder / "model.safetensors").keys()


def test_removed_is_what_a_masked_router_computes(tmp_path: Path) -> None:
    """The whole stock model, its routers never choosing the experts that went."""
    for name in ("mixtral_8", "qwen3_moe_8"):
        folder = save_tiny(tmp_path / name, name)
        result = _prune(folder, tmp_path / f"{name}-out", sparsity=0.4)
        whole = _stock(folder)
        for block, units in _kept(result).items():
            gate = whole.get_submodule(f"{block}.mlp.gate")

            def routed(states: torch.Tensor, gate: nn.Module = gate, units: list[int] = units) -> Any:
                logits = torch.full((len(states.reshape(-1, 32)), 8), -torch.inf)
                logits[:, units] = F.linear(states.reshape(-1, 32), gate.weight)[:, units]
                weights, numbers = logits.softmax(-1).topk(2, dim=-1)
                return logits, weights / weights.sum(-1, keepdim=True), numbers

            gate.forward = routed
        torch.testing.assert_close(_answer(_stock(tmp_path / f"{name}-out")), _answer(whole), rtol=1e-4, atol=1e-4)


def _naive_reap(model: transformers.PreTrainedModel, layer: int, ids: torch.Tensor) -> tuple[list[float], list[int]]:
    """Saliency and use of the experts of one Mixtral or Qwen layer, expert by expert from the stock weights."""
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    experts = model.model.layers[layer].mlp.experts
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        for row in ids:
            model(row[None])
    handle.remove()
    sums, counts = [0.0] * 8, [0] * 8
    experts.requires_grad_(False)
    for states, numbers, weights in seen:
        for token, state in enumerate(states):
            for number, weight in zip(numbers[token].tolist(), weights[token].tolist(), strict=True):
                gate, up = (experts.gate_up_proj[number] @ state).chunk(2)
                sums[number] += weight * float((experts.down_proj[number] @ (F.silu(gate) * up)).norm())
                counts[number] += 1
    return [total / max(count, 1) for total, count in zip(sums, counts, strict=True)], counts


@pytest.mark.parametrize("method", ["reap", "frequency"])
def test_the_choice_is_that_of_naive_sums(method: str, tmp_path: Path) -> None:
    """The second block is scored behind the first one as it was cut."""
    folder = save_tiny(tmp_path / "model", "qwen3_moe_8")
    ids = calibration_for("llama", rows=6)
    result = _prune(folder, tmp_path / "out", method=method, calibration=ids, sparsity=0.3)
    whole, cut = _stock(folder), _stock(tmp_path / "out")
    for layer, (block, units) in enumerate(_kept(result).items()):
        assert block == f"model.layers.{layer}"
        reap, counts = _naive_reap(whole, layer, ids)
        scores = reap if method == "reap" else counts
        order = sorted(range(8), key=lambda number: (scores[number], number))
        assert units == sorted(order[8 - len(units) :])
        assert len(units) < 8
        whole.model.layers[layer] = cut.model.layers[layer]


@pytest.mark.parametrize(("bend", "understood"), [(lambda x: x, True), (torch.tanh, False)])
def test_experts_whose_parts_do_not_sum_up_are_not_understood(bend: Any, understood: bool) -> None:
    """Three experts that scale their tokens, and what comes of a function over the sum of them."""

    class Scales(nn.Module):
        def forward(self, states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return bend((weights * (1 + chosen)).sum(1, keepdim=True) * states)

    generator = torch.Generator().manual_seed(0)
    states, weights = torch.randn(10, 6, generator=generator), torch.rand(10, 2, generator=generator)
    chosen = torch.rand(10, 3, generator=generator).argsort(dim=1)[:, :2]
    call = read_call(Scales(), (states,), {"weights": weights, "chosen": chosen}, 3)
    assert (difference_of_sum(call, 3) < 1e-6) == understood
    if understood:
        use = Use(3)
        use.add(call, "block")
        for expert in range(3):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            norms = weights[token, slot] * (1 + expert) * states[token].norm(dim=1)
            assert use.tokens[expert] == len(token)
            assert float(use.outputs[expert]) == pytest.approx(float(norms.sum()), rel=1e-5)
    assert read_call(Scales(), (states, chosen), {}, 3) is None


def test_magnitude_needs_no_calibration_and_takes_the_smallest(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "mixtral_8")
    result = _prune(folder, tmp_path / "out", method="magnitude", calibration="no such file", sparsity=0.3)
    for block, units in _kept(result).items():
        experts = _stock(folder).get_submodule(f"{block}.mlp.experts")
        sizes = experts.gate_up_proj.square().sum((1, 2)) + experts.down_proj.square().sum((1, 2))
        assert units == sorted(sizes.argsort()[8 - len(units) :].tolist())


def test_parameters_that_go_are_those_of_the_experts(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "mixtral_8")
    weights = 3 * 32 * 48
    prunable = 2 * (8 * weights + 2 * 32 * 32 + 2 * 32 * 16)
    result = _prune(folder, tmp_path / "out", sparsity=2 * 2 * weights / prunable)
    assert result.sparsity == pytest.approx(2 * 2 * weights / prunable, abs=1e-9)
    assert result.before.parameters - result.after.parameters == 2 * 2 * (weights + 32)
    assert result.shape_changes == {"num_local_experts": 6}


def test_groups_of_experts_lose_as_many_each(tmp_path: Path) -> None:
    """DeepSeek first chooses one of two groups, so both must stay equally large; its first block has no experts."""
    notes: list[str] = []

    class Keep(Reporter):
        def note(self, text: str) -> None:
            notes.append(text)

    folder = save_tiny(tmp_path / "model", "deepseek_v3")
    result = _prune(folder, tmp_path / "out", reporter=Keep())
    for units in _kept(result).values():
        assert [number // 4 for number in units].count(0) == len(units) / 2
    assert any("as many from each of 2 groups; without experts, and left as they are: blocks 0" in n for n in notes)


def test_generation_with_a_cache_is_generation_without(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "qwen3_moe_8", mlp_only_layers=[0], num_hidden_layers=3)
    _prune(folder, tmp_path / "out", sparsity=0.3)
    model = _stock(tmp_path / "out")
    ids = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(2))
    cached, plain = (model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


def test_experts_that_no_token_reached_are_named(tmp_path: Path) -> None:
    """Router rows that point away from every token: two experts are never used, in the first block only."""
    folder = save_tiny(tmp_path / "model", "mixtral_8")
    model = _stock(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight.abs_()
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.gate.weight[:] = 0.5 + torch.rand(8, 32, generator=torch.Generator().manual_seed(1))
        model.model.layers[0].mlp.gate.weight[[2, 5]] = -1
    model.save_pretrained(folder)
    ids = calibration_for("llama", rows=4)
    unused = [number for number, count in enumerate(_naive_reap(model, 0, ids)[1]) if not count]
    assert {2, 5} <= set(unused)
    said = f"no calibration token came to experts {', '.join(map(str, unused))}: "
    result = _prune(folder, tmp_path / "out", sparsity=0.1, calibration=ids)
    first = _kept(result)["model.layers.0"]
    assert first == [number for number in range(8) if number != unused[0]]
    still = ", ".join(map(str, unused[1:]))
    assert any(warning.endswith(f"{said}{still} stay all the same") for warning in result.warnings)
    result = _prune(folder, tmp_path / "more", sparsity=0.12 * len(unused), calibration=ids)
    assert any(warning.endswith(f"{said}all of them are removed") for warning in result.warnings)


def test_fewer_than_the_router_takes_is_refused_with_the_nearest(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "mixtral_8", num_experts_per_tok=4)
    with pytest.raises(SparsityError, match="3 of 8 experts cannot stay") as caught:
        _prune(folder, tmp_path / "out", sparsity=0.52)
    assert "the nearest numbers that can: 4" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_an_entry_under_another_name_in_the_file_is_changed_there(tmp_path: Path) -> None:
    """Qwen writes num_experts; its class calls it num_local_experts and knows both."""
    folder = save_tiny(tmp_path / "model", "qwen3_moe_8")
    config = json.loads((folder / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")
    (folder / "config.json").write_text(json.dumps(config))
    result = _prune(folder, tmp_path / "out", method="magnitude", sparsity=0.3)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "num_local_experts" not in written
    assert written["num_experts"] == len(_stock(tmp_path / "out").model.layers[0].mlp.experts.down_proj)
    assert written["num_experts"] == len(result.matrices[0].units)


def test_identity_at_sparsity_zero(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "mixtral_8")
    _prune(folder, tmp_path / "out", sparsity=0.0)
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )


@pytest.mark.parametrize("name", ["deepseek_v3", "switch"])
def test_resumed_is_the_uninterrupted_run(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder = save_tiny(tmp_path / "model", name)
    run = {"sparsity": 0.2}
    _prune(folder, tmp_path / "whole", **run)
    with pytest.raises(Interrupted):
        _prune(folder, tmp_path / "out", reporter=StopAt(2), **run)
    _prune(folder, tmp_path / "out", resume=True, **run)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


def test_in_half_precision_and_shards_what_stays_is_copied(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "mixtral_8", dtype=torch.bfloat16, max_shard_size="40KB")
    result = _prune(folder, tmp_path / "out", verify=True, sparsity=0.3, activation_memory="20KB")
    assert result.verified
    assert result.verification["output_difference"] <= 1e-4
    assert result.verification["tensors_unchanged"] > 0
    assert result.after.dtype == "bfloat16"


def test_blocks_and_experts_in_one_run(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "qwen3_moe_8", num_hidden_layers=4)
    result = _prune(folder, tmp_path / "out", structure="depth,experts", depth_by="influence", sparsity=0.5)
    assert len(result.blocks_kept) == 3
    assert result.shape_changes["num_hidden_layers"] == 3
    experts = _stock(tmp_path / "out").model.layers[0].mlp.experts
    assert len(experts.down_proj) == result.shape_changes["num_local_experts"] < 8


def test_a_dry_run_says_what_the_run_does_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(tmp_path / "model", "mixtral_8")
    flags = ["prune", str(folder), "-o", str(tmp_path / "out"), "--structure", "experts", "--sparsity", "0.3"]
    flags += ["--method", "magnitude", "--json", "--quiet"]
    assert main([*flags, "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    assert main([*flags, "--no-evaluate", "--no-verify"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert plan["removed"] == pytest.approx(result["sparsity"])
    assert plan["shape_changes"] == result["shape_changes"]
    assert plan["units"] == {"experts": [8, result["shape_changes"]["num_local_experts"]]}
    assert plan["lines"] == [f"experts: 8 -> {plan['units']['experts'][1]} in each of 2 blocks"]


def test_a_model_in_memory_does_not_become_smaller_in_place(tmp_path: Path) -> None:
    model = tiny_model("mixtral_8")
    with pytest.raises(UsageError, match="cannot become smaller in place"):
        secateur.prune(model, structure="experts", method="magnitude", evaluate=False)
    result = secateur.prune(
        model, tmp_path / "out", structure="experts", method="magnitude", sparsity=0.3, evaluate=False, verify=False
    )
    assert len(_stock(tmp_path / "out").model.layers[0].mlp.experts.down_proj) == len(result.matrices[0].units) < 8


@pytest.mark.parametrize(
    ("kind", "words", "options"),
    [
        (UnknownNameError, "did you mean 'reap'", {"method": "reep"}),
        (UnknownNameError, "unknown method for --structure experts 'obs'", {"method": "obs"}),
        (UsageError, "method obs has no meaning with --structure experts", {"method": secateur.Obs()}),
        (
            UsageError,
            "method reap has no meaning with --structure ffn",
            {"method": secateur.Reap(), "structure": "ffn"},
        ),
        (UsageError, "method reap needs --structure experts", {"method": secateur.Reap(), "structure": ()}),
        (RecipeError, "experts and ffn cannot go in one run", {"structure": "experts,ffn"}),
        (SparsityError, "0.0 of 8 experts cannot be removed", {"sparsity": 0.001}),
        (SparsityError, "1 to 7 can stay", {"sparsity": 0.95}),
        (UnsupportedModelError, "have no experts", {"family": "llama"}),
    ],
)
def test_refused_before_work(kind: type[Exception], words: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", options.pop("family", "mixtral_8"))
    with pytest.raises(kind) as caught:
        _prune(folder, tmp_path / "out", **options)
    assert words in f"{caught.value} {caught.value.hint}"
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
