"""What the space of a study can give at all, from the shapes and number formats in the checkpoint alone"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from secateur.checkpoint.reader import CheckpointReader
from secateur.engine.device import parse_dtype
from secateur.study.read import ACCURACY
from secateur.study.recoveries import NONE
from secateur.study.space import Space
from secateur.study.spec import StudySpec
from secateur.study.storing import STORED, TORCHAO
from secateur.study.values import Reach

HEADER = 1 << 20
"""Bytes of the headers of files, at most."""
ADDING = "adapter-moe"
"""The mode of `recover` that adds parameters."""


def reach_of(
    spec: StudySpec, reader: CheckpointReader, prunable: Mapping[str, int], sizes: Mapping[str, tuple[int, int]]
) -> dict[str, Reach]:
    """The least and the most of quantities that trials can have, of those of which that is known.

    Args:
        reader: of the dense model.
        prunable: checkpoint key -> number of weights of every prunable tensor.
        sizes: conversion by its name -> parameters of its result, at least and at most. Where that of one is missing,
            nothing is known of sizes.
    """
    found: dict[str, Reach] = {"sparsity": Reach(0.0, 1.0, ""), "accuracy": ACCURACY}
    pruning = [space for space in spec.spaces if not space.conversions]
    converting = [space for space in spec.spaces if space.conversions]
    if not {name for space in converting for name in space.conversions} <= {*sizes}:
        return found
    spans = [_pruned(pruning, reader, prunable)] if pruning else []
    spans += [_converted(space, reader, sizes) for space in converting]
    lessons = [fields for space in spec.spaces for fields in space.recoveries.values() if fields is not None]
    more = any(fields.get("mode") == ADDING for fields in lessons)
    for name in spans[0]:
        each = [span[name] for span in spans]
        high = math.inf if more else max(one.high for one in each)
        why = "; ".join(dict.fromkeys(one.why for one in each))
        found[name] = Reach(min(one.low for one in each), high, why)
    return found


def _pruned(
    spaces: Sequence[Space], reader: CheckpointReader, prunable: Mapping[str, int]
) -> dict[str, Reach]:  # fmt: skip
    infos = [reader.info(key) for key in reader.keys]
    numbers = [(info.numel, info.dtype) for info in infos if info.dtype.is_floating_point]
    total, single = sum(count for count, _ in numbers), sum(prunable.values())
    sizes = []
    for space in spaces:
        for name in space.dtypes:
            dtype = parse_dtype(name, "dtype")
            sizes.append(sum(count * (dtype or own).itemsize for count, own in numbers))
    structures = {name for space in spaces for name in space.structures}
    most = max(space.sparsities[1] for space in spaces)
    smallest = 1.0  # share of the parameters that stays at least; units are whole, so a little less may stay
    if structures != {NONE}:
        gone = total if any("hidden" in name for name in structures) else single
        smallest = max(0.0, 1 - 1.05 * most * gone / total)
    why = "number format and structures of the space; zeros alone make no file smaller"
    least = float(min(sizes))
    formats = {name for space in spaces for name in space.formats}
    if formats & {*STORED} - {TORCHAO}:
        least, why = total / 8, "a bit for every weight says where the zeros are"
    elif TORCHAO in formats:
        least, why = min(least, float(total)), "8 bits for every weight, and structures of the space"
    return {
        "bytes_disk": Reach(math.floor(least * smallest), max(sizes) + _integers(reader) + HEADER, why),
        "parameters": Reach(math.floor(total * smallest), total, "structures of the space"),
        "nonzero": Reach(max(0, math.floor(total - 1.05 * most * max(single, total * (1 - smallest)))), total,
                         "sparsities of the space"),
    }  # fmt: skip


def _converted(
    space: Space, reader: CheckpointReader, sizes: Mapping[str, tuple[int, int]]
) -> dict[str, Reach]:  # fmt: skip
    least = min(sizes[name][0] for name in space.conversions)
    most = max(sizes[name][1] for name in space.conversions)
    own = {reader.info(key).dtype for key in reader.keys if reader.info(key).dtype.is_floating_point}
    asked = {parse_dtype(name, "dtype") for name in space.dtypes}
    widths = {dtype.itemsize for dtype in (*(own if None in asked else ()), *(one for one in asked if one is not None))}
    why = "conversions of the space"
    return {
        "bytes_disk": Reach(least * min(widths), most * max(widths) + _integers(reader) + HEADER, why),
        "parameters": Reach(least, most, why),
        "nonzero": Reach(0, most, why),
    }


def _integers(reader: CheckpointReader) -> int:
    """Bytes of the tensors that are none of numbers with a point."""
    infos = [reader.info(key) for key in reader.keys]
    return sum(info.nbytes for info in infos if not info.dtype.is_floating_point)
