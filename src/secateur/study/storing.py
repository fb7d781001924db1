"""How the model of a trial is stored: an ordinary folder, the sparse format with 16, 8 or 4 bits, or that of torchao"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import Any

from secateur.errors import MissingExtraError, StudyError, UnknownNameError
from secateur.study.recoveries import NONE

HF = "hf"
"""The ordinary folder, which is written anyway."""
TORCHAO = "torchao-8"
# Where there are no zeros, or too few to leave out, values are rounded all the same.
STORED: dict[str, dict[str, Any]] = {
    "sparse-16": {"format": "sparse", "bits": 16},
    "sparse-8": {"format": "sparse", "bits": 8, "force": True},
    "sparse-4": {"format": "sparse", "bits": 4, "force": True},
    TORCHAO: {"format": "torchao"},
}
"""Name of a format -> what `export` is given."""
FORMATS = (HF, *STORED)


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
            hint="give it an entry of the space's list without structure; the others round what is left",
        )
    return found


def check_installed(names: Iterable[str], where: str) -> None:
    """Refuse what a library writes that is not installed.

    Raises:
        MissingExtraError: with what to install.
    """
    if TORCHAO in names:
        from secateur.formats.torchao import INSTALL, is_installed  # here, as it takes long to import

        if not is_installed():
            raise MissingExtraError(f"{where}: {TORCHAO} needs torchao", hint=INSTALL)


def unstored_folder(out: str, name: str) -> str:
    """Where the model of a trial is before it is written in its format: beside its own folder, or just there."""
    return out if name not in STORED else f"{out}-unpacked"


def export_command(model: str, out: str, name: str) -> str:
    """The command that stores a model so."""
    flags = [part for key, value in STORED[name].items()
             for part in ([f"--{key}"] if value is True else [f"--{key}", str(value)])]  # fmt: skip
    return shlex.join(["secateur", "export", model, "-o", out, *flags])
