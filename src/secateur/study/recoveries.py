"""Recoveries in the space of a study: none, or settings of `recover`"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.errors import StudyError, UnknownNameError, UsageError
from secateur.training import Training

NONE = "none"


def read_recoveries(data: Any, where: str) -> dict[str, Mapping[str, Any] | None]:
    """Label -> settings of `recover`; the label says what differs from the defaults.

    Raises:
        StudyError: for what is neither none nor settings, for settings that `recover` refuses, or one named twice.
        UnknownNameError: for an unknown setting; the nearest is suggested.
    """
    found: dict[str, Mapping[str, Any] | None] = {}
    for one in data if isinstance(data, list) else [data]:
        if one is None or one == NONE:
            label, fields = NONE, None
        elif isinstance(one, Mapping):
            fields = read_training(one, f"{where}: recovery")
            label = ", ".join(f"{key} {value}" for key, value in fields.items()) or "defaults"
        else:
            raise StudyError(
                f"{where}: recovery is {one!r}", hint="give none, or settings: {mode: full, tokens: 40960}"
            )
        if label in found:
            raise StudyError(f"{where}: recovery names one twice: {label}")
        found[label] = fields
    return found


def read_training(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings of `recover` as they were written, dashes in names as underscores.

    Raises:
        StudyError: for settings that `recover` refuses.
        UnknownNameError: for an unknown setting; the nearest is suggested.
    """
    fields = {str(key).replace("-", "_"): value for key, value in data.items()}
    try:
        Training.from_dict(fields)
    except TypeError as error:
        raise StudyError(f"{where} {dict(data)} has a value of a wrong kind: {error}") from None
    except UnknownNameError:
        raise
    except UsageError as error:
        raise StudyError(f"{where}: {error.message}", hint=error.hint) from None
    return fields
