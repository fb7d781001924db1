"""The entries of a config and of the configs in it, by key path, and copies with other values."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import transformers

Entries = dict[tuple[str, ...], Any]
"""Key path in the config -> value."""


def entries_of(config: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All entries of a config and of the configs in it, with their key paths."""
    parts = [name for name, value in vars(config).items() if isinstance(value, transformers.PreTrainedConfig)]
    for key, value in config.to_dict().items():
        if key not in parts:
            yield (key,), value
    for name in parts:
        for path, value in entries_of(getattr(config, name)):
            yield (name, *path), value


def changed(config: transformers.PreTrainedConfig, changes: Mapping[tuple[str, ...], Any]) -> Any:
    """A copy of a config with entries replaced, made the way a file with these entries would be read."""
    if not changes:
        return copy.deepcopy(config)
    return type(config).from_dict(apply_changes(config.to_dict(), changes))


def apply_changes(data: Mapping[str, Any], changes: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """A copy of plain config data with entries replaced or added."""
    made = copy.deepcopy(dict(data))
    for path, value in changes.items():
        place = made
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
    return made


def as_spelled(
    changes: Mapping[tuple[str, ...], Any], config: transformers.PreTrainedConfig, data: Mapping[str, Any]
) -> dict[tuple[str, ...], Any]:
    """Changes under the names that a config file uses: a class may know an entry by several (``attribute_map``).

    Args:
        config: as the class read it.
        data: the plain data of the file.
    """
    made: dict[tuple[str, ...], Any] = {}
    for path, value in changes.items():
        part: Any = config
        place: Any = data
        for key in path[:-1]:
            part, place = getattr(part, key, None), place.get(key, {}) if isinstance(place, Mapping) else {}
        names = [alias for alias, real in dict(getattr(part, "attribute_map", {})).items() if real == path[-1]]
        used = [name for name in (path[-1], *names) if name in place] or [path[-1]]
        made |= {(*path[:-1], name): value for name in used}
    return made


def part_of(config: Any) -> tuple[Any, tuple[str, ...]]:
    """The part of the config that describes the blocks, and where it stands in the whole."""
    text = config.get_text_config()
    if text is config:
        return config, ()
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is text:
            return text, (name,)
    return config, ()
