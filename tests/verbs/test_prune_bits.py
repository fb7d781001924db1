"""``bits`` of the recipe: what is written is on the grid of the sparse format, which packs it without loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import secateur
from secateur.errors import RecipeError, SecateurError, UsageError
from secateur.methods._quantised import rounded
from secateur.recipe import Recipe
from secateur.verbs.export import export
from tests.models import calibration_for, tiny_model, tiny_tokenizer
from tests.oracles.sparse_reader import read_folder

WIDE = {
    "llama": {"hidden_size": 80, "intermediate_size": 136, "head_dim": 20},  # groups of 64 with a rest
    "gpt2": {"n_embd": 80, "n_inner": 136},
    "qwen3_moe": {"hidden_size": 80, "moe_intermediate_size": 72},
}


def saved(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    tiny_model(family, **WIDE[family]).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model") / "llama", "llama")


def pruned(model: Path, out: Path, family: str = "llama", **settings: Any) -> Any:
    plain = {"method": "sparsegpt", "calibration": calibration_for(family, rows=48), "compute_dtype": "float32"}
    settings = {**plain, **settings}
    return secateur.prune(model, out, verify=False, evaluate=False, **settings)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("method", "bits", "group_size"), [("sparsegpt", 8, 64), ("alps", 4, 64), ("alps", 4, 128)])
def test_the_sparse_format_packs_it_without_loss(
    tmp_path: Path, family: str, method: str, bits: int, group_size: int
) -> None:
    folder = saved(tmp_path / "model", family)
    result = pruned(folder, tmp_path / "out", family, method=method, bits=bits, group_size=group_size)
    export(tmp_path / "out", tmp_path / "packed", format="sparse", bits=bits, group_size=group_size, verify=False)
    packed, ours = read_folder(tmp_path / "packed"), weights_of(tmp_path / "out")
    names = [matrix.name for matrix in result.matrices]
    assert names
    for name in names:
        weight = ours[name if name in ours else name.removeprefix("transformer.")]
        module = name.removesuffix(".weight")
        found = torch.tensor(packed[module], dtype=torch.float64)
        assert torch.equal(found, (weight.t() if family == "gpt2" else weight).double()), name
    assert result.sparsity >= 0.5 - 1e-3


def test_it_is_told(model: Path, tmp_path: Path) -> None:
    result = pruned(model, tmp_path / "out", bits=4)
    assert result.recipe["bits"] == 4
    assert all(matrix.loss > matrix.loss_before_rounding > 0 for matrix in result.matrices)
    assert any("rounded to 4 bits, 64 to a scale" in sentence for sentence in result.verdict)
    # What the refit brought is what it brought before the rounding.
    plain = pruned(model, tmp_path / "plain")
    ours, theirs = (next(sentence for sentence in one.verdict if "solved anew" in sentence) for one in (result, plain))
    assert ours[:60] == theirs[:60]


def test_a_narrower_source_is_written_as_float32(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama", torch.bfloat16)
    pruned(folder, tmp_path / "out", bits=8)
    assert {weight.dtype for weight in weights_of(tmp_path / "out").values()} == {torch.float32}
    assert '"float32"' in (tmp_path / "out" / "config.json").read_text()
    export(tmp_path / "out", tmp_path / "packed", format="sparse", bits=8, group_size=64, verify=False)
    packed, ours = read_folder(tmp_path / "packed"), weights_of(tmp_path / "out")
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(torch.tensor(packed[name], dtype=torch.float64), ours[f"{name}.weight"].double())


def test_experts_that_no_token_reaches_are_rounded_too(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "qwen3_moe")
    result = pruned(folder, tmp_path / "out", "qwen3_moe", bits=4, calibration=calibration_for("qwen3_moe", rows=1,
                    length=2))  # fmt: skip
    assert any("no calibration token" in note for matrix in result.matrices for note in matrix.notes)
    ours = weights_of(tmp_path / "out")
    experts = [weight for name, weight in ours.items() if ".experts." in name and weight.ndim >= 2]
    assert experts
    for weight in experts:
        for row in weight.reshape(-1, weight.shape[-1])[:, :64]:
            assert len(row.unique()) <= 16


def test_a_model_in_memory_must_be_able_to_hold_it() -> None:
    held = tiny_model("llama").to(torch.bfloat16)
    with pytest.raises(UsageError, match="not exact in bfloat16"):
        secateur.prune(held, bits=8, calibration=calibration_for("llama"), verify=False, evaluate=False)
    held = tiny_model("llama")
    secateur.prune(held, bits=8, calibration=calibration_for("llama"), verify=False, evaluate=False)
    weight = held.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(rounded(weight, 8, 64), weight)


def test_matrices_that_are_ignored_keep_all_their_bits(model: Path, tmp_path: Path) -> None:
    pruned(model, tmp_path / "out", bits=4, ignore="*q_proj*")
    ours, dense = weights_of(tmp_path / "out"), weights_of(model)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(ours[name], dense[name])


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"bits": 3}, "bits is 3"), ({"bits": 16}, "bits is 16"), ({"bits": 8, "group_size": 32}, "group_size is 32"),
     ({"bits": 8, "group_size": 0}, "group_size is 0"), ({"group_size": 64}, "needs --bits"),
     ({"bits": 8, "dtype": "bfloat16"}, "dtype bfloat16"), ({"bits": 4, "reconstruct": "block"}, "off the grid"),
     ({"bits": 8, "structure": ("ffn",)}, "bits has no meaning")],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(SecateurError, match=named):
        Recipe(**fields)


def test_values_of_another_kind_are_refused() -> None:
    with pytest.raises(RecipeError, match="bits"):
        Recipe.from_dict({"bits": "four"})


def test_a_method_without_a_gram_matrix_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs the Gram matrix"):
        pruned(model, tmp_path / "out", method="wanda", bits=8)
    assert not (tmp_path / "out").exists()
    assert pruned(model, tmp_path / "out", method="wanda", refit=True, bits=8).matrices
