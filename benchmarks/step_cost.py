"""What holding the zeros costs in a training step, and what the adapters save in memory.

One optimiser step of the stock Trainer (2 windows of 1,024 tokens, accumulated) on the pruned demo model, with and
without the callback that holds the zeros, alternating in one process: median seconds of the steps of either kind. Peak
memory is that of a whole `secateur recover` of 8,192 tokens, each mode with its defaults, in a process of its own.

    python benchmarks/step_cost.py [--steps 4] [--repeat 3] [--only time|memory]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import _common
import torch
import transformers

from secateur import SparsityCallback
from secateur.measure.model import load_model

LENGTH, WINDOWS = 1024, 2
MODES = ("full", "lora", "norms-and-biases", "blocks")


class _Clock(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = time.monotonic()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.monotonic() - self._started)


def _steps(model: Any, count: int, folder: str, callbacks: list[Any]) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (count * WINDOWS, LENGTH), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in ids]
    clock = _Clock()
    arguments = transformers.TrainingArguments(
        folder, max_steps=count, per_device_train_batch_size=1, gradient_accumulation_steps=WINDOWS, use_cpu=True,
        save_strategy="no", report_to="none", disable_tqdm=True, learning_rate=1e-6,
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=[*callbacks, clock]).train()
    return clock.seconds[1:]  # the first one makes the optimiser's state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", choices=["time", "memory"], help="keep the other rows of the last result")
    options = parser.parse_args()
    path = _common.RESULTS / "step_cost.json"
    known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        pruned = Path(scratch) / "pruned"
        _common.secateur("prune", "demo", "-o", str(pruned), "--method", "magnitude", "--no-evaluate", "--no-verify")
        # Memory first: the kernel counts what a parent held when it started a child.
        if options.only == "time":
            rows += [row for row in known if row["what"].startswith("recover")]
        else:
            rows += _memory(pruned, f"{scratch}/out")
        if options.only == "memory":
            rows += [row for row in known if row["what"].startswith("step")]
        else:
            rows += _time(pruned, scratch, options.steps, options.repeat)
    _common.store("step_cost", " ".join(__doc__.split("\n\n")[1].split()), rows)


def _memory(pruned: Path, out: str) -> list[dict[str, Any]]:
    rows, full = [], 0.0
    for mode in MODES:
        run = _common.secateur(
            "recover", str(pruned), "-o", out, "--mode", mode, "--tokens", str(4 * WINDOWS * LENGTH), "--overwrite",
            "--no-evaluate", "--no-verify", "--quiet", *(["--epochs", "1"] if mode == "blocks" else []),
        )  # fmt: skip
        peak = run.peak_rss_bytes / 1e6
        full = full or peak
        rows.append({"what": f"recover, {mode}", "peak MB": peak, "ratio": peak / full})
    return rows


def _time(pruned: Path, scratch: str, steps: int, repeat: int) -> list[dict[str, Any]]:
    found: dict[str, list[float]] = {"without": [], "held": []}
    for _ in range(repeat):
        for name, callbacks in (("without", []), ("held", [SparsityCallback("hold")])):
            model = load_model(pruned, device="cpu", dtype="float32")
            found[name] += _steps(model, steps, f"{scratch}/{name}", callbacks)
    medians = {name: statistics.median(values) for name, values in found.items()}
    return [
        {"what": f"step, {name}", "seconds": value, "ratio": value / medians["without"]}
        for name, value in medians.items()
    ]


if __name__ == "__main__":
    main()
