"""Whole units removed from the demo model, without training.

By the reference protocol: calibration is the first 32 windows of 1,024 tokens of the WikiText-2 validation text,
perplexity is measured on the first 40 windows of 1,024 tokens of the test text. "ffn" removes 384 of 1,536 neurons in
every block (18.75 % of the prunable weights), "kv-groups" one of three groups, "depth" six of thirty blocks, "hidden"
108 of 576 hidden channels (18.75 % of the prunable weights, and of the embedding). "plain" is the smallest weights
without a refit, or for blocks the least influence; "no refit" chooses as the row before does. "block" trains what is
left of each block on the same windows (`--reconstruct block`, six passes at 1e-3, for which the last quarter of the
validation text was asked). "budget 80%" keeps at most 80 % of the prunable weights, split among depth, neurons and
groups by measured loss on the calibration text. "ffn flap" was made when the refit of neurons was damped by 0.01; it is
0.1 now. Seconds and peak memory are of the whole process, on one thread, with other work on the second core; those of
"ffn obs", "ffn taylor", "hidden" and "budget 80%" with much other work on both, so that their seconds say nothing.

    SECATEUR_DATA=folder python benchmarks/structured.py [--only "ffn obs,ffn plain"] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import _common
import _reference

BLOCK = ["--reconstruct", "block", *(f"--reconstruct-option={given}" for given in ("passes=6", "learning_rate=1e-3"))]
RUNS: dict[str, list[str]] = {
    "ffn obs": ["--structure", "ffn", "--sparsity", "0.1875", "--method", "obs"],
    "ffn flap": ["--structure", "ffn", "--sparsity", "0.1875", "--method", "flap"],
    "ffn wanda": ["--structure", "ffn", "--sparsity", "0.1875", "--method", "wanda"],
    "ffn wanda block": ["--structure", "ffn", "--sparsity", "0.1875", "--method", "wanda", *BLOCK],
    "ffn taylor": ["--structure", "ffn", "--sparsity", "0.1875", "--method", "taylor"],
    "ffn plain": ["--structure", "ffn", "--sparsity", "0.1875", "--method", "magnitude", "--no-update"],
    "kv-groups obs": ["--structure", "kv-groups", "--sparsity", "0.0833"],
    "kv-groups plain": ["--structure", "kv-groups", "--sparsity", "0.0833", "--method", "magnitude", "--no-update"],
    "hidden obs": ["--structure", "hidden", "--sparsity", "0.1875"],
    "hidden no refit": ["--structure", "hidden", "--sparsity", "0.1875", "--no-update"],
    "hidden plain": ["--structure", "hidden", "--sparsity", "0.1875", "--method", "magnitude", "--no-update"],
    "depth greedy": ["--structure", "depth", "--sparsity", "0.2", "--depth-by", "greedy"],
    "budget 80%": ["--budget", "parameters=0.8"],
    "depth plain": ["--structure", "depth", "--sparsity", "0.2", "--depth-by", "influence"],
}


def prune(name: str, out: Path, data: Path, *more: str) -> _common.Run:
    """Prune the demo model by the reference protocol."""
    return _common.secateur(
        "prune", "demo", "-o", str(out), *RUNS[name], "--calibration", str(data / "wikitext2-valid.txt"), "--samples",
        str(_reference.SAMPLES), "--sequence-length", str(_reference.LENGTH), "--no-verify", "--no-evaluate",
        "--overwrite", *more,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(RUNS), help="the other rows stay as they are")
    parser.add_argument("--keep", type=Path, help="keep the models in this folder, for recovery.py --scratch")
    options = parser.parse_args()
    chosen = options.only.split(",")
    data = _common.data_folder()
    path = _common.RESULTS / "structured.json"
    rows: dict[str, dict[str, Any]] = {}
    if path.is_file():
        rows = {row["run"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    with tempfile.TemporaryDirectory() as scratch:
        for name in (name for name in RUNS if name in chosen):
            out = options.keep / _reference.folder_name(name) if options.keep else Path(scratch) / "out"
            done = prune(name, out, data, "--json")
            made = json.loads(done.stdout)
            found = _reference.quality(str(out), data, questions=False)
            rows[name] = {
                "run": name,
                **found,
                "removed": f"{made['sparsity']:.2%}",
                "parameters removed": made["before"]["parameters"] - made["after"]["parameters"],
                "seconds": done.seconds,
                "peak MB": done.peak_rss_bytes / 1e6,
            }
            print(json.dumps(rows[name]), flush=True)
            ordered = [rows[name] for name in RUNS if name in rows]
            _common.store("structured", " ".join(__doc__.split("\n\n")[1].split()), ordered)


if __name__ == "__main__":
    main()
