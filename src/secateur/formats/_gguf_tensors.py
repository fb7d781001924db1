"""The tensors of a .gguf file: where each comes from, how its rows are ordered, in which format it is stored.

Formats and their rounding are those of the gguf library. What a stored number may be away from its original is computed
here once more, from the format's definition, so that reading a file back compares two independent things.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from secateur.checkpoint.reader import CheckpointReader
from secateur.errors import CheckpointError, UnknownNameError, UnsupportedModelError
from secateur.formats._gguf_families import Family, Sizes, expected_shapes
from secateur.progress import Reporter

Array = np.ndarray[Any, Any]
QUANTISATIONS = {
    "f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0, "q5_1": Kind.Q5_1, "q5_0": Kind.Q5_0,
    "q4_1": Kind.Q4_1, "q4_0": Kind.Q4_0,
}  # fmt: skip
"""Name of a quantisation -> how matrices are stored."""
_FEW_BITS = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1)
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")  # older checkpoints hold what the model computes itself


@dataclass(frozen=True)
class Planned:
    """One tensor of the file. ``shape`` is (rows, columns) or (numbers,), as in the checkpoint."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    key: str = ""
    """Checkpoint key; empty for ``values`` that are computed."""
    heads: int = 0
    """Within each of so many heads, rows change from two halves to neighbours; 0 leaves them in place."""
    shift: float = 0.0
    values: tuple[float, ...] = ()

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in bytes, as the gguf library wants it."""
        return tuple(gguf.quant_shape_to_byte_shape(self.shape, self.kind))

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.stored_shape, dtype=np.int64))

    def original(self, reader: CheckpointReader) -> Array:
        """The numbers in float32, in the file's order."""
        if not self.key:
            return np.asarray(self.values, dtype=np.float32)
        values = reader.tensor(self.key).float()
        if self.shift:
            values += self.shift
        return _neighbours(values, self.heads).numpy()

    def restore(self, values: Array) -> torch.Tensor:
        """Numbers of the file in the order and meaning of the checkpoint."""
        tensor = torch.from_numpy(np.ascontiguousarray(values)).reshape(self.shape)
        return _halves(tensor, self.heads) - self.shift


