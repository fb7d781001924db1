"""What rounding the kept weights costs in perplexity.

The demo model pruned to 50 % zeros by SparseGPT, by the reference protocol: calibration is the first 32 windows of
1,024 tokens of the WikiText-2 validation text, perplexity that of the first 40 windows of 1,024 tokens of the test
text, read from the packed folder, activations not rounded. "to the nearest" is `secateur export --format sparse --bits
N` of that model: a scale for each row at 8 bits, for 64 columns at 4. "with calibration" is `secateur prune --bits N`,
which makes each rounding error good by the weights of its row, a scale for 64 columns, exported with the same setting,
which loses nothing. Embedding and head keep 16 bits. "more" is against the pruned model that was not rounded.

    SECATEUR_DATA=folder python benchmarks/rounding.py [--samples 32] [--windows 40]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _common
import _reference

GROUPS = {8: "0", 4: "64"}
"""Columns that share a scale, where weights are rounded to the nearest; 0 is the row."""
CALIBRATED = "64"
"""The same, where they are rounded by `prune`."""


def perplexity(model: Path, data: Path, windows: int) -> float:
    """Of a folder, packed or not."""
    arguments = ["evaluate", str(model), "--data", str(data / "wikitext2-raw-test.txt"), "--json", "--quiet"]
    arguments += ["--sequence-length", str(_reference.LENGTH), "--samples", str(windows)]
    return float(json.loads(_common.secateur(*arguments).stdout)["perplexity"])


def packed(model: Path, bits: int, group: str) -> Path:
    """The folder in the sparse format, beside it."""
    out = model.with_name(f"{model.name}-int{bits}")
    more = ["--bits", str(bits), "--group-size", group, "--embedding-bits", "16", "--no-verify", "--quiet"]
    _common.secateur("export", str(model), "-o", str(out), "--format", "sparse", *more)
    return out


def prune(out: Path, data: Path, samples: int, more: Sequence[str] = ()) -> Path:
    """The pruned model, rounded where ``more`` says so."""
    arguments = ["prune", "demo", "-o", str(out), "--method", "sparsegpt", "--no-refit", "--sparsity", "0.5"]
    arguments += ["--calibration", str(data / "wikitext2-valid.txt"), "--samples", str(samples)]
    arguments += ["--sequence-length", str(_reference.LENGTH), "--no-verify", "--no-evaluate", "--quiet"]
    _common.secateur(*arguments, *more)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=_reference.SAMPLES)
    parser.add_argument("--windows", type=int, default=_reference.WINDOWS)
    options = parser.parse_args()
    data = _common.data_folder()
    with tempfile.TemporaryDirectory() as scratch:
        plain = prune(Path(scratch) / "plain", data, options.samples)
        whole = perplexity(plain, data, options.windows)
        rows: list[dict[str, Any]] = [{"weights": "as pruned", "perplexity": whole, "more": "0.0 %"}]
        for bits, group in GROUPS.items():
            made = Path(scratch) / f"rounded{bits}"
            rounded = prune(made, data, options.samples, ["--bits", str(bits), "--group-size", CALIBRATED])
            for name, folder, size in (("to the nearest", plain, group), ("with calibration", rounded, CALIBRATED)):
                found = perplexity(packed(folder, bits, size), data, options.windows)
                more = f"{found / whole - 1:.1%}".replace("%", " %")
                rows.append({"weights": f"int{bits}, {name}", "perplexity": found, "more": more})
    protocol = " ".join(" ".join(__doc__.split("\n\n")[1:-1]).split())
    if (options.samples, options.windows) != (_reference.SAMPLES, _reference.WINDOWS):
        protocol += f" Here with {options.samples} windows of calibration and {options.windows} of the test text only."
    _common.store("rounding", protocol, rows)


if __name__ == "__main__":
    main()
