"""``permute`` of the recipe: what is written is what comes of the dense model in another order, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import secateur
from secateur.engine.sink import CheckpointSink
from secateur.errors import Interrupted, RecipeError, UnsupportedModelError, VerificationError
from secateur.recipe import Recipe
from tests.models import calibration_for, save_tiny, tiny_model
from tests.reporters import Notes

GROUPS, EACH, SIZE = 2, 2, 8
"""Key-value groups of the tiny Llama, query heads in each, and numbers in a head."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "llama", "llama")


def pruned(model: Path, out: Path, family: str = "llama", **settings: Any) -> secateur.PruneResult:
    settings = {"pattern": "2:4", "permute": True, "compute_dtype": "float32", "verify": False, **settings}
    rows = 96 if "reconstruct" in settings else 24  # a batch is to be held out
    settings.setdefault("calibration", calibration_for(family, rows=rows))
    return secateur.prune(model, out, evaluate=False, **settings)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def orders_of(result: secateur.PruneResult) -> dict[str, torch.Tensor]:
    return {one.name: torch.tensor(one.order) for one in result.matrices if one.order is not None}


def reordered(folder: Path, result: secateur.PruneResult, out: Path) -> Path:
    """The dense tiny Llama in the order of a result, by hand."""
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    orders = orders_of(result)
    with torch.no_grad():
        for number, layer in enumerate(dense.model.layers):
            order = orders[f"model.layers.{number}.mlp.down_proj.weight"]
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])
            for producer in (layer.mlp.gate_proj, layer.mlp.up_proj):
                producer.weight.copy_(producer.weight[order])
            order = orders[f"model.layers.{number}.self_attn.o_proj.weight"]
            layer.self_attn.o_proj.weight.copy_(layer.self_attn.o_proj.weight[:, order])
            heads = order.reshape(GROUPS, EACH, SIZE) % SIZE
            assert torch.equal(heads[:, 0], heads[:, 1])  # the query heads of a group agree
            rows = (torch.arange(GROUPS)[:, None] * SIZE + heads[:, 0]).reshape(-1)
            layer.self_attn.v_proj.weight.copy_(layer.self_attn.v_proj.weight[rows])
    dense.save_pretrained(out)
    return out


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "magnitude"},
        {"method": "wanda"},
        {"method": "sparsegpt", "pattern": "1:4"},
        {"method": "alps", "error_correction": "1"},
        {"method": "best", "reconstruct": "half-block"},
        {"method": "wanda", "reconstruct": "block"},
    ],
)
def test_it_is_pruning_the_dense_model_in_another_order(model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    result = pruned(model, tmp_path / "out", **settings)
    dense = reordered(model, result, tmp_path / "dense")
    with torch.no_grad():  # which is the same model
        ids = calibration_for("llama", rows=2)
        outputs = [
            transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            for folder in (model, dense)
        ]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5 * float(outputs[0].abs().max()))
    pruned(dense, tmp_path / "other", **settings, permute=False)
    ours, other = weights_of(tmp_path / "out"), weights_of(tmp_path / "other")
    keep, group = (int(part) for part in settings.get("pattern", "2:4").split(":"))
    for matrix in result.matrices:
        written, expected = ours[matrix.name], other[matrix.name]
        assert bool(((written != 0).reshape(len(written), -1, group).sum(dim=2) == keep).all()), matrix.name
        same = (written == 0) == (expected == 0)
        assert float(same.float().mean()) > 0.99, matrix.name  # sums in another order may round otherwise
        torch.testing.assert_close(
            written[same], expected[same], rtol=2e-2, atol=5e-3 * float(written.abs().max()), msg=matrix.name
        )


