"""What a study saves, and what it costs to have one.

A sweep of wanda over twelve sparsities on the demo model: once as twelve runs of `secateur prune` with their defaults
(evaluation and verification), each a process of its own, once as one `secateur study run` of a grid of the same
settings, which verifies and evaluates each trial as well. Both on as many windows of 256 tokens, and on 16 such for
calibration. What a run does and a trial need not is part of it: it evaluates the dense model too, and times decoding of
both. Harness: wall time of the study that is neither a trial's own, nor the baselines', nor the finalists', as a share
of the trials' time; the start of the process counts.

    python benchmarks/study_sharing.py [--trials 12] [--model demo]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import _common

from secateur.checkpoint.cache import cache_folder

SAMPLES, LENGTH, WINDOWS = 16, 256, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--method", default="wanda")
    asked = parser.parse_args()
    sparsities = [round(0.1 + 0.7 * number / max(1, asked.trials - 1), 4) for number in range(asked.trials)]
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        apart = sum(_prune(asked, sparsity, place / "apart") for sparsity in sparsities)
        together, result = _study(asked, sparsities, place)
    spent = result["spent"]
    own = spent["trial_seconds"] + spent["baseline_seconds"] + spent["finalist_seconds"]
    row = {
        "model": asked.model, "method": asked.method, "trials": asked.trials, "apart, s": apart, "study, s": together,
        "times faster": apart / together, "trials, s": spent["trial_seconds"],
        "harness of a trial": (together - own) / spent["trial_seconds"],
        "complete": sum(trial["state"] == "complete" for trial in result["trials"]),
    }  # fmt: skip
    _common.store("study_sharing", " ".join(__doc__.split("\n\n")[1].split()), [row])


def _prune(asked: argparse.Namespace, sparsity: float, out: Path) -> float:
    run = _common.secateur(
        "prune", asked.model, "-o", str(out), "--method", asked.method, "--sparsity", str(sparsity), "--samples",
        str(SAMPLES), "--sequence-length", str(LENGTH), "--overwrite", "--json", "--quiet",
    )  # fmt: skip
    return run.seconds


def _study(asked: argparse.Namespace, sparsities: list[float], place: Path) -> tuple[float, dict]:
    study = {
        "name": "sweep", "model": asked.model,
        "data": {"samples": SAMPLES, "sequence-length": LENGTH, "windows": WINDOWS},
        "space": {"method": asked.method, "sparsity": sparsities}, "finalists": 1,
        "objectives": {"perplexity": "minimize", "nonzero": "minimize"},
    }  # fmt: skip
    (place / "sweep.yaml").write_text(json.dumps(study))  # JSON is YAML
    started = time.monotonic()
    shutil.rmtree(cache_folder() / "dense", ignore_errors=True)  # what an earlier study measured of the dense model
    run = _common.secateur("study", "run", str(place / "sweep.yaml"), "--json", "--quiet")
    return time.monotonic() - started, json.loads(run.stdout)


if __name__ == "__main__":
    main()
