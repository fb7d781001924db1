"""Nothing that is read is trusted: damaged folders end in an error of ours, or in weights of the right shape."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.checkpoint.check import check_model_folder
from secateur.checkpoint.unpacked import UnpackedReader, open_reader
from secateur.errors import CheckpointError, SecateurError, UnsupportedModelError
from secateur.packing.check import check
from secateur.packing.header import Header
from secateur.packing.layout import Entry
from secateur.packing.pack import Setting, count, entries_for, pack
from secateur.verbs.export import export
from tests.models import save_tiny, tiny_model, tiny_tokenizer
from tests.packing.mutations import ODD, Folder

CASES = int(os.environ.get("SECATEUR_FUZZ", "300"))
"""Damaged folders; `SECATEUR_FUZZ=10000` for a long run."""
GOOD = {"kind": "mask", "rows": 2, "columns": 70, "bits": 8, "values": 3}


def header(**entry) -> dict:
    return {"quant_method": "secateur", "format_version": 1, "matrices": {"a.b": {**GOOD, **entry}}}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """One folder with every kind: masks, 2:4, dense, at 8 bits, the embedding at 4."""
    folder = tmp_path_factory.mktemp("packed")
    model = tiny_model("llama", num_hidden_layers=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "k_proj" in name or "up_proj" in name:
                weight.view(len(weight), -1, 4)[..., ::2] = 0
            elif "layers" in name and weight.ndim == 2 and "v_proj" not in name:
                weight[weight.abs() < 0.15] = 0
    model.to(torch.bfloat16).save_pretrained(folder / "plain")
    tiny_tokenizer().save_pretrained(folder / "plain")
    result = export(folder / "plain", folder / "out", format="sparse", bits=8, embedding_bits=4, verify=False)
    assert {matrix.kind for matrix in result.matrices} == {"mask", "2:4", "dense"}
    return folder / "out"


def test_damaged_folders_end_in_an_error_or_in_weights(packed, tmp_path):
    good = Folder(packed)
    refused = 0
    for seed in range(CASES):
        told = good.damage(seed, tmp_path)
        try:
            check_model_folder(tmp_path, packed=True)
            with open_reader(tmp_path) as reader:
                for key in reader.keys:
                    assert reader.tensor(key).shape == reader.info(key).shape, told
        except SecateurError:
            refused += 1
        except Exception as error:
            raise AssertionError(told) from error
    assert CASES / 2 < refused < CASES  # most damage is seen; a changed value is not


def test_every_cut_is_seen(packed, tmp_path):
    (tmp_path / "config.json").write_bytes((packed / "config.json").read_bytes())
    whole = (packed / "model.safetensors").read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_reader(tmp_path)


_json = st.recursive(
    st.one_of(st.sampled_from(ODD), st.integers(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*GOOD, "group_size", "dtype", "transposed", "other"]), _json, max_size=3))
@settings(max_examples=200, deadline=None)
def test_a_header_is_read_or_refused(changes):
    try:
        read = Header.from_dict(header(**changes))
    except SecateurError:
        return
    entry = read.matrices["a.b"]
    assert 0 < entry.rows < 2**31
    assert 0 < entry.columns < 2**31
    assert 0 <= entry.values <= entry.numel
    assert all(size >= 0 for _, shape in entry.parts().values() for size in shape)
    assert Header.from_dict(read.to_dict()) == read


@pytest.mark.parametrize("data", [None, [], {}, {"quant_method": "secateur"}, {**header(), "matrices": {}}])
def test_what_is_no_header_is_refused(data):
    with pytest.raises(CheckpointError, match="header of the sparse format"):
        Header.from_dict(data)


def test_another_version_is_named():
    with pytest.raises(UnsupportedModelError, match="version 2, this secateur reads version 1"):
        Header.from_dict({**header(), "format_version": 2})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "csr"}, "kind"), ({"rows": 0}, "0 rows"), ({"rows": -1}, "rows is -1"),
        ({"columns": 2**31}, "columns"),
        ({"bits": 5}, "5 bits"), ({"values": 141}, "141 values"), ({"group_size": 32}, "group_size"),
        ({"bits": 16}, "dtype"), ({"dtype": "bfloat16"}, "dtype"), ({"kind": "2:4"}, "2:4 and has 70"),
        ({"kind": "dense"}, "3 values"), ({"transposed": 1}, "transposed"), ({"rows": True}, "rows is True"),
        ({"offset": 3}, "unknown key 'offset'"), ({"values": 2**63}, "values is"),
    ],
)  # fmt: skip
def test_each_fault_of_an_entry_is_named(change, said):
    with pytest.raises(CheckpointError, match=said):
        Header.from_dict(header(**change))


@pytest.fixture
def made():
    matrix = torch.randn(6, 68, generator=torch.Generator().manual_seed(0))
    matrix.view(6, 17, 4)[..., 1::2] = 0

    def of(kind: str, bits: int) -> tuple[Entry, dict[str, torch.Tensor]]:
        setting = Setting(bits)
        entry = entries_for(count(matrix, setting), setting)[kind]
        return entry, pack(matrix, entry)

    return of


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_each_fault_of_a_tensor_is_named(made, bits):
    entry, tensors = made("mask", bits)
    check("m", entry, tensors)
    for bit, said in ((1 << 1, "asks for"), (1 << 20, "behind the last column")):
        mask = tensors["mask"].clone()
        mask[3, 1] |= bit
        mask[3, 0] |= bit  # at 4 bits one more value may still fit into the last byte
        mask[3, 0] |= bit << 4
        with pytest.raises(CheckpointError, match=said):
            check("m", entry, {**tensors, "mask": mask})
    values = tensors["values"].clone()
    values[-1] = 1
    with pytest.raises(CheckpointError, match="not zero"):
        check("m", entry, {**tensors, "values": values})
    with pytest.raises(CheckpointError, match="tensor values"):
        check("m", entry, {**tensors, "values": values[:-1]})
    if bits < 16:
        for value in (torch.inf, torch.nan):
            scales = tensors["scales"].clone()
            scales[2] = value
            with pytest.raises(CheckpointError, match="scale that is not finite"):
                check("m", entry, {**tensors, "scales": scales})


def test_indices_of_two_of_four_must_ascend_and_end(made):
    entry, tensors = made("2:4", 8)
    check("m", entry, tensors)
    for place, value, said in (((0, 0), 0x11 * 0b0101, "ascend"), ((0, 8), 0xF0, "behind")):
        index = tensors["index"].clone()
        index[place] = value if said == "ascend" else index[place] | value
        with pytest.raises(CheckpointError, match=said):
            check("m", entry, {**tensors, "index": index})


def test_a_folder_for_another_use_is_refused_with_the_way_out(packed):
    with pytest.raises(UnsupportedModelError, match="packed in the sparse format") as caught:
        check_model_folder(packed)
    assert "--format hf" in caught.value.hint


def test_a_matrix_both_packed_and_plain_is_refused(packed, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(packed / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((packed / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="both packed and plain"):
        open_reader(tmp_path)


def test_a_plain_folder_is_read_plainly(tmp_path):
    save_tiny(tmp_path / "m", "llama")
    with open_reader(tmp_path / "m") as reader:
        assert not isinstance(reader, UnpackedReader)
