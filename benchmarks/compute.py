"""What a bfloat16 calibration forward costs in quality, against a float32 one.

Perplexity by the protocol of `quality.py`, whose results are the bfloat16 side (run it first, on a processor that
multiplies bfloat16 natively); here the same runs are made with a float32 forward.

    SECATEUR_DATA=folder python benchmarks/compute.py [--only wanda,sparsegpt]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import _common
import _reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="wanda,sparsegpt")
    methods = parser.parse_args().only.split(",")
    data = _common.data_folder()
    quality = json.loads((_common.RESULTS / "quality.json").read_text(encoding="utf-8"))
    if not quality["machine"]["avx512_bf16"]:
        raise SystemExit("quality.json was made without native bfloat16: there is nothing to compare")
    bfloat16 = {row["method"]: row["perplexity"] for row in quality["rows"]}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for method in methods:
            out = Path(scratch) / method
            _reference.prune(method, out, data, "float32")
            float32 = _reference.quality(str(out), data, questions=False)["perplexity"]
            change = f"{bfloat16[method] / float32 - 1:+.2%}"
            rows.append({"method": method, "float32": float32, "bfloat16": bfloat16[method], "change": change})
    _common.store("compute", " ".join(__doc__.split("\n\n")[1].split()), rows)


if __name__ == "__main__":
    main()
