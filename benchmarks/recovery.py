"""What recovery brings, on the demo model.

The model is pruned by SparseGPT with the first 32 windows of 1,024 tokens of the WikiText-2 validation text, then
trained on that text only, with at most 250,000 tokens; the last tenth of it is held out. Perplexity is measured on the
first 40 windows of 1,024 tokens of the test text, which nothing else has seen; "excess gone" is the share of the loss
above the dense model's that recovery took away. Minutes are those of the training itself.

    SECATEUR_DATA=folder python benchmarks/recovery.py [--only NAME,NAME] [--patterns unstructured,2:4]
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import _common
import _reference

TOKENS = 250_000
RUNS: dict[str, list[str]] = {
    "full kd": [],
    "full lm": ["--loss", "lm"],
    "full kd+hidden": ["--loss", "kd+hidden"],
    "lora kd": ["--mode", "lora"],
    "norms-and-biases kd": ["--mode", "norms-and-biases"],
    "blocks": ["--mode", "blocks"],
}
QUESTIONED = ("full kd", "blocks")
"""Runs after which accuracy is measured as well: it takes some minutes each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(RUNS))
    parser.add_argument("--patterns", default="unstructured,2:4")
    parser.add_argument("--questions", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    data = _common.data_folder()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        dense = _reference.quality("demo", data, questions=options.questions)
        rows.append({"run": "dense", **dense})
        for pattern in options.patterns.split(","):
            method = "sparsegpt" if pattern == "unstructured" else f"sparsegpt {pattern}"
            pruned = Path(scratch) / _reference.folder_name(method)
            _reference.prune(method, pruned, data)
            before = _reference.quality(str(pruned), data, questions=options.questions)
            rows.append({"run": f"{method}, pruned", **before})
            for name in options.only.split(","):
                asked = options.questions and name in QUESTIONED
                rows.append(_recovered(name, method, pruned, dense, before, data, Path(scratch) / "out", asked))
                print(json.dumps(rows[-1]), flush=True)
    _common.store("recovery", " ".join(__doc__.split("\n\n")[1].split()), rows)


def _recovered(
    name: str, method: str, pruned: Path, dense: dict[str, Any], before: dict[str, Any], data: Path, out: Path,
    questions: bool,
) -> dict[str, Any]:  # fmt: skip
    done = _common.secateur(
        "recover", str(pruned), "-o", str(out), "--data", str(data / "wikitext2-valid.txt"), "--held-out", "0.1",
        "--tokens", str(TOKENS), "--no-evaluate", "--overwrite", "--json", "--quiet", *RUNS[name],
    )  # fmt: skip
    training = json.loads(done.stdout)["training"]
    found = _reference.quality(str(out), data, questions=questions)
    excess = math.log(before["perplexity"] / dense["perplexity"])
    gone = math.log(before["perplexity"] / found["perplexity"]) / excess
    return {
        "run": f"{method}, {name}",
        **found,
        "excess gone": f"{gone:.0%}",
        "tokens": training["tokens"],
        "minutes": training["seconds"] / 60,
        "tokens/s": training["tokens_per_second"],
        "held-out loss": training.get("held_out_loss"),
        "gap": training.get("generalisation_gap"),
        "peak MB": done.peak_rss_bytes / 1e6,
    }


if __name__ == "__main__":
    main()
