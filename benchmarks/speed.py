"""Time and peak memory of pruning, by the reference protocol, on the demo model.

T is one float32 forward of the calibration tokens (32 windows of 1,024), one window at a time, through the stock model
without its head, measured right before and after every run. A run is quoted in T of its own neighbours, as the wall
time of the whole process: start, loading, pruning, writing; verification and measuring are left out. Peak memory is
what the kernel reports for that process. "reference MB" is the peak of the published reference code. "ffn obs" and
"kv-groups obs" remove whole units (`structured.py`); they ran once, with other work on the second core.

    SECATEUR_DATA=folder python benchmarks/speed.py [--repeat 3] [--only wanda,sparsegpt] [--compute-dtype auto]
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
import _reference
import structured

NAMES = ("wanda", "sparsegpt", "ffn obs", "kv-groups obs")
REFERENCE_MB = {"wanda": 1733, "sparsegpt": 1625}
FORWARD = """
import sys, time, torch, transformers
folder, text, samples, length = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
tokens = tokenizer(open(text, encoding="utf-8").read(), add_special_tokens=False, verbose=False)
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
    arguments = [str(folder), str(text), str(_reference.SAMPLES), str(_reference.LENGTH)]
    return float(_common.run([sys.executable, "-c", FORWARD, *arguments]).stdout)


def prune(name: str, out: Path, data: Path, compute_dtype: str) -> _common.Run:
    """Prune the demo model by the reference protocol."""
    if name not in structured.RUNS:
        return _reference.prune(name, out, data, compute_dtype)
    return structured.prune(name, out, data, "--compute-dtype", compute_dtype, "--quiet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", default=",".join(NAMES), help="the other rows stay as they are")
    parser.add_argument("--compute-dtype", default="auto")
    options = parser.parse_args()
    data = _common.data_folder()

    from secateur.checkpoint.source import open_source

    folder, text = open_source("demo").folder, data / "wikitext2-valid.txt"
    names = options.only.split(",")
    timed: dict[str, list[tuple[float, float, int]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        before = forward_seconds(folder, text)
        for _ in range(options.repeat):
            for name in names:
                out = Path(scratch) / _reference.folder_name(name)
                measured = prune(name, out, data, options.compute_dtype)
                after = forward_seconds(folder, text)
                timed[name].append((measured.seconds, (before + after) / 2, measured.peak_rss_bytes))
                times = f"{measured.seconds:.1f} s, T {before:.1f} and {after:.1f} s"
                print(f"{time.strftime('%H:%M:%S')} {name}: {times}", file=sys.stderr)
                before = after
    path = _common.RESULTS / "speed.json"
    rows: dict[str, dict[str, Any]] = {}
    if path.is_file():
        rows = {row["method"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    for name in names:
        seconds, t, peaks = zip(*timed[name], strict=True)
        ratios = [one / forward for one, forward in zip(seconds, t, strict=True)]
        rows[name] = {
            "method": name,
            "seconds": statistics.median(seconds),
            "T, seconds": statistics.median(t),
            "time in T": statistics.median(ratios),
            "every run in T": ", ".join(f"{ratio:.2f}" for ratio in ratios),
            "peak MB": max(peaks) / 1e6,
            "reference MB": REFERENCE_MB.get(name),
        }
    protocol = " ".join(__doc__.split("\n\n")[1].split())
    _common.store(
        "speed", protocol, [rows[name] for name in NAMES if name in rows], compute_dtype=options.compute_dtype
    )


if __name__ == "__main__":
    main()
