"""One .gguf file for llama.cpp and what is built on it: weights, dimensions and tokenizer, quantised when asked for.

Families: Llama, Mistral, Qwen 2, Qwen 3, Gemma 3 (text), Phi-3, SmolLM 3. Norms, biases and other vectors stay in
float32. In the 4- and 5-bit formats the embedding and the output matrix are stored as q8_0. Zeros stay exactly zero in
f32, f16, bf16, q8_0, q4_0 and q5_0; q4_1 and q5_1 have no exact zero in many blocks, and the run says how many were
lost. A .gguf file stores every zero: a pruned model makes a file no smaller than the dense one, unless whole blocks,
heads or units were removed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from secateur.checkpoint.check import check_model_folder, hash_folder
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.source import Source
from secateur.errors import OutputError, VerificationError, WeightValueError
from secateur.formats._gguf_families import FAMILIES as FAMILIES
from secateur.formats._gguf_families import Facts, facts_of, family_of, sizes_of
from secateur.formats._gguf_tensors import Array, Planned, allowed_error, kind_of, plan_tensors
from secateur.formats._gguf_vocabulary import load_tokenizer, vocabulary_facts
from secateur.progress import Reporter

_LARGEST_HALF = 65504.0
_SOURCE = "secateur.source.sha256"


@dataclass(frozen=True, kw_only=True)
class GGUF:
    """Options of the format."""

    name: ClassVar[str] = "gguf"
    suffix: ClassVar[str] = ".gguf"
    reads_packed: ClassVar[bool] = False
    quantize: str = "f16"
    """How matrices are stored: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0."""

    def __post_init__(self) -> None:
        kind_of(self.quantize)

    def plan(self, source: Source, reporter: Reporter) -> GGUFPlan:
        """Work out everything the file will hold, but for the numbers.

        Raises:
            UnsupportedModelError: for a family without a mapping, or a model of one that llama.cpp cannot run.
            CheckpointError: when the weights are not those that the config describes.
            WeightValueError: for weights that are not finite, or too large for the format.
        """
        from transformers import AutoConfig

        check_model_folder(source.folder)
        config = AutoConfig.from_pretrained(source.folder, local_files_only=True)
        family = family_of(config, source.name)
        kind, sizes = kind_of(self.quantize), sizes_of(config)
        facts, computed = facts_of(config, family, reporter)
        facts |= vocabulary_facts(load_tokenizer(source.folder), sizes.vocabulary, reporter)
        facts |= _general(source, kind)
        with CheckpointReader(source.folder) as reader:
            tied = bool(config.tie_word_embeddings)
            tensors = plan_tensors(reader, family, sizes, kind, computed, tied=tied, reporter=reporter)
            _check_values(reader, tensors, reporter)
        return GGUFPlan(source.folder, family.architecture, facts, tensors)


@dataclass
class GGUFPlan:
    """What a file will hold."""

    folder: Path
    architecture: str
    facts: Facts
    tensors: list[Planned]
    nbytes: int = field(init=False)
    source_sha256: str = field(init=False)

    def __post_init__(self) -> None:
        self.source_sha256 = str(self.facts[_SOURCE])
        texts = (text for value in self.facts.values() if isinstance(value, list) for text in value)
        described = sum(len(text.encode()) + 8 if isinstance(text, str) else 8 for text in texts)
        self.nbytes = sum(one.nbytes + 256 for one in self.tensors) + described + (1 << 16)

    def write(self, path: Path, reporter: Reporter) -> dict[str, Any]:
        """Write the file, one tensor in memory at a time.

        Raises:
            OutputError: when the disk does not take it.
        """
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, value in self.facts.items():
            _add(writer, key, value)
        for one in self.tensors:
            writer.add_tensor_info(one.name, one.stored_shape, np.dtype(np.uint8), one.nbytes, one.kind)
        zeros = lost = 0
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            reporter.stage("write GGUF", len(self.tensors))
            with CheckpointReader(self.folder) as reader:
                for one in self.tensors:
                    values = one.original(reader)
                    stored = gguf.quantize(values, one.kind)
                    writer.write_tensor_data(stored.view(np.uint8))
                    if len(one.shape) > 1:
                        zeros += int(np.count_nonzero(values == 0))
                        lost += _lost(values, stored, one.kind)
                    reporter.advance(one.name)
            writer.flush()
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}", hint="check the disk") from error
        finally:
            writer.close()
        if lost:
            reporter.warn(
                f"{lost:,} of {zeros:,} zeros are no longer zero: the blocks of this quantisation have no exact zero; "
                "q8_0, q5_0 and q4_0 keep them"
            )
        kinds = Counter(one.kind.name.lower() for one in self.tensors)
        return {"tensors": dict(kinds), "zeros": zeros, "zeros_lost": lost}

    def check(self, path: Path, reporter: Reporter) -> dict[str, Any]:
        """Read the file back: every key, every tensor's place and shape, and every number against the folder's.

        Raises:
            VerificationError: naming the first thing that differs.
        """
        reader = _reopen(path)
        for key, value in self.facts.items():
            found = reader.fields.get(key)
            if found is None or not _equal(found.contents(), value):
                raise VerificationError(f"{path}: {key} is not what was written")
        stored = {tensor.name: tensor for tensor in reader.tensors}
        if list(stored) != [one.name for one in self.tensors]:
            raise VerificationError(f"{path} does not hold the tensors that were written")
        worst: dict[str, float] = {}
        reporter.stage("read back", len(self.tensors))
        with CheckpointReader(self.folder) as source:
            for one in self.tensors:
                tensor = stored[one.name]
                if tuple(int(size) for size in reversed(tensor.shape)) != one.shape or tensor.tensor_type != one.kind:
                    raise VerificationError(f"{path}: {one.name} has another shape or number format than was written")
                error = _compare(path, one, one.original(source), values_of(path, tensor))
                name = one.kind.name.lower()
                worst[name] = max(worst.get(name, 0.0), error)
                reporter.advance(one.name)
        return {"keys": len(self.facts), "tensors": len(self.tensors), "largest_difference": worst}


def values_of(path: Path, tensor: Any) -> Array:
    """The numbers of one tensor of a reader, in float32, in memory of their own, not in pages of the file."""
    data = np.fromfile(path, tensor.data.dtype, tensor.data.size, offset=int(tensor.data_offset))
    return np.asarray(gguf.dequantize(data.reshape(tensor.data.shape), tensor.tensor_type), dtype=np.float32)


def _reopen(path: Path) -> Any:
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the reader checks nothing: any error in it means a bad file
        raise VerificationError(f"{path} cannot be read back: {str(error) or type(error).__name__}") from error


def _general(source: Source, kind: Kind) -> Facts:
    """Keys about the file as a whole; the hash tells from which weights it was made."""
    mostly = {Kind.F32: "ALL_F32"}.get(kind, f"MOSTLY_{kind.name}")
    return {
        "general.type": "model",
        "general.name": source.name,
        "general.file_type": int(gguf.LlamaFileType[mostly]),
        "general.quantization_version": int(gguf.GGML_QUANT_VERSION),
        _SOURCE: hash_folder(source.folder),
    }


def _check_values(reader: CheckpointReader, tensors: list[Planned], reporter: Reporter) -> None:
    """Refuse weights that are not finite, or that become infinite in float16."""
    reporter.stage("check weights", len(tensors))
    for one in tensors:
        if one.key:
            largest = max((float(chunk.abs().max()) for chunk in reader.chunks(one.key)), default=0.0)
            if not np.isfinite(largest):
                raise WeightValueError(
                    f"{one.key} has NaN or infinite weights",
                    hint="the model is broken; download it again, or use another checkpoint of it",
                )
            if one.kind == Kind.F16 and largest > _LARGEST_HALF:
                raise WeightValueError(
                    f"{one.key} holds {largest:g}, too large for f16", hint="use --quantize bf16 or f32"
                )
        reporter.advance(one.name)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _equal(found: Any, value: Any) -> bool:
    if isinstance(value, float) or (isinstance(value, list) and value and isinstance(value[0], float)):
        return bool(np.array_equal(np.asarray(found, np.float32), np.asarray(value, np.float32)))
    return bool(found == value)


def _lost(values: Array, stored: Array, kind: Kind) -> int:
    """Zeros that are no longer zero. Only formats with an offset can lose one."""
    if kind not in (Kind.Q4_1, Kind.Q5_1):
        return 0
    return int(np.count_nonzero((values == 0) & (gguf.dequantize(stored, kind) != 0)))


def _compare(path: Path, one: Planned, wanted: Array, found: Array) -> float:
    """The largest difference, which must be one that rounding to the format makes."""
    difference = np.abs(wanted - found)
    if one.kind == Kind.F32:
        wrong = wanted != found
    elif one.kind in (Kind.F16, Kind.BF16):
        narrow = torch.float16 if one.kind == Kind.F16 else torch.bfloat16
        wrong = torch.from_numpy(wanted).to(narrow).float().numpy() != found
    else:
        wrong = ~(difference <= allowed_error(wanted, one.kind))  # also when it is NaN
    if wrong.any():
        place = tuple(int(index[0]) for index in np.nonzero(wrong))
        raise VerificationError(
            f"{path}: {one.name} at {list(place)} is {found[place]:g}, the folder's {one.key} is {wanted[place]:g}",
            hint="the file was changed or damaged; make it again",
        )
    return float(difference.max(initial=0.0))
