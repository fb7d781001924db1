"""Config entries that may say that a model has fewer blocks, the likeliest first; which of them do is tried later."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import transformers

from secateur.structured.entries import Entries, entries_of

_COUNTS = ("layers", "layer", "depth", "blocks", "num_hidden")
_LIMIT = 40
"""Candidates that are tried at most: each costs a model without weights."""


class Row:
    """One row of blocks: their numbers in the model, and which of them go."""

    def __init__(self, numbers: Sequence[int], gone: Collection[int]) -> None:
        self.total = len(numbers)
        self.kept = [place for place, number in enumerate(numbers) if number not in gone]
        """Places in the row that stay."""


def fewer_blocks(config: transformers.PreTrainedConfig, rows: Sequence[Row]) -> Iterator[Entries]:
    """Entries for the rows as they will be.

    Numbers of blocks, lists with an entry for every block or every row, lists and mappings of block numbers, and
    numbers that count the first blocks are changed; where a model has fewer of these than the config, only some are.
    """
    counts = list(_counts(config, rows))
    along = _along(config, rows)
    lists = {path: value for path, value in along.items() if path[-1] not in _numbers_of(config, rows)}
    tried: list[Entries] = []
    for base in counts:
        for made in ({**base, **along}, {**base, **lists}, base):
            if made and made not in tried and len(tried) < _LIMIT:
                tried.append(made)
                yield made


def _counts(config: Any, rows: Sequence[Row]) -> Iterator[Entries]:
    now = [row.total for row in rows]
    stay = [len(row.kept) for row in rows]
    name = dict(getattr(config, "attribute_map", {})).get("num_hidden_layers", "num_hidden_layers")
    if len(rows) == 1 and getattr(config, name, None) == now[0]:
        yield {(name,): stay[0]}
    becomes = {total: left for total, left in zip(now, stay, strict=True) if left < total}
    single: Entries = {}
    for path, value in entries_of(config):
        key = path[-1]
        if type(value) is int and value in becomes and key.endswith(_COUNTS) and "_per_" not in key:
            single[path] = becomes[value]
        elif isinstance(value, list) and value == now and len(rows) > 1:
            yield {path: stay}
    if single:
        yield single
    for path, value in single.items():
        yield {path: value}
    own = {path: value for path, value in single.items() if len(path) > 1}
    for part in dict.fromkeys(path[0] for path in own):
        yield {path: value for path, value in own.items() if path[0] == part}
    yield {}  # where lists alone say it


def _along(config: Any, rows: Sequence[Row]) -> Entries:
    """Entries with something for every block, or that number blocks, without those that go."""
    made: Entries = {}
    by_total = {row.total: row for row in rows if len(row.kept) < row.total}
    numbered = _numbers_of(config, rows)
    for path, value in entries_of(config):
        if isinstance(value, list) and len(value) in by_total and len(value) > 1 and value != [r.total for r in rows]:
            made[path] = [value[place] for place in by_total[len(value)].kept]
        elif path[-1] in ("out_features", "out_indices") and value:
            made[path] = None  # which stages a backbone gives out: by default the last one that there is
        elif path[-1] in numbered:
            made[path] = numbered[path[-1]]
        elif "per_layer" in path[-1] and isinstance(value, Mapping) and len(rows) == 1:
            kept = rows[0].kept
            made[path] = {
                type(key)(kept.index(int(key))): one for key, one in value.items()
                if str(key).isdigit() and int(key) in kept
            }  # fmt: skip
    return made


def _numbers_of(config: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """Keys of entries that number or count blocks of the one row, with their new values."""
    if len(rows) > 1:
        return {}
    total, kept = rows[0].total, rows[0].kept
    made: dict[str, Any] = {}
    for path, value in entries_of(config):
        key = path[-1]
        if isinstance(value, list) and len(value) != total and "layer" in key and value:
            if all(type(i) is int and 0 <= i < total for i in value):
                made[key] = [kept.index(i) for i in value if i in kept]
        elif type(value) is int and 0 < value < total and any(word in key for word in ("first_", "dense_layers")):
            made[key] = sum(place < value for place in kept)
    return made
