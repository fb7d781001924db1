"""Every family: prune, reload by the stock class, count. Against the stock loader, not against ourselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import secateur
from secateur.engine.blocks import MatrixSpec, find_structure
from secateur.engine.forward import probe_inputs, stream_forward
from secateur.engine.inputs import output_tensor
from secateur.engine.skeleton import build_skeleton
from tests.models import FAMILIES, calibration_for, save_tiny


def _stock(folder: Path) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32).eval()


def _singles(model: torch.nn.Module, spec: MatrixSpec) -> list[torch.Tensor]:
    return spec.slices(model.state_dict()[spec.name])


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    return request.param, save_tiny(folder, request.param)


@pytest.mark.parametrize(("method", "pattern"), [("sparsegpt", "unstructured"), ("wanda", "2:4"), ("magnitude", "1:4")])
def test_prune_reload_count(family: tuple[str, Path], method: str, pattern: str, tmp_path: Path) -> None:
    name, folder = family
    out = tmp_path / "out"
    result = secateur.prune(
        folder, out, method=method, pattern=pattern, calibration=calibration_for(name), verify=False, evaluate=False
    )
    before, after = _stock(folder), _stock(out)
    structure = find_structure(before)
    keep = {"unstructured": None, "2:4": 2, "1:4": 1}[pattern]
    for spec, report in zip(structure.matrices, result.matrices, strict=True):
        assert report.name == spec.name
        assert report.zeros == sum(int((matrix == 0).sum()) for matrix in _singles(after, spec))
        for matrix in _singles(after, spec):
            if keep is None:
                assert int((matrix == 0).sum()) == round(0.5 * matrix.numel())
            else:
                groups = (matrix != 0).reshape(matrix.shape[0], -1, 4).sum(-1)
                assert (groups == keep).all()
    pruned = {spec.name for spec in structure.matrices}
    for key, tensor in before.state_dict().items():
        if key not in pruned:
            assert torch.equal(tensor, after.state_dict()[key]), key
    assert sorted(load_file(folder / "model.safetensors")) == sorted(load_file(out / "model.safetensors"))


def test_identity_at_sparsity_zero(family: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = family
    for method in ("sparsegpt", "wanda", "magnitude", "random"):
        out = tmp_path / method
        secateur.prune(
            folder, out, method=method, sparsity=0.0, calibration=calibration_for(name), verify=False, evaluate=False
        )
        assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_streamed_forward_is_the_stock_forward(family: tuple[str, Path]) -> None:
    _, folder = family
    inputs = probe_inputs(build_skeleton(folder))
    with torch.no_grad():
        expected = output_tensor(_stock(folder)(**inputs))
    torch.testing.assert_close(stream_forward(folder, inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5", "vit"])
def test_verification_in_a_fresh_process(name: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", name)
    result = secateur.prune(folder, tmp_path / "out", calibration=calibration_for(name), evaluate=False)
    assert result.verified
    assert result.verification["output_difference"] <= 1e-4
    assert "fresh process" in result.verification["loader"]
