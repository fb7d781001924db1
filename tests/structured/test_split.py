"""Budgets end to end: what is written meets them, what was measured is what the stock model gives, and refusals."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import secateur
from secateur.cli.app import main
from secateur.engine.blocks import find_structure
from secateur.engine.inputs import output_tensor
from secateur.errors import BudgetError, Interrupted, UnsupportedModelError, UsageError
from secateur.measure.steps import step_seconds
from secateur.progress import Reporter
from secateur.result import PruneResult
from secateur.structured.block_choice import greedy_order
from secateur.verbs import split as split_verb
from tests.models import calibration_for, save_tiny, tiny_model

IDS = calibration_for("llama")
FIT, HELD = IDS[:18], IDS[18:]
"""What a budget refits on and measures on, of these 24 windows."""


def _save(folder: Path, family: str = "llama", **changes: Any) -> Path:
    return save_tiny(folder, family, **{"intermediate_size": 64, "num_hidden_layers": 4, **changes})


def _stock(folder: Path) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32).eval()


def _prune(folder: Path, out: Path, budget: str | None, **changes: Any) -> PruneResult:
    values = {
        "round_to": 8, "verify": False, "evaluate": False, "calibration": IDS, "compute_dtype": "float32", **changes
    }  # fmt: skip
    return secateur.prune(folder, out, budget=budget, **values)


def _loss(model: transformers.PreTrainedModel, ids: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def _block_parameters(folder: Path) -> int:
    return sum(
        t.numel() for key, t in load_file(folder / "model.safetensors").items() if "layers" in key and t.ndim == 2
    )


@pytest.mark.parametrize("share", [0.9, 0.6, 0.3, 0.13])
def test_what_is_written_has_at_most_the_parameters_asked_for(share: float, tmp_path: Path) -> None:
    folder = _save(tmp_path / "model", num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    result = _prune(folder, tmp_path / "out", f"parameters={share}", verify=share == 0.6)
    before, after = _block_parameters(folder), _block_parameters(tmp_path / "out")
    assert after <= share * before
    assert result.sparsity == pytest.approx(1 - after / before)
    assert result.verified == (share == 0.6)
    record = json.loads((tmp_path / "out" / "secateur.json").read_text())["budget"]
    assert record["chosen"]["cost"] == after
    assert record["chosen"]["parameters"] == pytest.approx(result.after.parameters / result.before.parameters)
    assert record["whole"] == before
    tried = [split for split in record["considered"] if split["measured"] is not None]
    assert record["chosen"]["measured"] == min(split["measured"] for split in tried)
    assert all(split["cost"] <= record["limit"] for split in record["considered"])
    assert len({json.dumps([split["blocks_gone"], split["units"]]) for split in record["considered"]}) == len(
        record["considered"]
    )


@pytest.mark.parametrize(
    ("budget", "dtype"), [("bytes=0.7", "auto"), ("bytes=90KB", "auto"), ("bytes=50KB", "bfloat16")]
)
def test_what_is_written_has_at_most_the_bytes_asked_for(budget: str, dtype: str, tmp_path: Path) -> None:
    folder = _save(tmp_path / "model")
    whole = (folder / "model.safetensors").stat().st_size
    limit = {"bytes=0.7": 0.7 * whole, "bytes=90KB": 90_000, "bytes=50KB": 50_000}[budget]
    result = _prune(folder, tmp_path / "out", budget, dtype=dtype)
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size <= limit
    assert size == result.after.bytes_disk
    assert size <= result.budget["chosen"]["cost"] <= size + 2000  # a bound on the header


def test_what_was_measured_of_a_split_is_what_the_stock_model_gives(tmp_path: Path) -> None:
    """By hand: the blocks taken out of the stock model, its neurons removed by a run of its own on the same text."""
    folder = _save(tmp_path / "model")
    result = _prune(folder, tmp_path / "out", "parameters=0.5", structure="depth,ffn")
    dense = _loss(_stock(folder), HELD)
    assert result.budget["loss_before"] == pytest.approx(dense, abs=1e-5)
    assert result.budget["tokens"] == {"refitted": FIT.numel(), "measured": HELD.numel(), "order": HELD.numel()}
    tried = [split for split in result.budget["considered"] if split["measured"] is not None]
    assert any(split["blocks_gone"] and split["units"] for split in tried)
    for number, split in enumerate(tried):
        model = _stock(folder)
        kept = [i for i in range(4) if i not in split["blocks_gone"]]
        model.model.layers = nn.ModuleList([model.model.layers[i] for i in kept])
        model.config.num_hidden_layers = len(kept)
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = index
        place = tmp_path / f"shallow{number}"
        model.save_pretrained(place)
        if split["units"]:
            neurons = split["units"]["ffn"]
            share = (64 - neurons) * 3 * 32 / (3 * 64 * 32 + 2 * 32 * 32 + 2 * 32 * 16)
            made = _prune(place, tmp_path / f"narrow{number}", None, structure="ffn", sparsity=share, calibration=FIT)
            assert made.matrices[0].shape == [32, neurons]
            place = tmp_path / f"narrow{number}"
        assert split["measured"] == pytest.approx(_loss(_stock(place), HELD) - dense, abs=1e-4)


def test_what_was_measured_of_one_structure_is_what_the_stock_model_gives(tmp_path: Path) -> None:
    """In a model of one block the refit on dense inputs is that of a run."""
    folder = _save(tmp_path / "model", num_hidden_layers=1)
    result = _prune(folder, tmp_path / "out", "parameters=0.6", structure="ffn")
    dense = _loss(_stock(folder), HELD)
    points = result.budget["alone"]["ffn"]
    assert len(points) > 2
    worst = 0.0
    for neurons, excess in points:
        share = (64 - neurons) * 3 * 32 / (3 * 64 * 32 + 2 * 32 * 32 + 2 * 32 * 16)
        made = _prune(folder, tmp_path / str(neurons), None, structure="ffn", sparsity=share, calibration=FIT)
        assert made.matrices[0].shape == [32, neurons]
        worst = max(worst, _loss(_stock(tmp_path / str(neurons)), HELD) - dense)
        assert excess == pytest.approx(worst, abs=1e-4)


def test_order_of_blocks(tmp_path: Path) -> None:
    """All tried each time is greedy removal by brute force; one tried each time is the order of the first round."""
    model = _stock(_save(tmp_path / "model"))
    structure = find_structure(model)

    def without(gone: list[int]) -> float:
        whole = _stock(tmp_path / "model")
        kept = [whole.model.layers[i] for i in range(4) if i not in gone]
        whole.model.layers, whole.config.num_hidden_layers = nn.ModuleList(kept), len(kept)
        return _loss(whole, HELD)

    def found(among: int | None) -> list[tuple[int, float]]:
        with contextlib.closing(
            greedy_order(model, structure, lambda: _loss(model, HELD), Reporter(), among=among)
        ) as it:
            return list(it)

    expected: list[int] = []
    for _ in range(3):
        left = [index for index in range(4) if index not in expected]
        expected.append(min(left, key=lambda index: without([*expected, index])))
    for among in (None, 4):
        assert [index for index, _ in found(among)] == expected
    assert [loss for _, loss in found(None)] == pytest.approx(
        [without(expected[:count]) for count in (1, 2, 3)], abs=1e-5
    )
    single = sorted(range(4), key=lambda index: without([index]))
    assert found(1)[0][0] == single[0]
    assert found(1)[1][0] == single[1]
    assert "forward" not in model.model.layers[0].__dict__


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_without_next_tokens_the_outputs_are_compared(family: str, tmp_path: Path) -> None:
    folder = _save(tmp_path / "model", family)
    data = calibration_for(family)
    result = _prune(folder, tmp_path / "out", "parameters=0.7", calibration=data, verify=True)
    assert result.verified
    assert "distance" in result.budget["loss"]
    assert result.budget["loss_before"] == 0
    # A BERT's config knows no other size of a head than hidden size by heads; a ViT's does.
    assert ({"heads", "kv-groups"} <= set(result.budget["left_out"])) == (family == "bert")
    assert result.sparsity >= 0.3
    tried = [split for split in result.budget["considered"] if split["measured"] is not None]
    for split in tried:
        if not split["units"]:  # depth alone: by the stock model without the blocks
            before, after = _stock(folder), _stock(folder)
            row = next(m for m in after.modules() if isinstance(m, nn.ModuleList) and len(m) == 4)
            for index in reversed(split["blocks_gone"]):
                del row[index]
            inputs = [{"input_ids": data[18:]}] if family == "bert" else data[-1:]
            with torch.no_grad():
                a, b = (output_tensor(model(**inputs[0])) for model in (before, after))
            assert split["measured"] == pytest.approx(float((a - b).square().sum() / a.square().sum()), rel=1e-3)


@pytest.mark.parametrize(
    ("family", "changes", "left_out"),
    [
        ("gpt2", {"n_layer": 3}, {"kv-groups", "heads"}),
        ("t5", {}, {"depth", "kv-groups", "heads"}),
        ("mixtral", {}, {"ffn"}),
    ],
)
def test_structures_that_a_model_lacks_are_left_out_and_told(
    family: str, changes: dict[str, Any], left_out: set[str], tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "model", family, **changes)
    notes: list[str] = []

    class Listening(Reporter):
        def note(self, message: str) -> None:
            notes.append(message)

    result = _prune(folder, tmp_path / "out", "parameters=0.75", reporter=Listening())
    assert _stock(tmp_path / "out").num_parameters() == result.after.parameters
    assert set(result.budget["left_out"]) == left_out
    for name, reason in result.budget["left_out"].items():
        assert f"{name} is left out: {reason}" in notes
    assert result.sparsity >= 0.25 - 1e-9
    if name != "depth":
        with pytest.raises(UnsupportedModelError):
            _prune(folder, tmp_path / "named", "parameters=0.75", structure=name)


def test_resumed_takes_the_split_of_the_interrupted_run(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder = _save(tmp_path / "model")

    class Watching(Reporter):
        def __init__(self, stop_after: int) -> None:
            self.left, self.stages = stop_after, []

        def stage(self, name: str, total: int) -> None:
            self.stages.append(name)

        def advance(self, detail: str = "") -> None:
            if self.stages[-1] == "pruning":
                self.left -= 1
                if not self.left:
                    raise KeyboardInterrupt

    run = {"structure": "depth,ffn"}
    whole = _prune(folder, tmp_path / "whole", "parameters=0.6", **run)
    with pytest.raises(Interrupted):
        _prune(folder, tmp_path / "out", "parameters=0.6", reporter=Watching(2), **run)
    again = Watching(99)
    resumed = _prune(folder, tmp_path / "out", "parameters=0.6", reporter=again, resume=True, **run)
    assert not any("split" in stage or "sizes" in stage for stage in again.stages)
    assert resumed.budget == whole.budget
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_decode_is_predicted_from_the_shapes_that_were_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(configs: list[Any], **more: Any) -> list[float]:
        """A machine on which a step takes the sum of its parts."""
        return [
            1.0 + c.num_hidden_layers * (0.5 + 0.01 * c.intermediate_size + 0.1 * c.num_key_value_heads)
            for c in configs
        ]

    monkeypatch.setattr(split_verb, "step_seconds", seconds)
    folder = _save(tmp_path / "model", num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    result = _prune(folder, tmp_path / "out", "decode=1.4x")
    source, made = (transformers.AutoConfig.from_pretrained(place) for place in (folder, tmp_path / "out"))
    before, after = seconds([source, made])
    assert before / after >= 1.4
    assert result.budget["chosen"]["cost"] == pytest.approx(after)
    assert result.budget["whole"] == pytest.approx(before)
    assert [entry["shape"] for entry in result.budget["timed"]] == ["whole", "depth", "ffn", "kv-groups"]


def test_a_deeper_model_takes_longer() -> None:
    deep, shallow = (
        tiny_model("llama", hidden_size=256, num_hidden_layers=count, num_attention_heads=4, head_dim=64).config
        for count in (12, 1)
    )
    slow, fast = step_seconds([deep, shallow], device=torch.device("cpu"), dtype=torch.float32)
    assert slow > 2 * fast > 0


def test_a_dry_run_says_what_the_run_does_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _save(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    flags = ["prune", str(folder), "-o", str(tmp_path / "out"), "--budget", "parameters=0.6", "--round-to", "8"]
    flags += ["--calibration", str(text), "--samples", "12", "--sequence-length", "64", "--json"]
    flags += ["--compute-dtype", "float32"]
    assert main([*flags, "--dry-run"]) == 0
    printed = capsys.readouterr()
    plan = json.loads(printed.out)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "text.txt"}
    assert any("block parameters may stay" in line for line in plan["lines"])
    assert sum(line.startswith("chosen: ") for line in plan["lines"]) == 1
    assert any("+" in line and line.startswith("neurons alone") for line in plan["lines"])
    assert main([*flags, "--no-evaluate", "--no-verify", "--quiet"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert plan["budget"] == result["budget"]
    assert plan["removed"] == pytest.approx(result["sparsity"])
    assert plan["weights_after"] == _block_parameters(tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "budget", "words", "options"),
    [
        (BudgetError, "bytes=1GB", "keeps everything", {}),
        (BudgetError, "bytes=1KB", "the least that can be reached is", {}),
        (BudgetError, "parameters=0.001", "the least that can be reached is", {}),
        (BudgetError, "parameters=0.3", "0.417 of what there is", {"structure": "ffn"}),
        (UnsupportedModelError, "parameters=0.5", "none can go", {"structure": "ffn", "round_to": 64}),
    ],
)
def test_refused_before_work(
    kind: type[Exception], budget: str, words: str, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = _save(tmp_path / "model")
    with pytest.raises(kind) as caught:
        _prune(folder, tmp_path / "out", budget, **options)
    assert words in f"{caught.value} {caught.value.hint}"
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_the_least_that_is_named_can_be_reached(tmp_path: Path) -> None:
    folder = _save(tmp_path / "model")
    before = _block_parameters(folder)
    with pytest.raises(BudgetError) as caught:
        _prune(folder, tmp_path / "out", "parameters=0.0001")
    least = int(
        "".join(itertools.takewhile(lambda c: c in "0123456789,", caught.value.hint.split("is ")[1])).replace(",", "")
    )
    _prune(folder, tmp_path / "out", f"parameters={least / before + 1e-9:.9f}")
    assert _block_parameters(tmp_path / "out") == least


def test_a_model_that_does_not_fit_or_does_not_decode_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnsupportedModelError, match="does not decode"):
        _prune(_save(tmp_path / "bert", "bert"), tmp_path / "out", "decode=1.2x")
    monkeypatch.setattr(split_verb, "fits_in_memory", lambda reader, more: False)
    with pytest.raises(UsageError, match="does not fit") as caught:
        _prune(_save(tmp_path / "model"), tmp_path / "out", "parameters=0.5")
    assert "--sparsity" in caught.value.hint