def _neighbours(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows 0, h/2, 1, h/2 + 1 ... of each head: what was turned together half a head apart lies side by side."""
    if not heads:
        return values
    rows = values.shape[0]
    return values.reshape(heads, 2, rows // heads // 2, -1).transpose(1, 2).reshape(values.shape).contiguous()


def _halves(values: torch.Tensor, heads: int) -> torch.Tensor:
    if not heads:
        return values
    rows = values.shape[0]
    return values.reshape(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(values.shape).contiguous()


def kind_of(quantize: str) -> Kind:
    """How matrices are stored.

    Raises:
        UnknownNameError: for a name that is no quantisation.
    """
    if quantize.lower() not in QUANTISATIONS:
        raise UnknownNameError("quantisation", quantize, QUANTISATIONS)
    return QUANTISATIONS[quantize.lower()]


def plan_tensors(
    reader: CheckpointReader, family: Family, sizes: Sizes, kind: Kind, computed: Mapping[str, list[float]], *,
    tied: bool, reporter: Reporter,
) -> list[Planned]:  # fmt: skip
    """Every tensor of the file, in the order in which they are written.

    Raises:
        UnsupportedModelError: for a tensor that llama.cpp has no place for.
        CheckpointError: for a missing tensor, or one whose shape is not what the config says.
    """
    architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = gguf.get_tensor_name_map(architecture, sizes.blocks)
    shapes = expected_shapes(sizes)
    if family.architecture == "phi3":
        shapes["ffn_up.weight"] = (2 * sizes.inner, sizes.hidden)
    planned = [
        Planned(name, (len(values),), Kind.F32, values=tuple(values)) for name, values in computed.items()
    ]  # fmt: skip
    for key in reader.keys:
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if _COMPUTED.search(key) or (tied and name == "output.weight"):
            continue
        local = re.sub(r"^blk\.\d+\.", "", name or "")
        shape = reader.info(key).shape
        if local not in shapes:
            raise UnsupportedModelError(
                f"llama.cpp has no place for tensor {key} in a model of its architecture '{family.architecture}'",
                hint="the model was changed in a way that this family cannot express",
            )
        if shape != shapes[local]:
            raise CheckpointError(
                f"{key} has shape {list(shape)}, the config says {list(shapes[local])}",
                hint="llama.cpp reads one size for all blocks; export a model whose blocks are alike",
            )
        heads = {"attn_q": sizes.heads, "attn_k": sizes.groups}.get(local.partition(".")[0], 0)
        shift = family.norm_shift if local.endswith("norm.weight") else 0.0
        planned.append(
            Planned(str(name), shape, _stored(local, shape, kind), key, heads if family.interleaved else 0, shift)
        )
    _check_whole(planned, sizes, tied=tied)
    odd = [one for one in planned if len(one.shape) > 1 and kind not in (Kind.F32, one.kind) and one.kind == Kind.F16]
    if odd:
        block = gguf.GGML_QUANT_SIZES[kind][0]
        reporter.warn(
            f"{len(odd)} matrices are stored as f16: their rows are no multiple of the {block} numbers of a "
            f"{kind.name.lower()} block (the first is {odd[0].key}, {odd[0].shape[-1]} columns)"
        )
    return planned


def _stored(local: str, shape: tuple[int, ...], kind: Kind) -> Kind:
    if len(shape) < 2:
        return Kind.F32
    if kind in _FEW_BITS and local in ("token_embd.weight", "output.weight"):
        kind = Kind.Q8_0  # they cost little there and the most quality, so llama.cpp's own tool spares them too
    return kind if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Kind.F16


def _check_whole(planned: list[Planned], sizes: Sizes, *, tied: bool) -> None:
    """Every block must have the tensors of the first, and the three outside the blocks must be there."""
    names = {one.name for one in planned}
    first = {name.removeprefix("blk.0.") for name in names if name.startswith("blk.0.")}
    wanted = {f"blk.{i}.{local}" for i in range(sizes.blocks) for local in first}
    wanted |= {"token_embd.weight", "output_norm.weight"} | (set() if tied else {"output.weight"})
    missing = sorted(wanted - names) if first else ["blk.0"]
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} tensors, the first is the one llama.cpp calls {missing[0]}",
            hint="config.json and the weights are of different models; get the model again",
        )


def allowed_error(values: Array, kind: Kind) -> Array:
    """How far a stored number may be from each of ``values`` (rows, columns).

    The distance to the nearest number that the format can hold, plus what rounding scale and offset to float16 adds.
    """
    blocks = values.astype(np.float64).reshape(-1, gguf.GGML_QUANT_SIZES[kind][0])
    low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
    largest = np.maximum(-low, high)
    if kind == Kind.Q8_0:
        first, last, steps, offset = -127, 127, [largest / 127], np.zeros_like(low)
    elif kind in (Kind.Q4_1, Kind.Q5_1):
        first, last = 0, 15 if kind == Kind.Q4_1 else 31
        steps, offset = [(high - low) / last], low
    else:  # the number of largest size gets the lowest code; when both ends are of that size, either may
        first, last = (-8, 7) if kind == Kind.Q4_0 else (-16, 15)
        offset = np.zeros_like(low)
        steps = [np.where(-low >= high, low, high) / first, np.where(high >= -low, high, low) / first]
    distance = np.zeros_like(blocks)
    for step in steps:
        code = np.divide(blocks - offset, step, out=np.zeros_like(blocks), where=step != 0).round().clip(first, last)
        distance = np.maximum(distance, np.abs(blocks - (code * step + offset)))
    rounding = largest * 2.0**-10 + np.abs(steps[0]) * 0.01
    rounding += 2.0**-25 * max(abs(first), last)  # float16 has no numbers between 0 and 2^-24
    allowed: Array = (distance + rounding).reshape(values.shape)
    return allowed
