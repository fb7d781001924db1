"""What a result says of where it came from and how it was made."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
