"""The engine against a plain version: the stock model in memory, one whole forward for every single matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import secateur
from secateur.engine.inputs import inputs_of_window
from secateur.errors import UsageError
from tests.models import calibration_for, save_tiny, tiny_model


def _matrices_in_order(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[str]:
    """Names of the Linear and Conv1D modules inside blocks, in the order in which a forward reaches them."""
    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda m, a, name=name: order.append(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and any(part.isdigit() for part in name.split("."))
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return order


def _naive_wanda(model: Any, ids: torch.Tensor, sparsity: float) -> None:
    inputs = inputs_of_window(model, ids)
    for name in _matrices_in_order(model, inputs):
        module = model.get_submodule(name)
        seen: list[torch.Tensor] = []
        handle = module.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0]))
        with torch.no_grad():
            model(**inputs)
        handle.remove()
        x = seen[0].double().reshape(-1, seen[0].shape[-1])
        weight = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
        score = weight.abs().double() * x.pow(2).mean(0).sqrt()
        for row in range(weight.shape[0]):
            for column in sorted(range(weight.shape[1]), key=lambda c: float(score[row, c]))[
                : round(sparsity * weight.shape[1])
            ]:
                weight[row, column] = 0


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "phi3", "opt", "gpt_neox", "falcon", "bert", "t5"])
def test_wanda_equals_one_forward_for_each_matrix(family: str, tmp_path: Path) -> None:
    folder, ids = save_tiny(tmp_path / "model", family), calibration_for(family)
    expected = tiny_model(family)
    _naive_wanda(expected, ids, 0.4)
    secateur.prune(
        folder, tmp_path / "out", method="wanda", sparsity=0.4, calibration=ids, compute_dtype="float32",
        verify=False, evaluate=False,
    )  # fmt: skip
    got = type(expected).from_pretrained(tmp_path / "out").state_dict()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(tensor, got[key]), key


def _naive_two_pass_wanda(model: Any, ids: torch.Tensor, keep: int, group: int) -> None:
    """Statistics of a block from the whole model with the blocks before it pruned and this one as it is."""
    inputs = inputs_of_window(model, ids)
    order = _matrices_in_order(model, inputs)

    def block_of(name: str) -> str:
        parts = name.split(".")
        return ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdigit()) + 1])

    for block in dict.fromkeys(map(block_of, order)):
        names = [name for name in order if block_of(name) == block]
        seen: dict[str, torch.Tensor] = {}
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda m, a, name=name, seen=seen: seen.update({name: a[0]})
            )
            for name in names
        ]
        with torch.no_grad():
            model(**inputs)
        for handle in handles:
            handle.remove()
        for name in names:
            module = model.get_submodule(name)
            x = seen[name].double().reshape(-1, seen[name].shape[-1])
            weight = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
            score = weight.abs().double() * x.pow(2).mean(0).sqrt()
            for row in range(weight.shape[0]):
                for start in range(0, weight.shape[1], group):
                    columns = sorted(range(start, start + group), key=lambda c: float(score[row, c]))
                    for column in columns[: group - keep]:
                        weight[row, column] = 0


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox", "bert", "t5"])
def test_wanda_with_a_pattern_sees_the_dense_block(family: str, tmp_path: Path) -> None:
    folder, ids = save_tiny(tmp_path / "model", family), calibration_for(family)
    expected = tiny_model(family)
    _naive_two_pass_wanda(expected, ids, 2, 4)
    secateur.prune(
        folder, tmp_path / "out", method="wanda", pattern="2:4", calibration=ids, verify=False, evaluate=False
    )
    got = type(expected).from_pretrained(tmp_path / "out").state_dict()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(tensor, got[key]), key


def test_passes_can_be_chosen(tmp_path: Path) -> None:
    """auto is 1 for single weights and 2 for a pattern; experts are seen in the dense block as well."""
    ids = calibration_for("qwen3_moe")
    folder = save_tiny(tmp_path / "model", "qwen3_moe")

    def run(pattern: str, passes: str) -> bytes:
        out = tmp_path / f"{pattern.replace(':', '-')}-{passes}"
        secateur.prune(
            folder, out, method=secateur.Wanda(passes=passes), pattern=pattern, calibration=ids, verify=False,
            evaluate=False, compute_dtype="float32", overwrite=True,
        )  # fmt: skip
        return (out / "model.safetensors").read_bytes()

    for pattern, default, other in (("unstructured", "1", "2"), ("2:4", "2", "1")):
        assert run(pattern, "auto") == run(pattern, default)
        assert run(pattern, "auto") != run(pattern, other)
    with pytest.raises(UsageError, match="passes of wanda is 3"):
        secateur.Wanda(passes="3")


@pytest.mark.parametrize(
    ("method", "pattern"), [("wanda", "unstructured"), ("wanda", "2:4"), ("sparsegpt", "unstructured")]
)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "t5"])
def test_activations_on_disk_change_nothing(family: str, method: str, pattern: str, tmp_path: Path) -> None:
    folder, ids = save_tiny(tmp_path / "model", family), calibration_for(family, rows=96, length=48)
    files = []
    for memory in ("10GB", "150KB"):
        out = tmp_path / memory
        secateur.prune(
            folder, out, method=method, pattern=pattern, calibration=ids, activation_memory=memory, verify=False,
            evaluate=False,
        )  # fmt: skip
        files.append((out / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_shards_and_in_memory_models_change_nothing(tmp_path: Path) -> None:
    ids = calibration_for("llama")
    whole, shards = (
        save_tiny(tmp_path / "whole", "llama"),
        save_tiny(tmp_path / "shards", "llama", max_shard_size="20KB"),
    )
    assert len(list(shards.glob("*.safetensors"))) > 2
    states = []
    for index, model in enumerate([whole, shards, tiny_model("llama")]):
        out = tmp_path / f"out{index}"
        secateur.prune(model, out, method="sparsegpt", calibration=ids, verify=False, evaluate=False)
        states.append(type(tiny_model("llama")).from_pretrained(out).state_dict())
    inside = tiny_model("llama")
    settings = {"method": "sparsegpt", "calibration": ids, "verify": False, "evaluate": False}
    assert secateur.prune(inside, **settings).sparsity == 0.5
    states.append(inside.state_dict())
    assert [path.name for path in sorted((tmp_path / "out1").glob("*.safetensors"))] == [
        path.name for path in sorted(shards.glob("*.safetensors"))
    ]
    for state in states[1:]:
        for key, tensor in states[0].items():
            assert torch.equal(tensor, state[key]), key


def test_bfloat16_forward_prunes_exactly_as_many(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama", dtype=torch.bfloat16)
    for compute in ("float32", "bfloat16"):
        out = tmp_path / compute
        result = secateur.prune(
            folder, out, calibration=calibration_for("llama"), compute_dtype=compute, verify=False, evaluate=False
        )
        assert all(matrix.sparsity == 0.5 for matrix in result.matrices)


def test_dtype_converts_what_is_written_and_nothing_more(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    secateur.prune(folder, tmp_path / "out", method="magnitude", dtype="bfloat16", evaluate=False, verify=True)
    model = type(tiny_model("llama")).from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    original = tiny_model("llama").state_dict()
    for key, tensor in model.state_dict().items():
        kept = tensor != 0
        assert torch.equal(tensor[kept], original[key].bfloat16()[kept]), key
