"""Values of a study file brought to their kinds, or refused by name"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.errors import StudyError, UnknownNameError


def known(data: Mapping[str, Any], names: Sequence[str], where: str) -> dict[str, Any]:
    """Values by name, all of which are known; dashes in a name are underscores.

    Raises:
        UnknownNameError: for another name; the nearest is suggested.
    """
    found = {str(key).replace("-", "_"): value for key, value in data.items()}
    for key in found:
        if key not in names:
            raise UnknownNameError(f"key of {where}", key, names)
    return found


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """Keys and values; nothing is an empty mapping.

    Raises:
        StudyError: for anything else.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise StudyError(f"{where} is {value!r}", hint="give keys and values")
    return {str(key): one for key, one in value.items()}


def several(value: Any, where: str) -> list[Any]:
    """A list of values; a text alone is a list of one.

    Raises:
        StudyError: for anything else.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise StudyError(f"{where} is {value!r}", hint="give a list")
    return value


def text(value: Any, where: str) -> str:
    """A text that is not empty.

    Raises:
        StudyError: for anything else.
    """
    if not isinstance(value, str) or not value:
        raise StudyError(f"{where} is {value!r}", hint="it must be a text")
    return value


def whole(value: Any, where: str, least: int) -> int:
    """A whole number that is large enough.

    Raises:
        StudyError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise StudyError(f"{where} is {value!r}", hint=f"it must be a whole number, at least {least}")
    return value


def positive(value: Any, where: str) -> float:
    """A number above zero.

    Raises:
        StudyError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise StudyError(f"{where} is {value!r}", hint="it must be a number, more than 0")
    return float(value)


def full_path(text: str, folder: Path) -> str:
    """A file or folder beside the study file as a full path; any other name as it is."""
    if text in ("builtin", "demo", "demo-encoder"):
        return text
    try:
        path = folder / Path(text).expanduser()
        return str(path.resolve()) if path.exists() else text
    except OSError:
        return text
