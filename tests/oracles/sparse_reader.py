"""Reads a folder in the sparse format, written from docs/sparse-format.md alone: slow, plain, and without our code."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

WIDTH = {"I64": 8, "U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4}


def read_tensors(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """All tensors of all files: number format, shape, bytes."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        for name, info in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = info["data_offsets"]
                found[name] = info["dtype"], info["shape"], data[8 + length + begin : 8 + length + end]
    return found


def bfloat16(data: bytes, index: int) -> float:
    (high,) = struct.unpack_from("<H", data, 2 * index)
    return struct.unpack("<f", struct.pack("<I", high << 16))[0]


def signed(nibble: int) -> int:
    return nibble - 16 if nibble > 7 else nibble


def read_matrix(name: str, entry: dict, tensors: dict) -> list[list[float]]:
    """One packed matrix, row by row."""
    rows, columns, bits, group = entry["rows"], entry["columns"], entry["bits"], entry.get("group_size", 0)
    kind, _, values = tensors[f"{name}.values"]
    assert kind == ({"bfloat16": "BF16", "float16": "F16"}[entry["dtype"]] if bits == 16 else {8: "I8", 4: "U8"}[bits])
    assert len(values) == entry["values"] * WIDTH[kind] + 64
    assert values[-64:] == bytes(64)

    def value(element: int, half: int) -> float:
        if bits == 16:
            return bfloat16(values, element) if kind == "BF16" else struct.unpack_from("<e", values, 2 * element)[0]
        if bits == 8:
            return struct.unpack_from("<b", values, element)[0]
        return signed(values[element] >> 4 if half else values[element] & 15)

    matrix = [[0.0] * columns for _ in range(rows)]
    element, half = 0, 0

    def following() -> float:
        nonlocal element, half
        number = value(element, half)
        if bits == 4:
            half = 1 - half
            element += half == 0
        else:
            element += 1
        return number

    def whole_byte() -> None:
        nonlocal element, half
        if half:
            element, half = element + 1, 0

    for row in range(rows):
        if entry["kind"] == "dense":
            for column in range(columns):
                matrix[row][column] = following()
        elif entry["kind"] == "mask":
            words = math.ceil(columns / 64)
            for word in range(words):
                (mask,) = struct.unpack_from("<Q", tensors[f"{name}.mask"][2], 8 * (row * words + word))
                for bit in range(64):
                    if mask >> bit & 1:
                        matrix[row][64 * word + bit] = following()
                whole_byte()
        else:
            wide = math.ceil(columns / 8)
            for four in range(columns // 4):
                octet = tensors[f"{name}.index"][2][row * wide + four // 2]
                places = octet >> 4 if four % 2 else octet & 15
                for place in (places & 3, places >> 2):
                    matrix[row][4 * four + place] = following()
        whole_byte()
        if bits < 16:
            groups = math.ceil(columns / group) if group else 1
            for column in range(columns):
                scale = bfloat16(tensors[f"{name}.scales"][2], row * groups + (column // group if group else 0))
                matrix[row][column] *= scale
    assert element == entry["values"]
    return matrix


def read_folder(folder: Path) -> dict[str, list[list[float]]]:
    """Every packed matrix, as (outputs, inputs), by the name of its module."""
    header = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert (header["quant_method"], header["format_version"]) == ("secateur", 1)
    tensors = read_tensors(folder)
    return {name: read_matrix(name, entry, tensors) for name, entry in header["matrices"].items()}
