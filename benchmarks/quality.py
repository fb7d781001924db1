"""Quality by the reference protocol, on the demo model.

Calibration is the first 32 windows of 1,024 tokens of the WikiText-2 validation text. Perplexity is measured on the
first 40 windows of 1,024 tokens of the test text; accuracy on 3,400 minimal pairs of BLiMP (34 phenomena) and on 919
questions of PIQA, each with its standard error. Nothing was chosen by any of these numbers.

    SECATEUR_DATA=folder python benchmarks/quality.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import _common
import _reference

# What the published reference code of each method gave by the same protocol.
PUBLISHED = {"dense": 24.46, "magnitude": 489.0, "wanda": 52.5, "sparsegpt": 44.0, "wanda 2:4": 155.8}
METHODS = ("random", "magnitude", "wanda", "sparsegpt", "wanda 2:4", "sparsegpt 2:4")
QUESTIONED = ("wanda", "sparsegpt")
"""Methods whose accuracy is measured beside that of the dense model: it takes some minutes each."""


def main() -> None:
    data = _common.data_folder()
    rows: list[dict[str, Any]] = [
        {"method": "dense", "reference": PUBLISHED["dense"], **_reference.quality("demo", data)}
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for name in METHODS:
            out = Path(scratch) / _reference.folder_name(name)
            _reference.prune(name, out, data)
            found = _reference.quality(str(out), data, questions=name in QUESTIONED)
            rows.append({"method": name, "reference": PUBLISHED.get(name), **found})
    _common.store("quality", " ".join(__doc__.split("\n\n")[1].split()), rows)


if __name__ == "__main__":
    main()
