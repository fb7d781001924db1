"""What a result says of where it came from and how it was made."""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

import secateur
from secateur.checkpoint.source import Source


def peak_rss_bytes() -> int:
    """Most memory that this process has had resident."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Versions of everything that may change a bit of a result."""
    from importlib.metadata import version

    names = ("torch", "transformers", "safetensors")
    python = ".".join(map(str, sys.version_info[:3]))
    return {"secateur": secateur.__version__, "python": python, **{name: version(name) for name in names}}


def machine() -> dict[str, Any]:
    """What a measurement ran on: processor, cores, memory, threads, accelerator."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": name,
        "cores": os.cpu_count(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "threads": torch.get_num_threads(),
        "accelerator": str(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "none"),
    }


def provenance(model: Any, source: Source, digest: str) -> dict[str, Any]:
    """Where the weights came from: enough to open the dense model again and to see that it is the same."""
    given = "" if source.kind == "memory" else str(model)
    if source.kind in ("folder", "gguf"):
        given = str(Path(given).expanduser().resolve())
    entries = {key: value for key, value in dataclasses.asdict(source).items() if key != "folder"}
    return {**entries, "model": given, "sha256": digest}


def made_from(result: Mapping[str, Any]) -> list[Path]:
    """The files and folders that a ``secateur.json`` names as those its model was made from."""
    named = [entry for entry in (result.get("source"), result.get("student")) if isinstance(entry, Mapping)]
    return [Path(str(entry["model"])) for entry in named if entry.get("kind") in ("folder", "gguf") and entry["model"]]
