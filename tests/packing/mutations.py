"""Damaged copies of a folder in the sparse format: bytes changed, cut off, added; headers, places and config edited."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from secateur.errors import CheckpointError
from secateur.packing.layout import PARTS, Entry

ODD = [
    -1, 0, 1, 2, 3, 5, 63, 64, 65, 255, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 1.5, 1e308,
    float("inf"), float("nan"), True, None, "", "mask", "dense", "2:4", "float64", [], {}, [1], "\u0000", "a" * 300,
]  # fmt: skip
"""Values for the places of a header."""
ODD_CONFIG = [-1, 0, 1, 2, 3, 5, 31, 33, 64, 1.5, float("nan"), True, None, "", "float16", "gelu", [], {}, [1]]
"""Values for the rest of config.json. No large numbers: how many blocks to make is what transformers believes it."""
INDEX = "model.safetensors.index.json"
_DTYPES = {
    "torch.int64": "I64", "torch.uint8": "U8", "torch.int8": "I8", "torch.bfloat16": "BF16", "torch.float16": "F16",
}  # fmt: skip


class Folder:
    """The content of a good folder, of which damaged copies are written into another."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.files = {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
        index = folder / INDEX
        self.index = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else None

    @property
    def matrices(self) -> list[str]:
        """The packed ones."""
        return list(self.config["quantization_config"]["matrices"])

    def write(
        self,
        into: Path,
        config: dict[str, Any] | None = None,
        files: dict[str, bytes] | None = None,
        index: dict[str, Any] | None = None,
    ) -> None:
        """Write what is given, and the good content of the rest, into a folder that is emptied first."""
        for path in into.glob("*"):
            path.unlink()
        (into / "config.json").write_text(json.dumps(config or self.config), encoding="utf-8")
        for name, content in (files or self.files).items():
            (into / name).write_bytes(content)
        if self.index is not None:
            (into / INDEX).write_text(json.dumps(index or self.index), encoding="utf-8")

    def damage(self, seed: int, into: Path) -> str:
        """Write a damaged copy; what was done to it comes back."""
        random_ = random.Random(seed)
        config, index = copy.deepcopy(self.config), copy.deepcopy(self.index)
        name = random_.choice(list(self.files))
        weights = bytearray(self.files[name])
        kinds: list[Callable[[random.Random, bytearray], str]] = [
            _bytes, _tensor, _tensor, _header_bytes, _cut, _stored, _swap, _moved, _shifted, _twice,
        ]  # fmt: skip
        kind = random_.choice([*["header"] * 4, "config", "index", "both", "both", *kinds])
        if kind == "index" and index is None:
            kind = "config"
        if kind == "header":
            told = _entry(random_, config["quantization_config"])
        elif kind == "config":
            told = _config(random_, config)
        elif kind == "index":
            told = _index(random_, index)
        elif kind == "both":
            told = _both(random_, config["quantization_config"]["matrices"], weights)
        else:
            assert callable(kind)
            told = kind(random_, weights)
        self.write(into, config, {**self.files, name: bytes(weights)}, index)
        return f"seed {seed}: {told}"


def opened(weights: bytearray) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its tensors begin."""
    end = 8 + int.from_bytes(weights[:8], "little")
    return json.loads(weights[8:end]), end


def closed(weights: bytearray, text: str, end: int) -> None:
    """Put another header in the place of the one that ends at ``end``."""
    octets = text.encode()
    weights[:end] = len(octets).to_bytes(8, "little") + octets


def padded(header: dict[str, Any]) -> str:
    """As safetensors writes it: tensors begin at a multiple of eight."""
    text = json.dumps(header, separators=(",", ":"))
    return text + " " * (-len(text.encode()) % 8)


def _names(header: dict[str, Any]) -> list[str]:
    return [key for key in header if key != "__metadata__"]


def _changed(random_: random.Random, weights: bytearray, first: int, last: int) -> list[int]:
    places = [random_.randrange(first, last) for _ in range(random_.choice([1, 1, 4, 64]))]
    for place in places:
        weights[place] = random_.choice([0, 255, weights[place] ^ 1 << random_.randrange(8), random_.randrange(256)])
    return places[:4]


def _bytes(random_: random.Random, weights: bytearray) -> str:
    return f"bytes {_changed(random_, weights, 0, len(weights))}"


def _tensor(random_: random.Random, weights: bytearray) -> str:
    """Change bytes of one tensor: small ones are hit as often as large ones."""
    header, start = opened(weights)
    name = random_.choice(_names(header))
    first, last = header[name]["data_offsets"]
    return f"bytes of {name}: {_changed(random_, weights, start + first, start + last)}"


def _header_bytes(random_: random.Random, weights: bytearray) -> str:
    end = 8 + int.from_bytes(weights[:8], "little")
    place = random_.randrange(end)
    weights[place] = random_.randrange(256) if random_.random() < 0.5 else ord(random_.choice('0123456789{}[]",:'))
    return f"byte {place} of the header"


def _cut(random_: random.Random, weights: bytearray) -> str:
    if random_.random() < 0.3:
        weights += bytes(random_.randrange(1, 100))
    else:
        del weights[random_.randrange(len(weights)) :]
    return f"{len(weights)} bytes left"


def _stored(random_: random.Random, weights: bytearray) -> str:
    """Change one number of the file's own header, in a header that is whole."""
    header, end = opened(weights)
    name = random_.choice(_names(header))
    field = random_.choice(["dtype", "shape", "data_offsets", "name"])
    if field == "name":
        header[random_.choice(["x", name + "x", "model.embed_tokens.values"])] = header.pop(name)
    elif field == "dtype":
        header[name]["dtype"] = random_.choice(["F32", "I8", "U8", "BF16", "F16", "I64", "BOOL", "F4", None, 3])
    else:
        numbers = header[name][field]
        numbers[random_.randrange(len(numbers))] = random_.choice(ODD)
    closed(weights, padded(header), end)
    return f"{field} of {name}"


