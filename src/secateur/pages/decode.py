"""Plain data back into the dataclass that it was written from, every value of the type that the field says.

A page is made of files that others wrote: what passes here is safe to compute with. Keys that the class does not know
are passed over, so that a later version may add some.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from secateur.errors import UsageError
from secateur.result import SCHEMA_VERSION

T = TypeVar("T")


def read_json(path: Path) -> dict[str, Any]:
    """The one object of a JSON file.

    Raises:
        UsageError: when the file cannot be read, is cut off or no JSON, holds something else than an object, a number
            that is not finite, or a result of a later version than this one.
    """
    try:
        data = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_not_finite, parse_float=_finite)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", hint="check the path") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text", hint=EXPECTED) from None
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path} is not whole JSON: {error.msg}, line {error.lineno} column {error.colno}",
            hint="it may be cut off; write it again",
        ) from None
    except RecursionError:
        raise UsageError(f"{path} is nested too deeply", hint=EXPECTED) from None
    except ValueError as error:
        raise UsageError(f"{path} holds {error}", hint="a result of secateur holds finite numbers only") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds a JSON {type(data).__name__}, not an object", hint=EXPECTED)
    version = data.get("schema_version")
    if isinstance(version, bool) or not isinstance(version, int):
        raise UsageError(f"{path} has no schema_version: it is no result of secateur", hint=EXPECTED)
    if version > SCHEMA_VERSION:
        raise UsageError(
            f"{path} has schema version {version}, this secateur knows {SCHEMA_VERSION}", hint="use a newer secateur"
        )
    return data


EXPECTED = (
    "give folders that prune or recover wrote, files of `secateur study` or `secateur allocate`, or of "
    "`secateur bench --json`"
)


def _not_finite(text: str) -> float:
    raise ValueError(f"the number {text}")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _not_finite(text)


def decode(cls: type[T], data: Any, where: str) -> T:
    """An instance of a dataclass from plain data.

    Raises:
        UsageError: naming the first value that is missing or of another type.
    """
    if not isinstance(data, dict):
        raise _wrong(where, data, "an object")
    hints = typing.get_type_hints(cls)
    values = {}
    for entry in dataclasses.fields(cls):  # type: ignore[arg-type]
        if entry.name in data:
            values[entry.name] = _value(hints[entry.name], data[entry.name], f"{where}: {entry.name}")
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise UsageError(f"{where}: {entry.name} is missing", hint="the file is damaged, or no result of secateur")
    return cls(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _one_of(parts, value, where)
    if origin is typing.Literal:
        if value not in parts:
            raise _wrong(where, value, " or ".join(map(str, parts)))
        return value
    if origin is list:
        if not isinstance(value, list):
            raise _wrong(where, value, "a list")
        return [_value(parts[0], item, f"{where}[{number}]") for number, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(where, value, "an object")
        return {key: _value(parts[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return decode(typing.cast("type[Any]", hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise _wrong(where, value, {str: "a text", bool: "true or false"}.get(hint, "a number"))
    return value


def _one_of(parts: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in parts:
        return None
    errors = []
    for part in parts:
        if part is not type(None):
            try:
                return _value(part, value, where)
            except UsageError as error:
                errors.append(error)
    raise errors[0]


def _wrong(where: str, value: Any, wanted: str) -> UsageError:
    told = json.dumps(value, default=str)
    told = told if len(told) <= 40 else told[:37] + "..."
    return UsageError(f"{where} is {told}", hint=f"it must be {wanted}")
