"""Packed modules compute what plain ones do, keep their number formats, and run only when they were checked."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from secateur.errors import CheckpointError, UnsupportedModelError
from secateur.packing.pack import Setting, count, entries_for, pack
from secateur.runtime import kernels, modules
from secateur.runtime.modules import Packed, SparseEmbedding, SparseLinear, TiedEmbedding, TiedLinear, packed_for
from secateur.verbs.export import export
from tests.models import tiny_model, tiny_tokenizer

INT8 = Setting(8)


def packed(weight: torch.Tensor, kind: str = "mask", setting: Setting = INT8, **arguments) -> Packed:
    entry = entries_for(count(weight, setting), setting)[kind]
    cls = SparseEmbedding if kind == "dense" and "bias" not in arguments else SparseLinear
    module = cls(entry, torch.float32, **(arguments if cls is SparseEmbedding else {"bias": None, **arguments}))
    for name, tensor in pack(weight, entry).items():
        setattr(module, name, tensor)
    module.check("m")
    return module


@pytest.fixture
def weight():
    matrix = torch.randn(50, 70, generator=torch.Generator().manual_seed(0))
    return matrix * (matrix.abs() > 0.6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_product_is_that_of_the_unpacked_weight(weight, bits, dtype, monkeypatch):
    bias = nn.Parameter(torch.randn(50))
    module = packed(weight, setting=Setting(bits), bias=bias)
    module.activations = None  # by PyTorch; the kernels round activations
    monkeypatch.setattr(modules, "row_blocks", lambda *_: [(0, 7), (7, 8), (8, 50)])  # as in a large matrix
    inputs = torch.randn(2, 3, 70, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        found = module(inputs)
        wanted = inputs.double() @ module.weight.to(dtype).double().T + bias.double()
    assert found.dtype == dtype
    assert found.shape == (2, 3, 50)
    torch.testing.assert_close(found.double(), wanted, rtol=0.02, atol=0.02 if dtype != torch.float32 else 1e-5)


def test_gradients_reach_the_inputs(weight):
    inputs = torch.randn(3, 70, requires_grad=True)
    module = packed(weight)
    module(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad, module.weight.sum(0).expand(3, 70))


def test_rows_of_an_embedding_and_what_is_tied_to_it(weight):
    module = packed(weight, "dense", Setting(4, 64))
    ids = torch.tensor([[0, 49, 3], [3, 3, 1]])
    assert torch.equal(module(ids), module.weight[ids])
    assert torch.equal(TiedEmbedding(module)(ids), module.weight[ids])
    head = TiedLinear(module, None)
    torch.testing.assert_close(head(torch.ones(70)), module.weight.sum(1))
    assert list(head.state_dict()) == []
    for outside in (-1, 50):
        with pytest.raises(IndexError):
            module(torch.tensor([outside]))


def test_a_change_of_number_format_is_about_outputs_only(weight):
    module = packed(weight, bias=nn.Parameter(torch.zeros(50)))
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    for other in (module.half(), module.to(torch.bfloat16), module.double(), copy.deepcopy(module)):
        assert other.weight.dtype == other.bias.dtype == other.dtype
        for name, buffer in other.named_buffers():
            assert buffer.dtype == before[name].dtype
            assert torch.equal(buffer, before[name])


def test_where_rows_start_is_not_stored(weight):
    assert "starts" not in packed(weight).state_dict()


def test_what_cannot_be_packed_so_is_refused(weight):
    entry = entries_for(count(weight, Setting(8)), Setting(8))["mask"]
    packed_for(nn.Linear(70, 50), entry, torch.float32, "m")
    for module in (nn.Linear(50, 70), nn.Embedding(50, 70), nn.LayerNorm(70), nn.Identity()):
        with pytest.raises(CheckpointError, match="m"):
            packed_for(module, entry, torch.float32, "m")


def test_a_module_that_was_not_loaded_is_refused(weight):
    entry = entries_for(count(weight, Setting(8)), Setting(8))["mask"]
    with torch.device("meta"):
        module = SparseLinear(entry, torch.float32, None)
    with pytest.raises(CheckpointError, match="not loaded"):
        module.check("m")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("m")
    model = tiny_model("llama", num_hidden_layers=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layers" in name and weight.ndim == 2:
                weight[weight.abs() < 0.1] = 0
    model.to(torch.bfloat16).save_pretrained(place / "plain")
    tiny_tokenizer().save_pretrained(place / "plain")
    export(place / "plain", place / "out", format="sparse", bits=8, verify=False)
    return place / "out"


def test_transformers_loads_the_base_model_and_other_number_formats(folder):
    import transformers

    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(whole.model(ids).last_hidden_state, base(ids).last_hidden_state)
    assert isinstance(base.layers[0].mlp.up_proj, SparseLinear)
    assert whole.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    whole.tie_weights()  # again, as some code does
    assert isinstance(whole.lm_head, TiedLinear)


def test_a_wheel_that_does_not_fit_is_told_when_a_model_is_opened(folder, monkeypatch):
    import transformers

    from secateur.runtime import quantizer

    told = []
    why = "secateur-kernels is version 9.0.0, this secateur needs 0.1"
    for place in (quantizer, kernels):
        monkeypatch.setattr(place, "find", lambda: kernels.Kernels(None, why))
    monkeypatch.setattr(quantizer.logger, "warning_once", told.append)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert len(told) == 1
    assert why in told[0]
    with torch.no_grad():
        assert model(torch.tensor([[3]])).logits.isfinite().all()


def test_a_header_that_packs_what_the_model_has_not_is_refused(folder, tmp_path):
    import json

    import transformers

    config = json.loads((folder / "config.json").read_text())
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 0}))
    with pytest.raises(CheckpointError, match=r"the header packs model\.layers\.0\..*, which the model has not"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_transformers_refuses_what_was_tampered_with(folder, tmp_path):
    import json

    import transformers
    from safetensors.torch import load_file, save_file

    good = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.0.mlp.up_proj"

    def refused(error, said, config=good, changes=None, cut=0):
        (tmp_path / "config.json").write_text(json.dumps(config))
        path = tmp_path / "model.safetensors"
        save_file({**tensors, **(changes or {})}, path, metadata={"format": "pt"})
        path.write_bytes(path.read_bytes()[: -cut or None])
        with pytest.raises(error, match=said):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)

    def with_header(**changes):
        return {**good, "quantization_config": {**good["quantization_config"], **changes}}

    refused(UnsupportedModelError, "version 9", with_header(format_version=9))
    refused(CheckpointError, "truncated or corrupt", cut=1)
    mask = tensors[f"{key}.mask"].clone()
    mask[5, 0] ^= 1
    refused(CheckpointError, "up_proj: its mask asks for", changes={f"{key}.mask": mask})
    refused(
        CheckpointError, "scale that is not finite", changes={f"{key}.scales": tensors[f"{key}.scales"] * torch.inf}
    )
    refused(CheckpointError, "lacks its tensor", with_header(matrices={**good["quantization_config"]["matrices"], "x": {
        "kind": "dense", "rows": 1, "columns": 1, "bits": 8, "values": 1}}))  # fmt: skip
    entry = good["quantization_config"]["matrices"][key]
    shape = with_header(matrices={**good["quantization_config"]["matrices"], key: {**entry, "rows": entry["rows"] + 1}})
    refused(CheckpointError, "the header says", shape)
