"""One row of `secateur bench`: a model in one runtime and number format, what it is made of, and how it is opened."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers

from secateur.bench_result import Quantities
from secateur.checkpoint.check import read_config
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.source import Source, open_source
from secateur.checkpoint.unpacked import dtype_of, open_reader
from secateur.corpus.load import Text
from secateur.corpus.windows import windows
from secateur.engine.binding import Binding
from secateur.engine.blocks import find_structure
from secateur.engine.skeleton import build_skeleton
from secateur.errors import CalibrationError, SecateurError, UnsupportedModelError, UsageError
from secateur.formats.gguf import GGUF, GGUFPlan, values_of
from secateur.formats.torchao import TorchAO
from secateur.measure.compare import Worker
from secateur.measure.flops import count_flops
from secateur.measure.in_turn import Contender
from secateur.measure.llama_cpp import LlamaCpp
from secateur.measure.model import load_model
from secateur.measure.per_byte import Passages, PerByte, of_passages, of_windows, passages
from secateur.measure.perplexity import perplexity
from secateur.measure.size import measure_size
from secateur.packing.header import header_of
from secateur.progress import Reporter
from secateur.result import RESULT_FILE
from secateur.runtime import kernels
from secateur.verbs.calibration import load_tokenizer, maximum_length
from secateur.verbs.evaluate import has_language_head, perplexity_protocol
from secateur.verbs.inspect import zeros_of_matrices

QUANTISED = ("q8_0", "q4_0")
"""Formats of llama.cpp that the dense model is compared in: 8 and 4 bits, with a scale for every 32 numbers."""
INT8 = "torchao int8"
"""What a model that llama.cpp does not know is compared in."""
QUALITIES = ("perplexity", "bits_per_byte")
"""What is measured on a text."""


@dataclass
class Entry:
    """A model in one runtime and format."""

    name: str
    source: Source
    """The folder it is, or was made from."""
    format: str
    """Number format of the weights."""
    dtype: str = ""
    """Number format that transformers computes in, where that is another: packed weights have no such format."""
    file: Path | None = None
    """The ``.gguf`` file, for llama.cpp."""
    plan: GGUFPlan | None = None
    rounded: Path | None = None
    """The folder of torchao that it runs from."""
    quantities: Quantities = field(init=False)
    protocol: str = ""
    """Of the perplexity."""
    counted: str = ""
    """How operations were counted."""
    by_window: tuple[float, ...] = ()
    """Nats per token in each window of the text."""
    by_passage: tuple[float, ...] = ()
    """Bits per byte in each of the same."""

    def __post_init__(self) -> None:
        self.quantities = Quantities(self.name, "llama.cpp" if self.file else "transformers", self.format)
        self._skeleton = build_skeleton(self.source.folder)

    @property
    def packed(self) -> bool:
        """Whether it is in the sparse format."""
        return bool(self.dtype)

    @property
    def decodes(self) -> bool:
        """Whether it goes on token by token."""
        return self._skeleton.can_generate() and not self._skeleton.config.is_encoder_decoder

    @property
    def longest(self) -> int:
        """Most tokens of a text."""
        return maximum_length(self._skeleton) or 1 << 20

    @property
    def vocabulary(self) -> int:
        """Number of tokens it knows."""
        embedding = self._skeleton.get_input_embeddings()
        return int(embedding.weight.shape[0]) if hasattr(embedding, "weight") else 0

    def cuts_like(self, other: Entry) -> bool:
        """Whether two models have one vocabulary, so that their perplexities can be compared."""
        if self.source.folder == other.source.folder:
            return True
        try:
            ours, theirs = (load_tokenizer(one.source.folder).get_vocab() for one in (self, other))
        except SecateurError:
            return self.vocabulary == other.vocabulary
        return bool(ours == theirs)

    def tokens_of(self, text: str, count: int) -> list[int]:
        """The first tokens of a text; fewer where it has fewer, none where the model has no tokenizer."""
        try:
            tokenizer = load_tokenizer(self.source.folder)
        except SecateurError:
            return []
        return list(tokenizer(text[: 40 * count], add_special_tokens=False)["input_ids"])[:count]

    def look(self, context: int, reporter: Reporter) -> None:
        """Count parameters, zeros, bytes and operations.

        Raises:
            UnsupportedModelError: for a model that takes no row of tokens.
        """
        if self._skeleton.config.is_encoder_decoder or not self.vocabulary:
            raise UnsupportedModelError(
                f"{self.name}: {type(self._skeleton).__name__} takes no row of tokens",
                hint="bench measures text models",
            )
        row, folder = self.quantities, self.source.folder
        size = measure_size(folder)
        row.parameters, row.nonzero = size.parameters, size.nonzero
        if self.file is not None:
            row.bytes_disk = self.file.stat().st_size
        elif self.rounded is not None:
            row.bytes_disk = sum(path.stat().st_size for path in self.rounded.glob("*.safetensors"))
        elif self.packed:
            row.bytes_disk = size.bytes_disk
        else:
            same = self.format == size.dtype
            row.bytes_disk = size.bytes_disk if same else size.bytes_as(getattr(torch, self.format))
        try:
            structure = find_structure(self._skeleton)
            with open_reader(folder) as reader:
                counts = zeros_of_matrices(structure, Binding(self._skeleton, reader.keys), reader, size.zeros)
            shares = {matrix.name: counts[matrix.name] / matrix.size for matrix in structure.matrices}
            flops = count_flops(self._skeleton, shares, context=min(context, self.longest - 1))
        except UnsupportedModelError as error:
            row.missing |= dict.fromkeys(("flops_per_token", "sparse_flops_per_token"), error.message)
            reporter.note(f"operations of {self.name} were not counted: {error.message}")
        else:
            row.flops_per_token, row.sparse_flops_per_token = flops.per_token, flops.sparse_per_token
            self.counted = flops.protocol

    def measure_quality(
        self, text: Text, length: int, count: int, device: torch.device, reporter: Reporter
    ) -> Passages | None:
        """Perplexity of a text; of a file of llama.cpp, with the numbers it holds, computed in float32.

        Returns:
            The passages it was measured on, where the tokenizer knows them and there is a perplexity.
        """
        row = self.quantities
        if not has_language_head(self._skeleton):
            why = f"{type(self._skeleton).__name__} has no language-model head"
            row.missing |= dict.fromkeys(QUALITIES, why)
            return None
        try:
            tokenizer = load_tokenizer(self.source.folder)
            cut = windows(text.text, tokenizer, length, None)[:count]
            found = perplexity(self._running(device), cut, reporter=reporter)
        except SecateurError as error:
            row.missing |= dict.fromkeys(QUALITIES, error.message)
            reporter.warn(f"perplexity of {self.name} as {self.format} was not measured: {error.message}")
            return None
        row.perplexity, self.by_window = found.perplexity, found.by_window
        if found.perplexity is None:
            row.missing["perplexity"] = f"it is beyond the largest number ({found.nll_per_token:.0f} nats per token)"
        self.protocol = perplexity_protocol(text.origin, cut)
        try:
            known = passages(text.text, tokenizer, length, len(cut))
        except SecateurError as error:
            row.missing["bits_per_byte"] = error.message
            return None
        self._take(of_windows(found.by_window, length, known))
        return known

    def measure_passages(self, found: Passages | None, device: torch.device, reporter: Reporter) -> None:
        """Bits per byte of the passages that the windows of another vocabulary were; None where they are not known."""
        row = self.quantities
        try:
            if found is None or not has_language_head(self._skeleton):
                raise CalibrationError("the passages are not known, or it has no language-model head")
            tokenizer = load_tokenizer(self.source.folder)
            self._take(
                of_passages(self._running(device), tokenizer, found.texts, longest=self.longest, reporter=reporter)
            )
        except SecateurError as error:
            row.missing["bits_per_byte"] = error.message
            reporter.warn(f"bits per byte of {self.name} as {self.format} were not measured: {error.message}")

    def _take(self, found: PerByte) -> None:
        self.by_passage = found.by_passage
        self.quantities.bits_per_byte = found.bits_per_byte

    def _running(self, device: torch.device) -> transformers.PreTrainedModel:
        if self.file is not None:
            return self.float32_model(device.type)
        if self.rounded is not None:
            return load_model(self.rounded, device=device.type)
        return load_model(self.source.folder, device=device.type, dtype=self.dtype or self.format)

    def float32_model(self, device: str) -> transformers.PreTrainedModel:
        """The model in transformers, with the numbers of the file where there is one."""
        model = load_model(self.source.folder, device=device, dtype="float32")
        if self.file is not None and self.plan is not None:
            _take_numbers(model, self.file, self.plan)
        return model

    def find_kernels(self, device: str) -> None:
        """Note by which kernels packed weights are multiplied, or why by none; other processes find the same.

        Raises:
            UsageError: when the environment asks for kernels that this CPU cannot run.
        """
        if not self.packed:
            return
        found = kernels.find()
        if found.module is not None and device == "cpu":
            self.quantities.kernels = str(found.module.variant())
        else:
            self.quantities.missing["kernels"] = found.reason or f"the kernels run on the CPU, this is {device}"

    def contender(self, device: str, threads: int, context: int) -> Contender:
        """How its process is started."""
        title = f"{self.name} as {self.format}"
        if self.file is not None:
            file = self.file
            return Contender(
                title, lambda: LlamaCpp(file, context=context + 16, threads=threads, exact=False), "llama.cpp",
                2 * file.stat().st_size,
            )  # fmt: skip
        folder, dtype = self.source.folder, self.dtype or self.format
        if self.rounded is not None:
            folder, dtype = self.rounded, "auto"
        needed = 2 * (self.quantities.bytes_disk or 0)
        return Contender(
            title, lambda: Worker(folder, dtype, device=device, threads=threads), "transformers", needed, self.decodes
        )


def stored(name: str, source: Source, dtype: str) -> Entry:
    """A model in transformers, in a number format or, for auto, in that of its file.

    Raises:
        UnsupportedModelError: for a version of the sparse format that is not known.
        CheckpointError: when the header of that makes no sense.
    """
    config = read_config(source.folder)
    header = header_of(config)
    if header is not None:
        computed = str(dtype_of(config)).removeprefix("torch.") if dtype == "auto" else dtype
        return Entry(name, source, header.number_format, computed)
    if dtype == "auto":
        with CheckpointReader(source.folder) as reader:
            sizes: dict[str, int] = {}
            for key in reader.keys:
                info = reader.info(key)
                if info.dtype.is_floating_point:
                    kind = str(info.dtype).removeprefix("torch.")
                    sizes[kind] = sizes.get(kind, 0) + info.nbytes
        dtype = max(sizes, key=lambda kind: sizes[kind]) if sizes else "float32"
    return Entry(name, source, dtype)


def quantised(name: str, source: Source, kind: str, scratch: Path, reporter: Reporter) -> tuple[Entry | None, str]:
    """A model as a file of llama.cpp, or None and why it could not be made."""
    file = scratch / f"{kind}.gguf"
    reporter.stage(f"writing {kind}", 1)
    try:
        plan = GGUF(quantize=kind).plan(source, reporter)
        plan.write(file, reporter)
    except SecateurError as error:
        return None, error.message
    return Entry(name, source, kind, file=file, plan=plan), ""


def rounded(name: str, source: Source, scratch: Path, reporter: Reporter) -> tuple[Entry | None, str]:
    """A model with weights and activations in 8 bits, in torchao, or None and why it could not be made."""
    folder = scratch / INT8
    try:
        plan = TorchAO().plan(source, reporter)
        folder.mkdir()
        plan.write(folder, reporter)
    except SecateurError as error:
        return None, error.message
    return Entry(name, source, INT8, rounded=folder), ""


def source_of(name: str, source: Source, reporter: Reporter) -> tuple[str, Source]:
    """The dense model that a result names, else the model itself; of a packed one, that of what was packed.

    Raises:
        UsageError: when a result does not name it, or a packed model does not say what it was made from.
        SourceError: when it cannot be opened.
    """
    path = source.folder / RESULT_FILE
    if not path.is_file():
        if _is_packed(source):
            raise UsageError(f"{name} does not say what it was packed from", hint="give the dense model with against")
        return name, source
    try:
        named = str(json.loads(path.read_text(encoding="utf-8"))["source"]["model"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UsageError(f"{path} does not say which model is the dense one", hint="give it with against") from error
    if not named:
        raise UsageError("the dense model was in memory when it was pruned", hint="give it with against")
    found = open_source(named, reporter=reporter, packed=True)
    if _is_packed(source) or _is_packed(found):  # an export: what it was made from may be a result as well
        return source_of(named, found, reporter)
    reporter.note(f"the dense model is {named}")
    return named, found


def _is_packed(source: Source) -> bool:
    return header_of(read_config(source.folder)) is not None


def _take_numbers(model: Any, file: Path, plan: GGUFPlan) -> None:
    """Give a model the numbers of a file."""
    parameters = model.state_dict()  # the tensors themselves: what is copied into them, the model computes with
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    with torch.no_grad():
        for one in plan.tensors:
            if one.key:
                parameters[one.key].copy_(one.restore(values_of(file, tensors[one.name])))
