"""What the benchmark scripts share: running a command and watching it, describing the machine, storing results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass
class Run:
    """One finished process: wall seconds and the largest resident memory it ever had, as the kernel counts them."""

    seconds: float
    peak_rss_bytes: int
    stdout: str


def run(command: list[str], **environment: str) -> Run:
    """Run a command to its end; its stderr passes through."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {os.waitstatus_to_exitcode(status)}")
    scale = 1 if sys.platform == "darwin" else 1024
    return Run(seconds, usage.ru_maxrss * scale, output)


def secateur(*arguments: str, **environment: str) -> Run:
    """Run the command line of this environment."""
    return run([sys.executable, "-m", "secateur", *arguments], **environment)


def data_folder() -> Path:
    """The folder with the evaluation data, which is not part of the project."""
    folder = os.environ.get("SECATEUR_DATA")
    if not folder:
        raise SystemExit(
            "set SECATEUR_DATA to the folder with wikitext2-valid.txt, wikitext2-raw-test.txt and the .jsonl files"
        )
    return Path(folder)


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import torch
    import transformers

    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next(
            (line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), name
        )
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "avx512_bf16": " avx512_bf16" in flags,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def store(name: str, protocol: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Print a table for people, the whole as one JSON line for programs, and keep it in ``results/``."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    data = {
        "name": name,
        "protocol": protocol,
        "command": f"python benchmarks/{name}.py",
        "commit": commit,
        "machine": machine(),
        "rows": rows,
        **more,
    }
    columns = list(dict.fromkeys(key for row in rows for key in row))
    widths = [max(len(column), *(len(_shown(row.get(column))) for row in rows)) for column in columns]
    print("  ".join(column.ljust(width) for column, width in zip(columns, widths, strict=True)))
    for row in rows:
        print("  ".join(_shown(row.get(column)).ljust(width) for column, width in zip(columns, widths, strict=True)))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(data))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return "-" if value is None else str(value)
