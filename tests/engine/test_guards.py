"""What must not slip through: other data on resume, damage in between, formats that are too narrow, odd parameters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import secateur
from secateur.checkpoint.reader import CheckpointReader
from secateur.engine.binding import Binding
from secateur.engine.blocks import find_structure
from secateur.engine.forward import probe_inputs, rehearse, stream_forward
from secateur.engine.inputs import output_tensor
from secateur.engine.skeleton import build_skeleton
from secateur.errors import Interrupted, OutputError, RunError, UnsupportedModelError, WeightValueError
from secateur.progress import Reporter
from tests.models import calibration_for, save_tiny, tiny_model


class _StopAfterOneBlock(Reporter):
    name = ""

    def stage(self, name: str, total: int) -> None:
        self.name = name

    def advance(self, detail: str = "") -> None:
        if self.name == "pruning":
            raise KeyboardInterrupt


def _prune(model: Any, out: Path, **options: Any) -> Any:
    options = {"method": "sparsegpt", "calibration": calibration_for("llama"), "verify": False, **options}
    options.setdefault("evaluate", False)
    return secateur.prune(model, out, **options)


@pytest.fixture
def stopped(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and an output folder whose run was stopped after the first block."""
    folder, out = save_tiny(tmp_path / "model", "llama"), tmp_path / "out"
    with pytest.raises(Interrupted):
        _prune(folder, out, reporter=_StopAfterOneBlock())
    return folder, out


def test_resume_with_other_calibration_data_is_refused(stopped: tuple[Path, Path]) -> None:
    with pytest.raises(OutputError, match="calibration_sha256"):
        _prune(*stopped, resume=True, calibration=calibration_for("llama", seed=8))


def test_resume_with_another_config_is_refused(stopped: tuple[Path, Path]) -> None:
    config = stopped[0] / "config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    with pytest.raises(OutputError, match="config_sha256"):
        _prune(*stopped, resume=True)


def test_damage_to_a_finished_block_is_found_on_resume(stopped: tuple[Path, Path]) -> None:
    path = stopped[1].with_name("out.partial") / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    import json

    place = json.loads(content[8 : 8 + header])["model.layers.0.mlp.up_proj.weight"]["data_offsets"][0] + 8 + header
    content[place : place + 4] = b"\x00\x00\xf0\x40"
    path.write_bytes(content)
    with pytest.raises(OutputError, match=r"model\.layers\.0\.mlp\.up_proj"):
        _prune(*stopped, resume=True)


def test_weights_that_do_not_fit_the_format_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][100, 0] = 1e5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightValueError, match=r"embed_tokens.*float16"):
        _prune(folder, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out.partial").exists()


def test_bfloat16_gemma_computes_like_the_stock_loader(tmp_path: Path) -> None:
    # sqrt(40) is not a bfloat16 number: the embedding scale must not be rounded on the way
    folder = save_tiny(tmp_path / "model", "gemma3", dtype=torch.bfloat16, hidden_size=40)
    inputs = probe_inputs(build_skeleton(folder))
    with torch.no_grad():
        expected = output_tensor(type(tiny_model("gemma3")).from_pretrained(folder, dtype=torch.float32)(**inputs))
    torch.testing.assert_close(stream_forward(folder, inputs), expected, rtol=1e-5, atol=1e-5)


def test_three_dimensional_parameters_are_not_all_experts() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mix = nn.Parameter(torch.zeros(1, 1, 32))
    structure = find_structure(model)
    assert "model.layers.0.mix" in structure.unprunable
    assert all("mix" not in matrix.name for matrix in structure.matrices)


def _looks_at_the_device(self: Any, input_ids: torch.Tensor) -> dict[str, Any]:
    return {"input_ids": input_ids.to(self.embed_tokens.weight.device)}


def _reads_the_weight(self: Any, input_ids: torch.Tensor) -> dict[str, Any]:
    return {"inputs_embeds": nn.functional.embedding(input_ids, self.embed_tokens.weight)}


@pytest.mark.parametrize("read", [_looks_at_the_device, _reads_the_weight])
def test_weights_read_past_their_module_stay_loaded(read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that looks at the embedding without running it: the result is that of a forward that runs it."""
    folder = save_tiny(tmp_path / "model", "llama")
    _prune(folder, tmp_path / "expected", compute_dtype="float32")
    cls = type(tiny_model("llama").model)
    original = cls.forward
    calls = []

    def forward(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        calls.append(1)
        return original(self, **{**kwargs, **read(self, input_ids)})

    monkeypatch.setattr(cls, "forward", forward)
    _prune(folder, tmp_path / "out", compute_dtype="float32")
    assert calls
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "expected" / "model.safetensors"
    ).read_bytes()


def test_full_disk_while_activations_spill_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = save_tiny(tmp_path / "model", "llama"), tmp_path / "out"
    ids = calibration_for("llama", rows=96, length=48)

    def full(descriptor: int, data: Any, offset: int) -> int:
        raise OSError(28, "No space left on device")

    # The first spill is the first write of a run beside the shard headers.
    from secateur.engine import activations

    monkeypatch.setattr(activations, "os", type("os", (), {"pwrite": staticmethod(full), "preadv": os.preadv}))
    with pytest.raises(RunError, match="activations") as caught:
        _prune(folder, out, calibration=ids, activation_memory="100KB")
    assert caught.value.exit_code == 1
    monkeypatch.undo()
    _prune(folder, out, calibration=ids, activation_memory="100KB", resume=True)


def test_the_callers_model_is_left_alone(tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    _prune(model, tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config
    result = _prune(model, None)  # type: ignore[arg-type]
    assert result.out == ""
    assert sum(matrix.zeros for matrix in result.matrices) == 7680


def test_every_parameter_of_a_model_is_bound(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "mixtral")
    model = build_skeleton(folder)
    binding = Binding(model, load_file(folder / "model.safetensors"))
    assert not binding.missing
    assert not binding.unbound


def test_what_cannot_be_streamed_is_known_before_work_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.AlbertConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2,
        embedding_size=16,
    )  # fmt: skip
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "model")

    obstacle = secateur.inspect(tmp_path / "model").obstacle
    assert obstacle is not None
    assert "more than once" in obstacle
    # Not even the weights are looked at, let alone the text.
    monkeypatch.setattr("secateur.verbs.job.check_finite", lambda *_: pytest.fail("work has started"))
    with pytest.raises(UnsupportedModelError, match="more than once"):
        _prune(tmp_path / "model", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("family", ["llama", "mixtral", "t5", "vit"])
def test_rehearsal_leaves_no_weight_behind(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family)
    model = build_skeleton(folder)
    with CheckpointReader(folder) as reader:
        binding, structure = Binding(model, reader.keys), find_structure(model)
        rehearse(model, structure, binding, reader)
    assert all(parameter.is_meta for parameter in model.parameters())
