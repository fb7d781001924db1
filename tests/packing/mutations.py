"""Damaged copies of a folder in the sparse format: bytes changed, cut off, added; header entries changed or swapped."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

ODD = [
    -1, 0, 1, 2, 3, 5, 63, 64, 65, 255, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 1.5, 1e308,
    float("inf"), float("nan"), True, None, "", "mask", "dense", "2:4", "float64", [], {}, [1], "\u0000", "a" * 300,
]  # fmt: skip
"""Values for the places of a header."""


class Folder:
    """The content of a good folder with one weights file, of which damaged copies are written into another."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.weights = (folder / "model.safetensors").read_bytes()

    def damage(self, seed: int, into: Path) -> str:
        """Write a damaged copy; what was done to it comes back."""
        random_ = random.Random(seed)
        config, weights = copy.deepcopy(self.config), bytearray(self.weights)
        kinds = (self._bytes, self._header_bytes, self._cut, self._stored, self._swap)
        kind = random_.choice([None, None, *kinds])
        told = _entry(random_, config["quantization_config"]) if kind is None else kind(random_, weights)
        (into / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (into / "model.safetensors").write_bytes(weights)
        return f"seed {seed}: {told}"

    @staticmethod
    def _bytes(random_: random.Random, weights: bytearray) -> str:
        places = [random_.randrange(len(weights)) for _ in range(random_.choice([1, 1, 4, 64]))]
        for place in places:
            weights[place] = random_.choice([0, 255, random_.randrange(256)])
        return f"bytes {places[:4]}"

    @staticmethod
    def _header_bytes(random_: random.Random, weights: bytearray) -> str:
        end = 8 + int.from_bytes(weights[:8], "little")
        place = random_.randrange(end)
        weights[place] = random_.randrange(256) if random_.random() < 0.5 else ord(random_.choice('0123456789{}[]",:'))
        return f"byte {place} of the header"

    @staticmethod
    def _cut(random_: random.Random, weights: bytearray) -> str:
        if random_.random() < 0.3:
            weights += bytes(random_.randrange(1, 100))
        else:
            del weights[random_.randrange(len(weights)) :]
        return f"{len(weights)} bytes left"

    @staticmethod
    def _stored(random_: random.Random, weights: bytearray) -> str:
        """Change one number of the files' own header, in a header that is whole."""
        length = int.from_bytes(weights[:8], "little")
        header = json.loads(weights[8 : 8 + length])
        name = random_.choice([key for key in header if key != "__metadata__"])
        field = random_.choice(["dtype", "shape", "data_offsets", "name"])
        if field == "name":
            header[random_.choice(["x", name + "x", "model.embed_tokens.values"])] = header.pop(name)
        elif field == "dtype":
            header[name]["dtype"] = random_.choice(["F32", "I8", "U8", "BF16", "I64", "BOOL", "F4", None, 3])
        else:
            numbers = header[name][field]
            numbers[random_.randrange(len(numbers))] = random_.choice(ODD)
        text = json.dumps(header).encode()
        weights[:] = len(text).to_bytes(8, "little") + text + weights[8 + length :]
        return f"{field} of {name}"

    @staticmethod
    def _swap(random_: random.Random, weights: bytearray) -> str:
        """Exchange the places of two tensors of the same size."""
        length = int.from_bytes(weights[:8], "little")
        header = json.loads(weights[8 : 8 + length])
        names = [key for key in header if key != "__metadata__"]
        first = random_.choice(names)
        same = [name for name in names if header[name]["shape"] == header[first]["shape"]]
        second = random_.choice(same)
        places = "data_offsets"
        header[first][places], header[second][places] = header[second][places], header[first][places]
        text = json.dumps(header, separators=(",", ":")).encode()
        weights[:] = len(text).to_bytes(8, "little") + text + weights[8 + length :]
        return f"{first} and {second} swapped"


def _entry(random_: random.Random, header: dict[str, Any]) -> str:
    """Change one place of the header of the format."""
    matrices = header["matrices"]
    name = random_.choice(list(matrices))
    what = random_.randrange(10)
    if what == 0:
        key = random_.choice(["format_version", "matrices", "quant_method"])
        header[key] = random_.choice(ODD)
        return key
    if what == 1:
        matrices[str(random_.choice(["", "..", "x.y", "model", name + ".q", name.upper()]))] = matrices.pop(name)
        return f"name of {name}"
    if what == 2:
        matrices[name] = random_.choice(ODD)
        return f"entry of {name}"
    if what == 3:
        other = random_.choice(list(matrices))
        matrices[name], matrices[other] = matrices[other], matrices[name]
        return f"entries of {name} and {other}"
    entry = matrices[name]
    key = random_.choice([*entry, "group_size", "dtype", "transposed", "other"])
    near = entry[key] + random_.choice([-1, 1, 64]) if type(entry.get(key)) is int else None
    entry[key] = random_.choice([*ODD, near] if near is None else [*ODD, *[near] * 20])
    return f"{key} of {name}"
