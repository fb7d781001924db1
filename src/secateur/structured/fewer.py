"""Config entries that may say that a model has fewer blocks, the likeliest first; which of them do is tried later."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import transformers

from secateur.engine.entries import Entries, entries_of

_COUNTS = ("layers", "layer", "depth", "blocks", "num_hidden")
_STAGES = ("depths", "layers", "blocks", "block_sizes")
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
    likely = [made for base in counts for made in ({**base, **along}, {**base, **lists}, base)]
    scaled = [{**base, **along, **scale} for base in counts[:1] for scale in _scales(config, rows)]
    tried: list[Entries] = []
    for made in [*likely, *scaled]:
        if made and made not in tried and len(tried) < _LIMIT:
            tried.append(made)
            yield made


def _scales(config: Any, rows: Sequence[Row]) -> Iterator[Entries]:
    """A factor that the code divides by the number of blocks, or by its root, so that what comes of it stays."""
    if len(rows) > 1:
        return
    share = len(rows[0].kept) / rows[0].total
    for path, value in entries_of(config):
        if type(value) in (int, float) and value and any(word in path[-1] for word in ("scale", "multiplier")):
            yield from ({path: value * factor} for factor in (math.sqrt(share), share))


def _counts(config: Any, rows: Sequence[Row]) -> Iterator[Entries]:
    now = [row.total for row in rows]
    stay = [len(row.kept) for row in rows]
    name = dict(getattr(config, "attribute_map", {})).get("num_hidden_layers", "num_hidden_layers")
    if len(rows) == 1 and getattr(config, name, None) == now[0]:
        yield {(name,): stay[0]}
    becomes = {total: left for total, left in zip(now, stay, strict=True) if left < total}
    single: Entries = {}
    lists: list[Entries] = []
    for path, value in entries_of(config):
        key = path[-1]
        if type(value) is int and value in becomes and key.endswith(_COUNTS) and "_per_" not in key:
            single[path] = becomes[value]
        elif isinstance(value, list | tuple) and len(value) > 1 and key.endswith(_STAGES):
            # Numbers of all rows, or of some: an encoder's stages without the decoder behind them.
            starts = [i for i in range(len(now) - len(value) + 1) if now[i : i + len(value)] == list(value)]
            lists += [{path: stay[i : i + len(value)]} for i in starts]
    if single:
        yield single
    for entries in lists:
        yield entries
        yield {**single, **entries}
    for path, value in single.items():
        yield {path: value}
    own = {path: value for path, value in single.items() if len(path) > 1}
    for part in dict.fromkeys(path[0] for path in own):
        yield {path: value for path, value in own.items() if path[0] == part}
    for left in own if len(own) > 2 else ():  # such as a tower that the data does not reach
        yield {path: value for path, value in own.items() if path != left}
    yield {}  # where lists alone say it


def _along(config: Any, rows: Sequence[Row]) -> Entries:
    """Entries with something for every block, or that number blocks, without those that go."""
    made: Entries = {}
    by_total = {row.total: row for row in rows if len(row.kept) < row.total}
    numbered = _numbers_of(config, rows)
    for path, value in entries_of(config):
        if for_every_block(path[-1], value, list(by_total)) and (len(rows) == 1 or len(value) != len(rows)):
            made[path] = [value[place] for place in by_total[len(value)].kept]
        elif path[-1] in ("out_features", "out_indices") and value and len(rows) == 1:
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


def for_every_block(key: str, value: Any, totals: Collection[int]) -> bool:
    """Whether an entry may be a list with something for every block: of two or three it could be anything else."""
    if not isinstance(value, list | tuple) or len(value) not in totals:
        return False
    return len(value) > 3 or (len(value) > 1 and any(word in key for word in ("layer", "block", "type", "pattern")))


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
