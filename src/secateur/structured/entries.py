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