def _swap(random_: random.Random, weights: bytearray) -> str:
    """Exchange the places of two tensors of the same size."""
    header, end = opened(weights)
    first = random_.choice(_names(header))
    second = random_.choice([name for name in _names(header) if header[name]["shape"] == header[first]["shape"]])
    places = "data_offsets"
    header[first][places], header[second][places] = header[second][places], header[first][places]
    closed(weights, padded(header), end)
    return f"{first} and {second} swapped"


def _moved(random_: random.Random, weights: bytearray) -> str:
    """Let a tensor begin elsewhere, with its length: over another, or behind the end."""
    header, end = opened(weights)
    name = random_.choice(_names(header))
    first, last = header[name]["data_offsets"]
    by = random_.choice([-64, -8, -1, 1, 8, 64, random_.randrange(len(weights)), 2**62, -first])
    header[name]["data_offsets"] = [first + by, last + by]
    closed(weights, padded(header), end)
    return f"{name} moved by {by}"


def _shifted(random_: random.Random, weights: bytearray) -> str:
    """Let all tensors begin at odd places, by a header that is longer by some spaces."""
    header, end = opened(weights)
    spaces = random_.randrange(1, 8)
    closed(weights, padded(header) + " " * spaces, end)
    return f"tensors begin {spaces} bytes later"


def _twice(random_: random.Random, weights: bytearray) -> str:
    """Name a tensor twice, with different places: which one is meant is up to the reader."""
    header, end = opened(weights)
    name, other = random_.choice(_names(header)), random_.choice(_names(header))
    text = json.dumps(header, separators=(",", ":"))
    entry = f"{json.dumps(name)}:{json.dumps(header[other])},"
    text = "{" + entry + text[1:] if random_.random() < 0.5 else text[:-1] + "," + entry[:-1] + "}"
    closed(weights, text + " " * (-len(text.encode()) % 8), end)
    return f"{name} twice, once as {other}"


def _both(random_: random.Random, matrices: dict[str, Any], weights: bytearray) -> str:
    """Change an entry of the header and the shapes in the file so that they agree: the content must tell."""
    header, end = opened(weights)
    name = random_.choice([key.rpartition(".")[0] for key in _names(header) if key.endswith(".values")])
    changed = dict(matrices[name])
    for key in random_.sample([*changed, "group_size", "transposed"], random_.choice([1, 1, 2])):
        number = changed.get(key, 0)
        near = [number + step for step in (-64, -4, -1, 1, 4, 64)] if type(number) is int else []
        kinds = {"kind": ["mask", "2:4", "dense"], "bits": [16, 8, 4], "dtype": ["bfloat16", "float16", ""]}
        changed[key] = random_.choice(kinds.get(key) or near or [True, False])
    if changed.get("bits") == 16 and random_.random() < 0.5:
        changed |= {"dtype": "bfloat16", "group_size": 0}
    matrices[name] = changed
    try:
        entry = Entry.from_dict(name, changed)
        if entry.kind != "mask":
            changed["values"] = entry.rows * (entry.row_values() or 0)
            entry = Entry.from_dict(name, changed)
    except CheckpointError:
        return f"header of {name}: {changed}"
    body = {key: bytes(weights[end:][slice(*header[key]["data_offsets"])]) for key in _names(header)}
    parts = {f"{name}.{part}": place for part, place in entry.parts().items()}
    made: dict[str, Any] = {}
    content = bytearray()
    for key in [*[key for key in body if key.removeprefix(f"{name}.") not in PARTS], *parts]:
        octets = body.get(key, b"")
        place = {field: header[key][field] for field in ("dtype", "shape")} if key not in parts else {}
        if key in parts:
            dtype, shape = parts[key]
            place = {"dtype": _DTYPES[str(dtype)], "shape": list(shape)}
            size = dtype.itemsize
            for one in shape:
                size *= one
            octets = octets[:size] + (random_.randbytes(size - len(octets)) if len(octets) < size else b"")
            if key.endswith(".values"):
                octets = octets[: max(0, size - 64)] + bytes(min(64, size))
        made[key] = {**place, "data_offsets": [len(content), len(content) + len(octets)]}
        content += octets
    weights[end:] = content
    closed(weights, padded(made), end)
    return f"header and tensors of {name}: {changed}"


def _index(random_: random.Random, index: dict[str, Any]) -> str:
    places = index["weight_map"]
    name = random_.choice(list(places))
    what = random_.randrange(4)
    if what == 0:
        places.pop(name)
        return f"{name} not in the index"
    if what == 1:
        places[random_.choice(["x", name + "x"])] = places.pop(name)
        return f"name of {name} in the index"
    places[name] = random_.choice([*places.values(), "../model.safetensors", "model.bin", "", None, 3, "x.safetensors"])
    return f"file of {name}: {places[name]}"


def _config(random_: random.Random, config: dict[str, Any]) -> str:
    """Change one place of config.json outside the header."""
    key = random_.choice([key for key in config if key != "quantization_config"])
    near = config[key] + random_.choice([-1, 1, 8]) if type(config[key]) is int else None
    config[key] = random_.choice(ODD_CONFIG if near is None else [*ODD_CONFIG, *[near] * 10])
    return f"{key} of the config is {config[key]!r}"


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
