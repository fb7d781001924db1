"""Quality, time and memory by the reference protocol, on the demo model.

Calibration is the first 32 windows of 1,024 tokens of the WikiText-2 validation text, quality is measured on the first 40
windows of 1,024 tokens of the test text and on BLiMP and PIQA. T is one float32 forward of the calibration tokens, one
window at a time, through the stock model without its head, measured right before and after every run; a run is quoted in
T of its own neighbours, as the wall time of the whole process: start, loading, pruning, writing. Peak memory is what the
kernel reports for the process.

    SECATEUR_DATA=folder python benchmarks/reference.py [--repeat 3] [--only wanda,sparsegpt] [--no-quality]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _common

REFERENCE = {
    "dense": (24.46, None),
    "magnitude": (489.0, None),
    "wanda": (52.5, 1733),
    "sparsegpt": (44.0, 1625),
    "wanda 2:4": (155.8, None),
    "sparsegpt 2:4": (None, None),
    "random": (None, None),
}
SAMPLES, LENGTH, WINDOWS = 32, 1024, 40

FORWARD = """
import sys, time, torch, transformers
folder, text, samples, length = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokens = transformers.AutoTokenizer.from_pretrained(folder)(open(text, encoding="utf-8").read(), add_special_tokens=False, verbose=False)
windows = torch.tensor(tokens["input_ids"][: samples * length]).view(samples, length)
with torch.inference_mode():
    model.base_model(windows[:1], use_cache=False)
    started = time.perf_counter()
    for window in windows:
        model.base_model(window[None], use_cache=False)
print(time.perf_counter() - started)
"""


def forward_seconds(folder: Path, text: Path) -> float:
    """T, in a process of its own."""
    return float(_common.run([sys.executable, "-c", FORWARD, str(folder), str(text), str(SAMPLES), str(LENGTH)]).stdout)


def quality(model: str, data: Path) -> dict[str, Any]:
    """Perplexity, BLiMP and PIQA of a model, from `secateur evaluate --json`."""
    arguments = ["evaluate", model, "--data", str(data / "wikitext2-raw-test.txt"), "--sequence-length", str(LENGTH)]
    arguments += ["--samples", str(WINDOWS), "--json", "--quiet"]
    for name in ("blimp-34x100.jsonl", "piqa-valid-first919.jsonl"):
        arguments += ["--files", str(data / name)]
    found = json.loads(_common.secateur(*arguments).stdout)
    row = {"perplexity": found["perplexity"]}
    for name, value in found["accuracy"].items():
        row[name] = value
        row[f"{name} stderr"] = found["accuracy_stderr"][name]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", default="magnitude,wanda,sparsegpt,wanda 2:4,sparsegpt 2:4")
    parser.add_argument("--compute-dtype", default="auto")
    parser.add_argument("--no-quality", action="store_true")
    options = parser.parse_args()
    data = _common.data_folder()

    from secateur.checkpoint.source import open_source

    folder = open_source("demo").folder
    text = data / "wikitext2-valid.txt"
    names = options.only.split(",")
    timed: dict[str, list[tuple[float, float, int]]] = {name: [] for name in names}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        if not options.no_quality:
            rows.append({"method": "dense", "reference": REFERENCE["dense"][0], **quality("demo", data)})
        t_before = forward_seconds(folder, text)
        for _ in range(options.repeat):
            for name in names:
                method, _, pattern = name.partition(" ")
                out = str(Path(scratch) / name.replace(" ", "-").replace(":", "-"))
                arguments = ["prune", "demo", "-o", out, "--method", method, "--overwrite", "--quiet"]
                arguments += ["--calibration", str(text), "--samples", str(SAMPLES), "--sequence-length", str(LENGTH)]
                arguments += ["--compute-dtype", options.compute_dtype, "--no-verify", "--no-evaluate"]
                arguments += ["--pattern", pattern] if pattern else ["--sparsity", "0.5"]
                measured = _common.secateur(*arguments)
                t_after = forward_seconds(folder, text)
                timed[name].append((measured.seconds, (t_before + t_after) / 2, measured.peak_rss_bytes))
                print(
                    f"{time.strftime('%H:%M:%S')} {name}: {measured.seconds:.1f} s, T {t_before:.1f} {t_after:.1f}",
                    file=sys.stderr,
                )
                t_before = t_after
        for name in names:
            seconds, t, peaks = zip(*timed[name], strict=True)
            reference, reference_mb = REFERENCE.get(name, (None, None))
            row = {"method": name, "reference": reference}
            if not options.no_quality:
                row |= quality(str(Path(scratch) / name.replace(" ", "-").replace(":", "-")), data)
            row |= {
                "seconds": statistics.median(seconds),
                "T": statistics.median(t),
                "in T": statistics.median(s / one for s, one in zip(seconds, t, strict=True)),
                "runs in T": ", ".join(f"{s / one:.2f}" for s, one in zip(seconds, t, strict=True)),
                "peak MB": max(peaks) / 1e6,
                "reference MB": reference_mb,
            }
            rows.append(row)
    _common.store("reference", " ".join(__doc__.split("\n\n")[1].split()), rows, compute_dtype=options.compute_dtype)


if __name__ == "__main__":
    main()
