"""Are models with fewer units smaller and faster? The demo model in transformers and in llama.cpp.

Units are removed from the demo model at 20 % and 50 % of the prunable weights, by influence and magnitude without a
refit, since neither size nor speed asks which units went. "depth" leaves out blocks, "ffn" neurons, "depth,ffn" both;
the rest of a name is the share. The whole model and each of the others are measured in turn: "prefill" is a prompt of
257 tokens, "decode" 64 new ones after it, at batch 1, in float32 in transformers and as f16 in llama.cpp by its own
clock. Each ratio is the median over the rounds of this model's speed by the whole model's in the same round, with the
least and the most. Resident memory is what the loaded folder adds to a fresh process, in float32.

    python benchmarks/smaller.py [--rounds 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
from pathlib import Path
from typing import Any

import _common

from secateur.checkpoint.source import open_source
from secateur.measure.compare import Worker
from secateur.measure.llama_cpp import INSTALL, LlamaCpp, is_installed

PROMPT = list(range(300, 557))
NEW = 64
MODELS = ("depth 20%", "ffn 20%", "depth,ffn 20%", "depth 50%", "ffn 50%", "depth,ffn 50%")
PLACES = ("transformers", "llama.cpp")
Speeds = dict[str, list[float]]


def make(name: str, out: Path) -> None:
    """Remove units as the name says."""
    structure, share = name.split()
    _common.secateur(
        "prune", "demo", "-o", str(out), "--structure", structure, "--sparsity", str(int(share[:-1]) / 100),
        *(["--depth-by", "influence"] if "depth" in structure else []),
        *(["--method", "magnitude", "--no-update"] if "ffn" in structure else []),
        "--samples", "2", "--sequence-length", "128", "--no-evaluate", "--quiet", "--overwrite",
    )  # fmt: skip


def transformers_speed(worker: Worker) -> dict[str, float]:
    """Tokens a second."""
    found = worker.ask("decode", prompt_tokens=PROMPT, new_tokens=NEW)
    return {"prefill": len(PROMPT) / found["prefill_seconds"], "decode": found["tokens"] / found["seconds"]}


def llama_speed(worker: Worker) -> dict[str, float]:
    """Tokens a second, by llama.cpp's own clock."""
    found = worker.ask("speed", tokens=PROMPT, new_tokens=NEW)
    return {key: found[f"{key}_tokens_per_second"] for key in ("prefill", "decode")}


def compared(whole: Path, folder: Path, rounds: int, threads: int, scratch: Path) -> dict[str, Any]:
    """A row: both models side by side."""
    row: dict[str, Any] = {"MB": size(folder)}
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(one, "float32", threads=threads)) for one in (whole, folder)]
        for worker in workers:
            transformers_speed(worker)  # warm up
        memory = [worker.ask("resident") for worker in workers]
        resident = [one["bytes_resident"] - one["bytes_resident_before"] for one in memory]
        row |= {"size ratio": row["MB"] / size(whole), "resident ratio": resident[1] / resident[0]}
        row |= ratios("transformers", [[transformers_speed(worker) for worker in workers] for _ in range(rounds)])
    files = [scratch / f"{place}.gguf" for place in ("whole", "cut")]
    for one, file in zip((whole, folder), files, strict=True):
        if file.name == "cut.gguf" or not file.exists():
            _common.secateur("export", str(one), "-o", str(file), "--overwrite", "--no-verify", "--quiet")
    row["gguf size ratio"] = files[1].stat().st_size / files[0].stat().st_size
    with contextlib.ExitStack() as stack:
        # Each answer is the second of two runs.
        workers = [stack.enter_context(LlamaCpp(file, context=512, threads=threads, exact=False)) for file in files]
        row |= ratios("llama.cpp", [[llama_speed(worker) for worker in workers] for _ in range(rounds)])
    return row


def ratios(place: str, rounds: list[list[dict[str, float]]]) -> dict[str, Any]:
    """Speed of the second model by that of the first, over rounds."""
    row = {}
    for key in ("prefill", "decode"):
        found = sorted(cut[key] / whole[key] for whole, cut in rounds)
        row[f"{place} {key}"] = f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"
    return row


def size(folder: Path) -> float:
    """Megabytes of weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default=";".join(MODELS))
    options = parser.parse_args()
    if not is_installed():
        raise SystemExit(f"install xllamacpp first: {INSTALL}")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        whole, folder = open_source("demo").folder, Path(scratch) / "cut"
        for name in options.only.split(";"):
            make(name, folder)
            rows.append({"model": name, **compared(whole, folder, options.rounds, options.threads, Path(scratch))})
            print(rows[-1], flush=True)
    _common.store(
        "smaller", " ".join(" ".join(__doc__.split("\n\n")[1:-1]).split()), rows, used_threads=options.threads
    )


if __name__ == "__main__":
    main()
