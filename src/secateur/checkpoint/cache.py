"""Things made once and kept: converted models and the demo's download."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from secateur.checkpoint.locks import take_lock
from secateur.errors import OutputError


def cache_folder() -> Path:
    """Where things are kept: ``$SECATEUR_CACHE``, or the platform's cache folder."""
    if own := os.environ.get("SECATEUR_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "secateur"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "secateur"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "secateur"


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """The folder ``target``, filled by ``build`` when it is not there yet. It appears whole, by a rename, or not.

    A second process that wants the same folder waits for the first. What a killed process left is thrown away.

    Raises:
        OutputError: when the cache cannot be written.
    """
    if target.is_dir():
        return target
    partial = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = None
        while lock is None:
            lock = take_lock(target.with_name(target.name + ".lock"), wait=True)
    except OSError as error:
        raise OutputError(
            f"the cache {target.parent} cannot be written: {error.strerror}", hint="choose another with SECATEUR_CACHE"
        ) from error
    try:
        if not target.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            build(partial)
            partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    return target
