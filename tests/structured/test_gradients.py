"""Taylor scores against plain autograd on the stock model, unit by unit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import secateur
from secateur.errors import UnsupportedModelError, UsageError
from secateur.verbs import choices
from tests.models import calibration_for, save_tiny

SEQUENCES, LENGTH = 5, 20


def _naive(folder: Path, order: int, name: str) -> torch.Tensor:
    """|w g|, or |w g - w^2 F / 2|, of each single weight of one parameter."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    weight = model.get_parameter(name)
    gradients = []
    for ids in calibration_for("llama")[:SEQUENCES, :LENGTH]:
        loss = model(input_ids=ids[None], labels=ids[None]).loss
        gradients.append(torch.autograd.grad(loss, weight)[0])
    each = torch.stack(gradients)
    change = weight * each.mean(0)
    if order == 2:
        change = change - weight**2 * each.square().mean(0) / 2
    return change.abs().detach()


def _prune(folder: Path, out: Path, structure: str, order: int = 1, **changes):
    options = {"order": order, "sequences": SEQUENCES, "length": LENGTH}
    return secateur.prune(
        folder, out, method="taylor", method_options=options, structure=structure, round_to=4, verify=False,
        evaluate=False, calibration=calibration_for("llama"), **{"sparsity": 0.25, **changes},
    )  # fmt: skip


@pytest.mark.parametrize("order", [1, 2])
def test_neurons_are_those_of_plain_autograd(order: int, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    result = _prune(folder, tmp_path / "out", "ffn", order)
    for matrix in result.matrices:
        mlp = matrix.name.removesuffix("down_proj.weight")
        score = _naive(folder, order, matrix.name).sum(dim=0)
        score += sum(_naive(folder, order, f"{mlp}{part}_proj.weight").sum(dim=1) for part in ("gate", "up"))
        assert matrix.units == sorted(score.argsort(descending=True)[: len(matrix.units)].tolist())


def test_groups_and_channels_count_all_that_goes_with_them(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama", tie_word_embeddings=True)
    for matrix in _prune(folder, tmp_path / "groups", "kv-groups", sparsity=0.2).matrices:
        attention = matrix.name.removesuffix("o_proj.weight")
        score = _naive(folder, 1, matrix.name).sum(dim=0).reshape(2, -1).sum(dim=1)
        for part in "qkv":
            score += _naive(folder, 1, f"{attention}{part}_proj.weight").sum(dim=1).reshape(2, -1).sum(dim=1)
        assert matrix.units == [int(score.argmax())]
    kept = _prune(folder, tmp_path / "channels", "hidden").channels_kept
    score = torch.zeros(32)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():  # a tied head is counted once
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        score += _naive(folder, 1, name).movedim(0 if writes else -1, 0).reshape(32, -1).sum(dim=1)
        assert parameter.shape[0 if writes else -1] == 32
    assert kept == sorted(score.argsort(descending=True)[:24].tolist())


def test_blocks_that_go_first_are_not_there_when_gradients_are_taken(tmp_path: Path) -> None:
    """Blocks, then neurons: the scores are those of the model without the blocks."""
    folder = save_tiny(tmp_path / "model", "llama", num_hidden_layers=3)
    both = _prune(folder, tmp_path / "both", "depth,ffn", sparsity=0.6, depth_by="influence")
    (tmp_path / "first").mkdir()
    shallow = secateur.prune(
        folder, tmp_path / "first" / "out", structure="depth", sparsity=0.3, depth_by="influence", verify=False,
        evaluate=False, calibration=calibration_for("llama"),
    )  # fmt: skip
    assert shallow.blocks_kept == both.blocks_kept
    after = _prune(tmp_path / "first" / "out", tmp_path / "second", "ffn", sparsity=0.45)
    assert [len(matrix.units) for matrix in after.matrices] == [len(matrix.units) for matrix in both.matrices]
    assert [matrix.units for matrix in after.matrices] == [matrix.units for matrix in both.matrices]


def test_a_model_without_next_tokens_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "bert")
    with pytest.raises(UnsupportedModelError, match="loss of next tokens"):
        _prune(folder, tmp_path / "out", "ffn")
    assert not (tmp_path / "out").exists()


def test_gradients_that_do_not_fit_are_refused_with_both_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    monkeypatch.setattr(choices, "bytes_needed", lambda *a: 10**15)
    with pytest.raises(UsageError, match=r"1000000.0 GB, and .* GB are free") as caught:
        _prune(folder, tmp_path / "out", "ffn")
    assert "obs" in caught.value.hint


@pytest.mark.parametrize(("options", "words"), [({"order": 3}, "order"), ({"sequences": 0}, "sequences"),
                                                ({"length": 1}, "length")])  # fmt: skip
def test_options_that_mean_nothing_are_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        secateur.plugins.make_criterion("taylor", options)
