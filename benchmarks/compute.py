"""What a bfloat16 calibration forward costs in quality, against a float32 one.

The reference protocol of `quality.py`, each method once with either format of the forward; perplexity on the first 40
windows of 1,024 tokens of the WikiText-2 test text.

    SECATEUR_DATA=folder python benchmarks/compute.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import _common
import _reference


def main() -> None:
    data = _common.data_folder()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for method in ("wanda", "sparsegpt"):
            found = {}
            for compute in ("float32", "bfloat16"):
                out = Path(scratch) / f"{method}-{compute}"
                _reference.prune(method, out, data, compute)
                found[compute] = _reference.quality(str(out), data, questions=False)["perplexity"]
            change = found["bfloat16"] / found["float32"] - 1
            rows.append({"method": method, **found, "change": f"{change:+.2%}"})
    _common.store("compute", " ".join(__doc__.split("\n\n")[1].split()), rows)


if __name__ == "__main__":
    main()
