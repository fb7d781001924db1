"""Quality by the reference protocol, on the demo model.

Calibration is the first 32 windows of 1,024 tokens of the WikiText-2 validation text. Perplexity is measured on the
first 40 windows of 1,024 tokens of the test text; accuracy on 3,400 minimal pairs of BLiMP (34 phenomena) and on 919
questions of PIQA, each with its standard error. Nothing was chosen by any of these numbers.

    SECATEUR_DATA=folder python benchmarks/quality.py [--only "wanda 2:4"]
"""

from __future__ import annotations

import argparse
import json
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(("dense", *METHODS)), help="the other rows stay as they are")
    chosen = parser.parse_args().only.split(",")
    data = _common.data_folder()
    path = _common.RESULTS / "quality.json"
    rows: dict[str, dict[str, Any]] = {}
    if path.is_file():
        rows = {row["method"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    on = _common.machine()["processor"]
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("dense", *METHODS):
            if name not in chosen:
                continue
            model = "demo"
            if name != "dense":
                model = str(Path(scratch) / _reference.folder_name(name))
                _reference.prune(name, Path(model), data)
            found = _reference.quality(model, data, questions=name in ("dense", *QUESTIONED))
            rows[name] = {"method": name, "reference": PUBLISHED.get(name), **found, "on": on}
    ordered = [rows[name] for name in ("dense", *METHODS) if name in rows]
    _common.store("quality", " ".join(__doc__.split("\n\n")[1].split()), ordered)


if __name__ == "__main__":
    main()
