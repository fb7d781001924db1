"""Nothing that is read is trusted: damaged folders end in an error of ours, or in a model that runs."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.checkpoint.check import check_model_folder
from secateur.checkpoint.unpacked import UnpackedReader, open_reader
from secateur.errors import CheckpointError, SecateurError, UnsupportedModelError
from secateur.packing.check import check
from secateur.packing.header import Header
from secateur.packing.layout import Entry
from secateur.packing.pack import Setting, count, entries_for, pack
from secateur.packing.words import popcount
from secateur.verbs.export import export
from tests.models import save_tiny, tiny_model, tiny_tokenizer
from tests.packing import mutations
from tests.packing.fuzz import FINE, make_folders, watch
from tests.packing.mutations import ODD, Folder

CASES = 200
"""Damaged folders; `python -m tests.packing.fuzz` opens ten thousand."""
GOOD = {"kind": "mask", "rows": 2, "columns": 70, "bits": 8, "values": 3}


def header(entry) -> dict:
    return {"quant_method": "secateur", "format_version": 1, "matrices": {"a.b": entry}}


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


def test_damaged_folders_end_in_an_error_or_in_a_model_that_runs(forking, tmp_path):
    folders = make_folders(tmp_path)
    found = list(watch(folders, 0, CASES, python=forking.executable))
    assert [seed for seed, _, _ in found] == list(range(CASES))
    assert [one for one in found if one[1] not in FINE] == []
    refused = sum(outcome != "runs" for _, outcome, _ in found)
    assert CASES / 2 < refused < CASES  # most damage is seen; a changed value is not


WATCHED = """#!/bin/sh
# -m tests.packing.fuzz --open x --first SEED --cases N
seed=$6
echo "opens\tseed $seed"
case $seed in
  0) kill -SEGV $$ ;;
  1) exec sleep 60 ;;
  2) exit 3 ;;
esac
while [ $seed -lt 5 ]; do
  echo "was\truns\tfinite"
  seed=$((seed + 1))
  echo "opens\tseed $seed"
