"""How good pruning in one shot can be, and what each part of it brings, on the demo model.

By the reference protocol: calibration is the first 32 windows of 1,024 tokens of a part of the WikiText-2 validation
text (seed 1 of six parts begins where the protocol begins), perplexity is measured on the first 40 windows of 1,024
tokens of the test text, and on as many as there are of the measuring half of the built-in text, documentation of
Python ("Python text"). "sparsegpt" is the published method, in the same engine; "refit" solves its kept weights anew,
"correction" is `--error-correction auto`, "block" is `--reconstruct block`. "of sparsegpt" is the perplexity by that
of sparsegpt with the same text. Minutes and peak memory are of the whole process, on one thread, with other work on
the second core.

    SECATEUR_DATA=folder python benchmarks/one_shot.py [--only "50%, alps, seed 1;..."] [--log FILE] [--questions]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import _common
import _reference

PATTERNS = {"50%": ["--sparsity", "0.5"], "60%": ["--sparsity", "0.6"], "70%": ["--sparsity", "0.7"],
            "2:4": ["--pattern", "2:4"]}  # fmt: skip
CORRECTED = ["--error-correction", "auto"]
WAYS: dict[str, list[str]] = {
    "sparsegpt": ["--method", "sparsegpt", "--no-refit"],
    "sparsegpt refit": ["--method", "sparsegpt"],
    "alps": ["--method", "alps"],
    "alps correction": ["--method", "alps", *CORRECTED],
    "alps correction block": ["--method", "alps", *CORRECTED, "--reconstruct", "block"],
}
SEEDS = 3
BASE = "sparsegpt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", help="names of runs, divided by semicolons; sparsegpt with the same text is run as well"
    )
    parser.add_argument("--log", type=Path, help="append every row to this file, and take finished rows from it")
    parser.add_argument("--questions", action="store_true", help="BLiMP and PIQA as well, a quarter of an hour each")
    options = parser.parse_args()
    data = _common.data_folder()
    known: dict[str, dict[str, Any]] = {}
    if options.log and options.log.exists():
        known = {row["run"]: row for row in map(json.loads, options.log.read_text().splitlines())}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        texts = _reference.parts(data, 6, Path(scratch))
        for pattern, flags in PATTERNS.items():
            for seed in range(1, SEEDS + 1):
                wanted = [
                    way for way in WAYS if options.only is None or _name(pattern, way, seed) in options.only.split(";")
                ]
                for way in dict.fromkeys([BASE, *wanted] if wanted else []):
                    name = _name(pattern, way, seed)
                    row = known.get(name)
                    if row is None:
                        out = Path(scratch) / "out"
                        row = {
                            "run": name,
                            **_measured([*WAYS[way], *flags], texts[seed - 1], out, data, options.questions),
                        }
                        if options.log:
                            with options.log.open("a") as file:
                                file.write(json.dumps(row) + "\n")
                    if way == BASE:
                        base = row["perplexity"]
                    rows.append({**row, "of sparsegpt": row["perplexity"] / base})
                    print(json.dumps(rows[-1]), flush=True)
    _common.store("one_shot", " ".join(" ".join(__doc__.split("\n\n")[1:-1]).split()), rows)


def _name(pattern: str, way: str, seed: int) -> str:
    return f"{pattern}, {way}, seed {seed}"


def _measured(flags: list[str], text: Path, out: Path, data: Path, questions: bool) -> dict[str, Any]:
    run = _common.secateur(
        "prune", "demo", "-o", str(out), "--overwrite", "--quiet", "--no-verify", "--no-evaluate", "--calibration",
        str(text), "--samples", str(_reference.SAMPLES), "--sequence-length", str(_reference.LENGTH), *flags,
    )  # fmt: skip
    row = _reference.quality(str(out), data, questions=questions)
    other = _common.secateur(
        "evaluate", str(out), "--sequence-length", str(_reference.LENGTH), "--samples", str(_reference.WINDOWS),
        "--json", "--quiet",
    )  # fmt: skip
    row["Python text"] = json.loads(other.stdout)["perplexity"]
    return {**row, "minutes": run.seconds / 60, "peak MB": run.peak_rss_bytes / 1e6}


if __name__ == "__main__":
    main()
