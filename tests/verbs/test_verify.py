"""What was written and then changed is found out, with exit status 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur
from secateur import verify as verify_module
from secateur.checkpoint.writer import CheckpointWriter
from secateur.cli.app import main
from secateur.errors import Interrupted, VerificationError
from secateur.progress import Reporter
from tests.models import calibration_for, save_tiny

FRESH_INTERPRETERS = True


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "model", "llama")


def _prune(model: Path, out: Path, **options: Any) -> Any:
    options = {"method": "sparsegpt", "calibration": calibration_for("llama"), **options}
    return secateur.prune(model, out, evaluate=False, **options)


def _tamper(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Change the weights file after it was written and hashed, before it is verified."""
    finish = CheckpointWriter.finish

    def finish_then_change(self: CheckpointWriter) -> dict[str, str]:
        shards = finish(self)
        change(self.folder / "model.safetensors", shards)
        return shards

    monkeypatch.setattr(CheckpointWriter, "finish", finish_then_change)


def test_tampered_shard(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flip(path: Path, shards: dict[str, str]) -> None:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    _tamper(monkeypatch, flip)
    with pytest.raises(VerificationError, match="sha256") as caught:
        _prune(model, tmp_path / "out")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "factor", "found"),
    [
        ("model.layers.0.mlp.up_proj.weight", 0.0, "zeros"),
        ("model.layers.0.mlp.down_proj.weight", 1.5, "answers differently"),
        ("model.norm.weight", 1.5, "was not pruned"),
    ],
)
def test_weights_that_are_not_what_was_made(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, factor: float, found: str
) -> None:
    def change(path: Path, shards: dict[str, str]) -> None:
        weights = load_file(path)
        weights[name] *= factor
        save_file(weights, path, metadata={"format": "pt"})
        shards["model.safetensors"] = verify_module.hash_file(path)  # so that only the deeper checks can see it

    _tamper(monkeypatch, change)
    with pytest.raises(VerificationError, match=found):
        _prune(model, tmp_path / "out")


def test_result_changed_later_is_found_by_inspect(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    _prune(model, out, verify=False)
    assert main(["inspect", str(out)]) == 0
    content = bytearray((out / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (out / "model.safetensors").write_bytes(content)
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 3
    error = capsys.readouterr().err
    assert "sha256" in error
    assert "Traceback" not in error


def test_model_larger_than_memory_is_verified_block_by_block(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = verify_module.psutil.virtual_memory()
    monkeypatch.setattr(verify_module.psutil, "virtual_memory", lambda: real._replace(available=1000))
    result = _prune(model, tmp_path / "out", activation_memory="1GB")
    assert "one block" in result.verification["loader"]
    assert result.verification["output_difference"] <= 1e-5


class _CtrlC(Reporter):
    """Interrupts at the second finished block."""

    name, steps = "", 0

    def stage(self, name: str, total: int) -> None:
        self.name = name

    def advance(self, detail: str = "") -> None:
        self.steps += self.name == "pruning"
        if self.steps == 2:
            raise KeyboardInterrupt


def test_interrupted_run_says_how_to_go_on(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted, match=r"out\.partial") as caught:
        _prune(model, out, reporter=_CtrlC(), verify=False)
    assert "--resume" in caught.value.hint
    assert not out.exists()
    _prune(model, out, resume=True, verify=False)
    _prune(model, tmp_path / "whole", verify=False)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_global_magnitude_over_the_whole_model(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "mixtral")
    secateur.prune(
        folder, tmp_path / "out", method="magnitude", method_options={"scope": "global"}, sparsity=0.3,
        verify=False, evaluate=False,
    )  # fmt: skip
    dense, pruned = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    names = [n for n in dense if "layers" in n and "norm" not in n and ".gate." not in n]
    everything = torch.cat([dense[n].flatten() for n in names])
    zeros = sum(int((pruned[n] == 0).sum()) for n in names)
    assert zeros == round(0.3 * everything.numel())
    threshold = everything.abs().sort().values[zeros]
    for name in names:
        assert torch.equal(pruned[name], torch.where(dense[name].abs() < threshold, 0.0, dense[name]))


def test_overrides_targets_and_ignore(model: Path, tmp_path: Path) -> None:
    result = _prune(
        model, tmp_path / "out", verify=False, sparsity=0.5, targets=["*mlp*", "*q_proj*"],
        ignore=[r"re:layers\.0\..*q_"], overrides=[{"match": "*down_proj*", "sparsity": 0.75}],
    )  # fmt: skip
    found = {matrix.name.removesuffix(".weight"): matrix.sparsity for matrix in result.matrices}
    assert "model.layers.0.self_attn.q_proj" not in found
    assert found["model.layers.1.self_attn.q_proj"] == 0.5
    assert found["model.layers.1.mlp.down_proj"] == 0.75
    assert not any("o_proj" in name for name in found)