def test_biases_go_along_and_are_compared_with_the_source(tmp_path: Path) -> None:
    gpt2 = tiny_model("gpt2")
    with torch.no_grad():
        for name, parameter in gpt2.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
    gpt2.save_pretrained(tmp_path / "model")
    result = pruned(tmp_path / "model", tmp_path / "out", "gpt2", method="wanda", verify=True)
    assert result.verified
    dense, made, orders = gpt2.state_dict(), weights_of(tmp_path / "out"), orders_of(result)
    for number in range(2):
        place = f"transformer.h.{number}"
        order = orders[f"{place}.mlp.c_proj.weight"]
        assert torch.equal(made[f"{place}.mlp.c_fc.bias"], dense[f"{place}.mlp.c_fc.bias"][order])
        order = orders[f"{place}.attn.c_proj.weight"]
        assert torch.equal(order // 8, torch.arange(32) // 8)  # each stays in its head
        rows = torch.cat([torch.arange(64), 64 + order])  # queries and keys stay
        assert not torch.equal(order, torch.arange(32))
        assert torch.equal(made[f"{place}.attn.c_attn.bias"], dense[f"{place}.attn.c_attn.bias"][rows])
        for name in ("attn.c_proj.bias", "mlp.c_proj.bias", "ln_1.weight"):
            assert torch.equal(made[f"{place}.{name}"], dense[f"{place}.{name}"])
    # Every bias and norm was compared, four matrices a block were not.
    assert result.verification["tensors_unchanged"] == len(list(gpt2.parameters())) - 8


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_narrow_source_goes_along(tmp_path: Path, dtype: str) -> None:
    folder = save_tiny(tmp_path / "model", "gpt2", dtype=torch.bfloat16)
    settings = {"method": "sparsegpt", "dtype": dtype, "compute_dtype": "bfloat16", "targets": ("*mlp.c_proj*",)}
    result = pruned(folder, tmp_path / "out", "gpt2", **settings, verify=True)
    orders, made, dense = orders_of(result), weights_of(tmp_path / "out"), weights_of(folder)
    assert len(orders) == 2
    for name, order in orders.items():
        feeding = name.replace("c_proj", "c_fc")
        assert torch.equal(made[feeding], dense[feeding][:, order])
    assert result.after.dtype == ("float32" if dtype == "float32" else "bfloat16")


def test_the_verification_sees_a_wrong_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.verbs.job.moved_keys", lambda *args: {})
    folder = save_tiny(tmp_path / "model", "opt")
    with torch.no_grad():
        opt = transformers.AutoModelForCausalLM.from_pretrained(folder)
        for name, parameter in opt.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
    opt.save_pretrained(folder)
    with pytest.raises(VerificationError, match="bias was not pruned, but differs"):
        pruned(folder, tmp_path / "out", method="magnitude", verify=True)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_more_of_the_weights_stays(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family)
    result = pruned(folder, tmp_path / "out", family, method="magnitude", verify=family == "bert")
    shares = [one.saliency_kept for one in result.matrices if one.saliency_kept is not None]
    assert len(shares) == 4
    assert all(after > before for before, after in shares)
    assert any("put in another order" in sentence for sentence in result.verdict)
    if family == "llama":
        pruned(folder, tmp_path / "plain", method="magnitude", permute=False)
        ours, plain = weights_of(tmp_path / "out"), weights_of(tmp_path / "plain")
        for name in orders_of(result):
            assert float(ours[name].abs().sum()) > float(plain[name].abs().sum())


def test_one_group_stays_in_its_order(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    result = pruned(folder, tmp_path / "out", method="magnitude", pattern="4:8", targets=("*o_proj*",))
    assert [one.order for one in result.matrices] == [None, None]
    assert all(one.saliency_kept[0] == one.saliency_kept[1] for one in result.matrices if one.saliency_kept)
    pruned(folder, tmp_path / "plain", method="magnitude", pattern="4:8", targets=("*o_proj*",), permute=False)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "plain")]
    assert weights[0] == weights[1]


def test_only_what_is_pruned_is_put_in_another_order(model: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    result = pruned(model, tmp_path / "out", method="wanda", targets=(name,), verify=True)
    order = orders_of(result)[name]
    made, dense = weights_of(tmp_path / "out"), weights_of(model)
    changed = {key for key in dense if not torch.equal(made[key], dense[key])}
    feeding = {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up")}
    assert changed == {name, *feeding}
    assert all(torch.equal(made[key], dense[key][order]) for key in feeding)
    assert result.verification["tensors_unchanged"] == len(dense) - 2  # all but what was pruned, and the tied head


@pytest.mark.parametrize(
    "settings", [{"method": "wanda"}, {"error_correction": "1", "reconstruct": "block"}], ids=["wanda", "corrected"]
)
def test_a_resumed_run_ends_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    pruned(model, tmp_path / "whole", **settings)
    finish = CheckpointSink.finish

    def stop(self: CheckpointSink, index: int, matrices: Any) -> None:
        finish(self, index, matrices)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointSink, "finish", stop)
        with pytest.raises(Interrupted):
            pruned(model, tmp_path / "out", **settings)
    result = pruned(model, tmp_path / "out", **settings, resume=True, verify=True)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]
    assert len(orders_of(result)) == 4


def test_a_block_that_is_not_seen_to_be_the_same_keeps_its_order(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.engine.permute.agree", lambda *args: False)
    result = pruned(model, tmp_path / "out", method="wanda")
    assert not orders_of(result)
    assert any("stay in their order" in warning for warning in result.warnings)
    pruned(model, tmp_path / "plain", method="wanda", permute=False)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "plain")]
    assert weights[0] == weights[1]


def test_what_is_left_is_told(model: Path, tmp_path: Path) -> None:
    notes = Notes()
    pruned(model, tmp_path / "out", method="magnitude", reporter=notes)
    told = next(note for note in notes.told if "leaves" in note)
    assert all(name in told for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))


def test_nothing_to_put_in_another_order_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="finds nothing to put in another order.*q_proj"):
        pruned(model, tmp_path / "out", targets=("*q_proj*",))
    assert not list(tmp_path.iterdir())


def test_it_takes_a_pattern(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="permute needs an N:M pattern"):
        pruned(model, tmp_path / "out", pattern="unstructured")
    with pytest.raises(RecipeError, match="permute has no meaning with --structure"):
        Recipe(structure=("ffn",), permute=True)
    assert not Recipe(pattern="2:4").permutes
    assert not Recipe(permute=False).permutes


def test_another_order_is_another_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: CheckpointSink, index: int, matrices: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointSink, "finish", stop)
        with pytest.raises(Interrupted):
            pruned(model, tmp_path / "out", method="magnitude")
    with pytest.raises(secateur.errors.OutputError, match="recipe"):
        pruned(model, tmp_path / "out", method="magnitude", permute=False, resume=True)
