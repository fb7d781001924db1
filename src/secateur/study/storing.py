"""How the model of a trial is stored: an ordinary folder, or the sparse format with 16, 8 or 4 bits for a value"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import Any

from secateur.errors import StudyError, UnknownNameError
from secateur.study.recoveries import NONE

HF = "hf"
"""The ordinary folder, which is written anyway."""
BITS = {"sparse-16": 16, "sparse-8": 8, "sparse-4": 4}
FORMATS = (HF, *BITS)


def read_formats(listed: Iterable[Any], structures: Iterable[str], where: str) -> tuple[str, ...]:
    """The formats that a study file names.

    Args:
        structures: what may be removed in the same space; ``none`` where single weights go.

    Raises:
        UnknownNameError: for an unknown format.
        StudyError: for one that is named twice, or that needs zeros where whole units go.
    """
    found = tuple(str(one) for one in listed)
    for name in found:
        if name not in FORMATS:
            raise UnknownNameError("format", name, FORMATS)
    if len(set(found)) < len(found):
        raise StudyError(f"{where}: format names one twice: {', '.join(found)}")
    if "sparse-16" in found and (units := [name for name in structures if name != NONE]):
        raise StudyError(
            f"{where}: format sparse-16 leaves out zeros, and structure {', '.join(units)} leaves none",
            hint="give it an entry of the space's list without structure; sparse-8 and sparse-4 round what is left",
        )
    return found


def options(name: str) -> dict[str, Any]:
    """Options of `export`; where there are no zeros, or too few to leave out, values are rounded all the same."""
    return {"bits": BITS[name], **({"force": True} if BITS[name] < 16 else {})}


def unstored_folder(out: str, name: str) -> str:
    """Where the model of a trial is before it is written in its format: beside its own folder, or just there."""
    return out if name not in BITS else f"{out}-unpacked"


def export_command(out: str, name: str) -> str:
    """The command that stores a model so."""
    flags = [part for key, value in options(name).items()
             for part in ([f"--{key}"] if value is True else [f"--{key}", str(value)])]  # fmt: skip
    return shlex.join(["secateur", "export", unstored_folder(out, name), "-o", out, "--format", "sparse", *flags])
