"""Whether the CPU kernels (wheel ``secateur-kernels``) are there, and fit: found out once, and nowhere else."""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import dataclass
from typing import Any

from secateur.errors import UsageError

PACKAGE = "secateur_kernels"
SERIES = "0.1"
"""Versions of the wheel that fit begin so."""
ABI = 1
ACTIVATIONS = "SECATEUR_ACTIVATIONS"
"""Environment variable: how activations meet weights of 8 and 4 bits; see `activations`."""
DECODER = "SECATEUR_DECODER"
"""Environment variable: whether single tokens go through all blocks in one call; see `decodes`."""


@dataclass(frozen=True)
class Kernels:
    """What was found."""

    module: Any
    """The package, or None."""
    reason: str
    """Why it is not used; empty when it is."""


@functools.cache
def find() -> Kernels:
    """Look for the wheel; the answer is kept.

    Raises:
        UsageError: when ``SECATEUR_KERNELS`` asks for a variant that this CPU cannot run.
    """
    try:
        module = importlib.import_module(PACKAGE)
    except (ImportError, OSError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == PACKAGE
        return Kernels(None, "secateur-kernels is not installed" if missing else f"secateur-kernels is broken: {error}")
    except ValueError as error:
        raise UsageError(str(error), hint="unset SECATEUR_KERNELS to take the best") from error
    version = str(getattr(module, "__version__", "?"))
    if not version.startswith(f"{SERIES}.") or getattr(module, "ABI", None) != ABI:
        return Kernels(None, f"secateur-kernels is version {version}, this secateur needs {SERIES}")
    return Kernels(module, "")


def told() -> str:
    """Which kernels run, and how they take activations; for people."""
    module = find().module
    name = next(name for name, number in module.ACTIVATIONS.items() if number == activations())
    through = "" if decodes() else ", tokens block by block"
    return f"secateur-kernels {module.__version__}, {module.variant()}, activations {name}{through}"


@functools.cache
def activations() -> int:
    """How activations meet weights of 8 and 4 bits, as the kernels number it.

    ``float`` takes them as they are. ``int8-token`` and ``int8-group`` round them to 8 bits, with one scale for each
    token or for every 64 columns; the second is nearer and is what is taken when nothing is said.

    Raises:
        UsageError: for another value of the environment variable.
    """
    known: dict[str, int] = find().module.ACTIVATIONS
    wanted = os.environ.get(ACTIVATIONS, "int8-group")
    if wanted not in known:
        raise UsageError(f"{ACTIVATIONS} is {wanted!r}", hint=f"known: {', '.join(known)}")
    return known[wanted]


@functools.cache
def decodes() -> bool:
    """Whether single tokens go through all blocks at once, where that can be (`secateur.runtime.decoder`).

    Raises:
        UsageError: for another value of the environment variable than ``on``, which is the default, and ``off``.
    """
    wanted = os.environ.get(DECODER, "on")
    if wanted not in ("on", "off"):
        raise UsageError(f"{DECODER} is {wanted!r}", hint="known: on, off")
    return wanted == "on" and hasattr(find().module, "Decoder")
