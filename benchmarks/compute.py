"""What a bfloat16 calibration forward costs in quality, against a float32 one.

The same runs are made with both number formats, each on the first 32 windows of 1,024 tokens of three parts of the
validation text; perplexity is that of `quality.py`. One run differs from the next by chance as well, so the cost is the
mean over the parts, with its standard error.

    SECATEUR_DATA=folder python benchmarks/compute.py [--only "wanda,sparsegpt,wanda 2:4"] [--parts 3]
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import _common
import _reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="wanda,sparsegpt,wanda 2:4")
    parser.add_argument("--parts", type=int, default=3)
    options = parser.parse_args()
    data = _common.data_folder()
    if not _common.machine()["avx512_bf16"]:
        raise SystemExit("this processor does not multiply bfloat16 natively: there is nothing to compare")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        texts = _reference.parts(data, options.parts, Path(scratch))
        for method in options.only.split(","):
            found: dict[str, list[float]] = {"float32": [], "bfloat16": []}
            for text in texts:
                for dtype, perplexities in found.items():
                    out = Path(scratch) / "out"
                    _reference.prune(method, out, data, dtype, calibration=text)
                    perplexities.append(_reference.quality(str(out), data, questions=False)["perplexity"])
                    print(method, text.name, dtype, f"{perplexities[-1]:.2f}", flush=True)
            changes = [math.log(b / f) for f, b in zip(found["float32"], found["bfloat16"], strict=True)]
            error = statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else math.nan
            shown = {name: ", ".join(f"{value:.2f}" for value in values) for name, values in found.items()}
            mean = statistics.mean(changes)
            rows.append(
                {"method": method, **shown, "change": f"{math.expm1(mean):+.2%}", "standard error": f"{error:.2%}"}
            )
    _common.store("compute", " ".join(__doc__.split("\n\n")[1].split()), rows)


if __name__ == "__main__":
    main()