done
"""


def test_a_crash_and_a_hang_are_told_with_their_seed_and_the_rest_goes_on(tmp_path):
    python = tmp_path / "python"
    python.write_text(WATCHED, encoding="utf-8")
    python.chmod(0o755)
    found = list(watch([tmp_path], 0, 5, seconds=0.5, python=str(python)))
    assert [(seed, outcome) for seed, outcome, _ in found] == [
        (0, "SIGSEGV"), (1, "hangs"), (2, "ends with status 3"), (3, "runs"), (4, "runs"),
    ]  # fmt: skip
    assert found[1][2] == "seed 1"


def test_every_cut_is_seen(packed, tmp_path):
    (tmp_path / "config.json").write_bytes((packed / "config.json").read_bytes())
    whole = (packed / "model.safetensors").read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_reader(tmp_path)


@pytest.mark.parametrize("spaces", [1, 2, 4])
def test_tensors_at_odd_places_are_refused(packed, tmp_path, spaces):
    good = Folder(packed)
    for name, content in good.files.items():
        weights = bytearray(content)
        header, end = mutations.opened(weights)
        mutations.closed(weights, mutations.padded(header) + " " * spaces, end)
        good.write(tmp_path, files={name: bytes(weights)})
    with pytest.raises(CheckpointError, match="which is no multiple of 8"):
        check_model_folder(tmp_path, packed=True)
    with pytest.raises(CheckpointError, match="which is no multiple of 8"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_tensor_named_twice_is_refused(packed, tmp_path):
    good = Folder(packed)
    weights = bytearray(good.files["model.safetensors"])
    header, end = mutations.opened(weights)
    text = json.dumps(header)
    mutations.closed(
        weights, text[:-1] + ', "model.norm.weight": ' + json.dumps(header["model.norm.weight"]) + "}", end
    )
    good.write(tmp_path, files={"model.safetensors": bytes(weights)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight' twice"):
        check_model_folder(tmp_path, packed=True)


_json = st.recursive(
    st.one_of(st.sampled_from(ODD), st.integers(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


ENTRIES = [
    GOOD, {**GOOD, "bits": 16, "dtype": "float16"}, {**GOOD, "bits": 4, "group_size": 64},
    {**GOOD, "kind": "2:4", "columns": 68, "values": 68}, {**GOOD, "kind": "dense", "values": 140, "transposed": True},
]  # fmt: skip
FIELDS = [*GOOD, "group_size", "dtype", "transposed", "other"]


@given(st.sampled_from(ENTRIES), st.dictionaries(st.sampled_from(FIELDS), _json, max_size=3))
@settings(max_examples=300, deadline=None)
def test_an_entry_of_a_header_is_read_or_refused(good, changes):
    Header.from_dict(header(good))
    try:
        read = Header.from_dict(header({**good, **changes}))
    except SecateurError:
        return
    entry = read.matrices["a.b"]
    assert 0 < entry.rows < 2**31
    assert 0 < entry.columns < 2**31
    assert 0 <= entry.values <= entry.numel
    assert all(size >= 0 for _, shape in entry.parts().values() for size in shape)
    assert Header.from_dict(read.to_dict()) == read


@given(st.dictionaries(st.one_of(st.sampled_from(["quant_method", "format_version", "matrices"]), st.text()), _json))
@settings(max_examples=200, deadline=None)
def test_a_header_is_read_or_refused(changes):
    try:
        read = Header.from_dict({**header(GOOD), **changes})
    except SecateurError:
        return
    assert Header.from_dict(read.to_dict()) == read


@pytest.mark.parametrize("data", [None, [], {}, {"quant_method": "secateur"}, {**header(GOOD), "matrices": {}}])
def test_what_is_no_header_is_refused(data):
    with pytest.raises(CheckpointError, match="header of the sparse format"):
        Header.from_dict(data)


def test_another_version_is_named():
    with pytest.raises(UnsupportedModelError, match="version 2, this secateur reads version 1"):
        Header.from_dict({**header(GOOD), "format_version": 2})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "csr"}, "kind"), ({"rows": 0}, "0 rows"), ({"rows": -1}, "rows is -1"),
        ({"columns": 2**31}, "columns"),
        ({"bits": 5}, "5 bits"), ({"values": 141}, "141 values"), ({"group_size": 32}, "group_size"),
        ({"bits": 16}, "dtype"), ({"dtype": "bfloat16"}, "dtype"), ({"kind": "2:4"}, "2:4 and has 70"),
        ({"kind": "dense"}, "3 values"), ({"transposed": 1}, "transposed"), ({"rows": True}, "rows is True"),
        ({"bits": 16, "dtype": []}, "dtype"), ({"kind": []}, "kind"),
        ({"offset": 3}, "unknown key 'offset'"), ({"values": 2**63}, "values is"),
    ],
)  # fmt: skip
def test_each_fault_of_an_entry_is_named(change, said):
    with pytest.raises(CheckpointError, match=said):
        Header.from_dict(header({**GOOD, **change}))


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
    if bits == 4:
        counts = popcount(tensors["mask"]).reshape(-1)
        place = int(((counts + 1) // 2).cumsum(0)[counts % 2 == 1][0]) - 1
        values = tensors["values"].clone()
        values[place] |= 1 << 6
        with pytest.raises(CheckpointError, match="half of a byte"):
            check("m", entry, {**tensors, "values": values})
    if bits < 16:
        for value in (torch.inf, torch.nan):
            scales = tensors["scales"].clone()
            scales[2] = value
            with pytest.raises(CheckpointError, match="scale that is not finite"):
                check("m", entry, {**tensors, "scales": scales})


def test_the_unused_half_of_a_dense_row_is_zero():
    matrix, setting = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)), Setting(4)
    entry = entries_for(count(matrix, setting), setting)["dense"]
    tensors = pack(matrix, entry)
    check("m", entry, tensors)
    tensors["values"][7] |= 1 << 4
    with pytest.raises(CheckpointError, match="half of a byte"):
        check("m", entry, tensors)


@pytest.mark.parametrize("columns", [4, 8, 12])
def test_every_index_of_two_of_four_is_judged(columns):
    entry = Entry("2:4", 1, columns, 8, columns // 2)
    tensors = {"values": torch.zeros(entry.values + 64, dtype=torch.int8), "scales": torch.ones(1, 1).bfloat16()}
    for octet in range(256):
        index = torch.tensor([[octet, 0b0100][: -(-columns // 8)]], dtype=torch.uint8)
        first, second = octet & 15, octet >> 4
        good = first & 3 < first >> 2 and (second == 0 if columns == 4 else second & 3 < second >> 2)
        if good:
            check("m", entry, {**tensors, "index": index})
        else:
            with pytest.raises(CheckpointError, match="indices of 2:4"):
                check("m", entry, {**tensors, "index": index})


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
