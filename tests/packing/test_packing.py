"""Packing: what comes out is what went in, whatever the kind; rounding keeps zeros and stays near."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.packing.check import check
from secateur.packing.layout import Entry
from secateur.packing.pack import Setting, best, count, entries_for, pack
from secateur.packing.unpack import gather_rows, row_blocks, unpack, unpack_rows
from secateur.packing.words import from_words, popcount, to_words
from secateur.quantise import expand_scales, quantise, settled
from tests.packing.strategies import matrices, settings_of_values


@given(matrices(), settings_of_values)
@settings(max_examples=150, deadline=None)
def test_every_kind_holds_the_same_matrix(matrix, setting):
    entries = entries_for(count(matrix, setting), setting)
    if setting.bits == 16:
        wanted = matrix.to(getattr(torch, setting.dtype)).float()
    else:
        codes, scales = quantise(matrix, setting.bits, setting.group_size)
        wanted = codes.float() * expand_scales(scales, matrix.shape[1], setting.group_size)
    assert "dense" in entries
    assert "mask" in entries
    for kind, entry in entries.items():
        tensors = pack(matrix, entry)
        starts = check(kind, entry, tensors)
        assert torch.equal(unpack(entry, tensors, torch.float32, starts), wanted)
        assert entry.nbytes == sum(tensor.nbytes for tensor in tensors.values())
        assert Entry.from_dict(kind, entry.to_dict()) == entry
        for first, last in row_blocks(entry, 2 * matrix.shape[1]):
            part = unpack_rows(entry, tensors, starts, first, last, torch.float32)
            assert torch.equal(part, wanted[first:last])
    rows = torch.tensor([[0, len(matrix) - 1]])
    assert torch.equal(gather_rows(entries["dense"], pack(matrix, entries["dense"]), rows, torch.float32), wanted[rows])
    assert best(entries).nbytes <= 1.02 * min(entry.nbytes for entry in entries.values())


@given(matrices())
@settings(max_examples=80, deadline=None)
def test_a_bfloat16_matrix_comes_back_bit_for_bit(matrix):
    matrix = matrix.to(torch.bfloat16)
    for entry in entries_for(count(matrix, Setting(16)), Setting(16)).values():
        found = unpack(entry, pack(matrix, entry), torch.bfloat16)
        same = found.view(torch.int16) == matrix.view(torch.int16)
        assert (same | ((matrix == 0) & (found == 0))).all()  # a negative zero becomes a plain one
        assert not torch.signbit(found[matrix == 0]).any()


@given(matrices(), st.sampled_from([(8, 0), (8, 64), (4, 0), (4, 64)]))
@settings(max_examples=100, deadline=None)
def test_rounding_keeps_zeros_and_stays_near(matrix, how):
    bits, size = how
    codes, scales = quantise(matrix, bits, size)
    assert codes[matrix == 0].eq(0).all()
    assert codes.abs().max() <= 2 ** (bits - 1) - (bits == 8)
    found = codes.float() * expand_scales(scales, matrix.shape[1], size)
    for first in range(0, matrix.shape[1], size or matrix.shape[1]):
        part, ours = (one[:, first : first + (size or matrix.shape[1])] for one in (matrix, found))
        largest = part.abs().amax(1)
        nearest = largest / 127 / 2 * 1.01 if bits == 8 else largest * 0.3
        assert ((ours - part).abs().amax(1) <= nearest + 1e-38).all()
        if bits == 4:  # no worse than the plain scale that reaches the largest weight
            plain = torch.where(largest == 0, 1.0, largest / 7).unsqueeze(1)
            error = ((part / plain).round() * plain - part).square().sum(1)
            of_scale = part.shape[1] * (largest * 2.0**-7).square()  # a bfloat16 has eight bits
            assert ((ours - part).square().sum(1) <= error * 1.05 + of_scale + 1e-38).all()


@given(matrices(), st.sampled_from([8, 4]), st.sampled_from([0, 64, 128]))
@settings(max_examples=120, deadline=None)
def test_what_has_settled_is_its_own_rounding(matrix, bits, size):
    columns = matrix.shape[1]
    codes, scales = settled(matrix, bits, size)
    wide = expand_scales(scales, columns, size)
    values = codes.float() * wide
    assert torch.equal(values.double(), codes.double() * wide.double()), "exact in float32"
    again, other = quantise(values, bits, size)
    assert torch.equal(again.float() * expand_scales(other, columns, size), values)
    assert values[matrix == 0].eq(0).all()
    if bits == 8:  # half a step, or a whole one where the largest is cut
        assert ((values - matrix).abs() <= wide.abs() * torch.where(codes.abs() == 127, 1.01, 0.501)).all()
    else:
        assert all(map(torch.equal, (codes, scales), quantise(matrix, bits, size)))


@given(st.integers(1, 200), st.integers(1, 5), st.integers(0, 2**32))
@settings(max_examples=80, deadline=None)
def test_words_are_bits_from_the_lowest(columns, rows, seed):
    keep = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    words = to_words(keep)
    for row in range(rows):
        for place, word in enumerate(words[row].tolist()):
            bits = [bool(word >> bit & 1) for bit in range(64)]
            wanted = keep[row, 64 * place : 64 * place + 64].tolist()
            assert bits == wanted + [False] * (64 - len(wanted))
    assert torch.equal(from_words(words, columns), keep)
    assert popcount(words).sum() == keep.sum()


def test_a_full_word_and_an_empty_one():
    words = torch.tensor([[-1, 0, 1, -(2**63)]])
    assert popcount(words).tolist() == [[64, 0, 1, 1]]


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=9))
def test_set_bits_are_counted_alike_with_and_without_numpy(numbers):
    class Other(torch.Tensor):  # what is no plain tensor goes the way of other devices
        pass

    words = torch.tensor(numbers)
    wanted = [bin(number % 2**64).count("1") for number in numbers]
    for counts in (popcount(words), popcount(words.as_subclass(Other)), popcount(words.repeat(2, 1).T)[:, 0]):
        assert counts.dtype == torch.uint8
        assert counts.tolist() == wanted


def test_two_of_four_is_taken_where_it_fits_and_a_mask_where_rows_are_emptier():
    full = torch.tensor([[0.0, 1, 2, 0] * 32] * 8)
    assert best(entries_for(count(full, Setting(16)), Setting(16))).kind == "2:4"
    full[:, ::8] = 0
    full[:, 1:64] = 0
    assert best(entries_for(count(full, Setting(16)), Setting(16))).kind == "mask"


def test_packing_another_matrix_than_was_counted_is_refused():
    entry = entries_for(count(torch.zeros(2, 8), Setting(8)), Setting(8))["mask"]
    with pytest.raises(ValueError, match="values"):
        pack(torch.ones(2, 8), entry)
