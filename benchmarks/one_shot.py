"""How good pruning in one shot can be, and what each part of it brings, on the demo model.

By the reference protocol: calibration is the first 32 windows of 1,024 tokens of a part of the WikiText-2 validation
text (seed 1 of six parts begins where the protocol begins), perplexity is measured on the first 40 windows of 1,024
tokens of the test text, and on as many as there are of the measuring half of the built-in text, documentation of
Python ("Python text"). "sparsegpt" is the published method, in the same engine; "refit" solves its kept weights anew;
"best" is ALPS with `--error-correction auto`, which is what `--method best` stands for; "block" and "half-block" are
`--reconstruct` as it is by default, "2 blocks" and "4 blocks" two and four passes at a rate of 1e-3; names of
allocations are `--allocation`, "bits" is `--bits` in groups of 64. "of sparsegpt" is the perplexity by that of
sparsegpt with the same text. Minutes are of the whole process that prunes, one of as many as "at once" says.

    SECATEUR_DATA=folder python benchmarks/one_shot.py [--only "50%, best, seed 1;..."] [--jobs N] [--log FILE]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import _common
import _reference

PATTERNS = {"50%": ["--sparsity", "0.5"], "60%": ["--sparsity", "0.6"], "70%": ["--sparsity", "0.7"],
            "2:4": ["--pattern", "2:4"]}  # fmt: skip
BASE, BEST, BLOCK = "sparsegpt", "best", "best block"
LONGER = ["--reconstruct-option", "learning_rate=1e-3"]
WAYS: dict[str, list[str]] = {
    BASE: ["--method", "sparsegpt", "--no-refit"],
    BEST: ["--method", "best"],
    BLOCK: ["--method", "best", "--reconstruct", "block"],
    "best 2 blocks": ["--method", "best", "--reconstruct", "block", *LONGER, "--reconstruct-option", "passes=2"],
    "best 4 blocks": ["--method", "best", "--reconstruct", "block", *LONGER, "--reconstruct-option", "passes=4"],
    "sparsegpt refit": ["--method", "sparsegpt"],
    "alps": ["--method", "alps", "--error-correction", "off"],
    "best half-block": ["--method", "best", "--reconstruct", "half-block"],
    "sparsegpt block": ["--method", "sparsegpt", "--no-refit", "--reconstruct", "block"],
    **{
        f"best {rule}": ["--method", "best", "--allocation", rule] for rule in ("owl", "alpha", "sensitivity", "evolve")
    },
    "best 8 bits": ["--method", "best", "--bits", "8", "--group-size", "64"],
    "best 4 bits": ["--method", "best", "--bits", "4", "--group-size", "64"],
}
SEEDS = 3
REPEATED = (BASE, BEST, BLOCK)
"""What is run with every part of the text; the rest with the first one."""
NAMES = [
    (pattern, way, seed)
    for seed in range(1, SEEDS + 1)
    for way in WAYS
    for pattern in PATTERNS
    if (seed == 1 or way in REPEATED) and not (pattern == "2:4" and "--allocation" in WAYS[way])
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names of runs, divided by semicolons; of sparsegpt is known with its row")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--log", type=Path, help="append every row to this file, and take finished rows from it")
    parser.add_argument("--questions", action="store_true", help="BLiMP and PIQA as well, of sparsegpt, best and block")
    options = parser.parse_args()
    data = _common.data_folder()
    known: dict[str, dict[str, Any]] = {}
    if options.log and options.log.exists():
        known = {row["run"]: row for row in map(json.loads, options.log.read_text().splitlines())}
    wanted = [each for each in NAMES if options.only is None or _name(*each) in options.only.split(";")]
    if options.only and (unknown := set(options.only.split(";")) - {_name(*each) for each in NAMES}):
        raise SystemExit(f"no such run: {'; '.join(sorted(unknown))}")
    writing, machine = threading.Lock(), _common.machine()
    device = machine["accelerator"] or machine["processor"]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.jobs) as pool:
        texts = _reference.parts(data, 6, Path(scratch))

        def one(each: tuple[str, str, int]) -> None:
            pattern, way, seed = each
            name = _name(*each)
            if name not in known:
                out = Path(scratch) / _reference.folder_name(name.replace("%", ""))
                asked = options.questions and seed == 1 and way in REPEATED
                found = _measured([*WAYS[way], *PATTERNS[pattern]], texts[seed - 1], out, data, asked)
                with writing:
                    known[name] = {"run": name, **found, "at once": options.jobs, "on": device}
                    print(json.dumps(known[name]), flush=True)
                    if options.log:
                        with options.log.open("a") as file:
                            file.write(json.dumps(known[name]) + "\n")

        list(pool.map(one, wanted))
    rows = []
    for pattern, way, seed in NAMES:
        row, base = (known.get(_name(pattern, each, seed)) for each in (way, BASE))
        if row is not None:
            rows.append({**row, "of sparsegpt": row["perplexity"] / base["perplexity"] if base else None})
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
    shutil.rmtree(out)
    return {**row, "minutes": run.seconds / 60}


if __name__ == "__main__":
    main()
