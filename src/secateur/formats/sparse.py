"""A folder whose zeros take next to no room: a bit a weight says which are not zero, and only those are stored.

Of each matrix of the blocks that kind is stored which takes the fewest bytes: a bit mask and the values that are not
zero; for 2:4 two indices of two bits for every four weights; or every value, where zeros are too few to pay. Values
have 16 bits (as they are), or are rounded to 8 or 4 with a scale for each row or group of columns; zeros stay zero.
Embedding and head are stored in few bits too unless told otherwise, vectors as they are. `docs/sparse-format.md` says
what is where. After `import secateur` transformers opens such a folder like any other.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from secateur.checkpoint.check import check_model_folder, hash_folder, is_finite, read_config
from secateur.checkpoint.dtypes import NAMES
from secateur.checkpoint.reader import CheckpointReader, TensorInfo
from secateur.checkpoint.source import Source
from secateur.checkpoint.unpacked import open_reader
from secateur.checkpoint.writer import CheckpointWriter, Layout, layout_for
from secateur.errors import UnsupportedModelError, UsageError, VerificationError, WeightValueError
from secateur.formats._folder import compare_tensor, largest_shard, write_beside
from secateur.formats._sparse_matrices import Candidate, find_candidates
from secateur.packing.header import Header
from secateur.packing.layout import BITS, WORD, Entry
from secateur.packing.pack import Counts, Setting, best, count, entries_for, pack
from secateur.progress import Reporter
from secateur.result import StoredMatrix

_FARTHEST = {8: 0.505 / 127, 4: 0.3}
"""How far rounding may move a weight at most, as a share of the largest in its group."""


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """Options of the format."""

    name: ClassVar[str] = "sparse"
    suffix: ClassVar[str] = ""
    reads_packed: ClassVar[bool] = False
    bits: int = 16
    """Bits of a stored value: 16 keeps it, 8 and 4 round it."""
    group_size: int | None = None
    """Columns that share a scale, a multiple of 64, or 0 for the whole row; without it a row at 8 bits, 64 at 4."""
    embedding_bits: int | None = None
    """Bits of embedding and head; without it as the others, but at least 8."""
    force: bool = False
    """Write a model without zeros too."""

    def __post_init__(self) -> None:
        for name, value in (("bits", self.bits), ("embedding_bits", self.embedding_bits)):
            if value is not None and value not in BITS:
                raise UsageError(f"{name} is {value}", hint=f"it must be one of {', '.join(map(str, BITS))}")
        if self.group_size is not None and (self.group_size < 0 or self.group_size % WORD):
            raise UsageError(f"group_size is {self.group_size}", hint=f"a multiple of {WORD}, or 0 for the row")
        if self.group_size and self.bits == 16 and self.setting(True, "bfloat16").bits == 16:
            raise UsageError("group_size has no meaning at 16 bits, which have no scales", hint="leave it out")

    def setting(self, embedding: bool, half: str) -> Setting:
        """How the values of a matrix are stored; ``half`` is the number format of 16 bits."""
        bits = (max(self.bits, 8) if self.embedding_bits is None else self.embedding_bits) if embedding else self.bits
        if bits == 16:
            return Setting(16, 0, half)
        return Setting(bits, self.group_size if self.group_size is not None else {8: 0, 4: WORD}[bits])

    def plan(self, source: Source, reporter: Reporter) -> SparsePlan:
        """Look at every matrix and decide how it is stored.

        Raises:
            UnsupportedModelError: for a model in which zeros do not pay, unless forced, or that has no blocks.
            WeightValueError: for weights that are not finite.
        """
        config = check_model_folder(source.folder)
        with CheckpointReader(source.folder) as reader:
            candidates = find_candidates(
                source.folder, reader, embeddings=self.setting(True, "bfloat16").bits < 16
            )  # fmt: skip
            plan = SparsePlan(source.folder, config, hash_folder(source.folder), largest_shard(reader))
            reporter.stage("look at matrices", len(candidates))
            for candidate in candidates:
                plan.add(*self._choose(candidate, reader, plan))
                reporter.advance(candidate.module)
            plan.finish(reader)
            _warn(plan, reader, reporter)
        self._refuse(plan, source.name, reporter)
        return plan

    def _choose(
        self, candidate: Candidate, reader: CheckpointReader, plan: SparsePlan
    ) -> tuple[Candidate, Entry | None, StoredMatrix]:
        info = reader.info(candidate.key)
        if candidate.obstacle:
            nbytes = info.numel * _plain_dtype(info).itemsize
            zeros = sum(int((chunk == 0).sum()) for chunk in reader.chunks(candidate.key))
            return candidate, None, _stored(candidate, info, "plain", nbytes, zeros, candidate.obstacle)
        setting = self.setting(not candidate.in_block, "float16" if info.dtype == torch.float16 else "bfloat16")
        matrix = load(candidate, reader)
        if not is_finite(matrix.to(getattr(torch, setting.dtype))):
            raise WeightValueError(
                f"{candidate.key} has NaN or infinite weights, or weights too large for {setting.dtype}",
                hint="the model is broken; download it again, or use another checkpoint of it",
            )
        counts = count(matrix, setting)
        plan.negative_zeros += counts.negative_zeros
        entries = entries_for(counts, setting, transposed=candidate.transposed)
        entry = entries["dense"] if candidate.embedding else best(entries)
        reason = _reason(candidate, counts, entries, entry)
        if entry.kind == "dense" and setting.bits == 16:
            nbytes = info.numel * _plain_dtype(info).itemsize
            return candidate, None, _stored(candidate, info, "plain", nbytes, counts.zeros, reason)
        made = _stored(candidate, info, entry.kind, entry.nbytes, counts.zeros, reason, entry.bits)
        return candidate, entry, made

    def _refuse(self, plan: SparsePlan, name: str, reporter: Reporter) -> None:
        if any(entry.kind != "dense" for _, entry in plan.packed):
            return
        blocks = [one for one in plan.matrices if one.in_block]
        weights = sum(_numel(one) for one in blocks)
        zeros = sum(one.zeros for one in blocks) / weights
        cost = f"{plan.nbytes / 1e6:,.1f} MB, {plan.bits_per_weight:.2f} bits for each weight of the blocks"
        what = f"{name} has no matrix in which leaving out zeros pays ({zeros:.1%} of the weights are zero)"
        if not self.force:
            raise UnsupportedModelError(
                f"{what}; the file would take {cost}",
                hint="prune the model first, or write it all the same with --force",
            )
        if not plan.packed:
            raise UnsupportedModelError(
                f"{what}, and nothing to round at 16 bits", hint="--bits 8 would make it smaller"
            )
        reporter.warn(f"{what}: the file takes {cost}")


@dataclass
class SparsePlan:
    """What a folder will hold."""

    folder: Path
    config: dict[str, Any]
    source_sha256: str
    shard_bytes: float
    packed: list[tuple[Candidate, Entry]] = field(default_factory=list)
    matrices: list[StoredMatrix] = field(default_factory=list)
    plain: dict[str, TensorInfo] = field(default_factory=dict)
    layout: Layout = field(default_factory=lambda: Layout(()))
    negative_zeros: int = 0
    """In the source; they are stored as plain zeros."""
    rounds: bool = False
    """Whether a number of the source is not stored as it is."""

    def add(self, candidate: Candidate, entry: Entry | None, stored: StoredMatrix) -> None:
        """Take one matrix in."""
        self.matrices.append(stored)
        if entry is not None:
            self.packed.append((candidate, entry))

    def finish(self, reader: CheckpointReader) -> None:
        """Work out the shards, when all matrices are in: a matrix lies where its key lay."""
        by_key = {candidate.key: (candidate, entry) for candidate, entry in self.packed}
        entries: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
        for key in reader.keys:
            info = reader.info(key)
            if key in by_key:
                candidate, entry = by_key[key]
                entries += [(f"{candidate.module}.{part}", *place) for part, place in entry.parts().items()]
            else:
                self.plain[key] = info
                entries.append((key, _plain_dtype(info), info.shape))
        self.layout = layout_for(entries, self.shard_bytes)
        self.rounds = any(_plain_dtype(info) != info.dtype for info in self.plain.values()) or any(
            entry.bits < 16 or reader.info(candidate.key).dtype != entry.value_dtype for candidate, entry in self.packed
        )

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    @property
    def header(self) -> Header:
        """The header that config.json gets."""
        return Header({candidate.module: entry for candidate, entry in self.packed})

    @property
    def bits_per_weight(self) -> float:
        """Over the matrices of the blocks."""
        blocks = [one for one in self.matrices if one.in_block]
        return 8 * sum(one.nbytes for one in blocks) / sum(_numel(one) for one in blocks)

    def write(self, path: Path, reporter: Reporter) -> dict[str, Any]:
        """Write the folder, one matrix in memory at a time.

        Raises:
            OutputError: when the disk does not take it.
        """
        write_beside(self.folder, path, {**self.config, "quantization_config": self.header.to_dict()})
        reporter.stage("pack weights", len(self.packed) + len(self.plain))
        with CheckpointReader(self.folder) as reader, CheckpointWriter(path, self.layout) as writer:
            for key in self.plain:
                writer.copy(reader, key)
                reporter.advance(key)
            for candidate, entry in self.packed:
                for part, tensor in pack(load(candidate, reader), entry).items():
                    writer.write(f"{candidate.module}.{part}", tensor)
                reporter.advance(candidate.module)
            shards = writer.finish()
        kinds = Counter(f"{entry.kind} of {entry.bits} bits" for _, entry in self.packed)
        kinds["plain"] = len(self.plain)
        return {
            "tensors": dict(kinds), "zeros": sum(one.zeros for one in self.matrices), "zeros_lost": 0, "shards": shards,
            "matrices": self.matrices, "bits_per_weight": self.bits_per_weight,
        }  # fmt: skip

    def check(self, path: Path, reporter: Reporter) -> dict[str, Any]:
        """Read the folder back, unpack every matrix, and compare every number with the source's.

        Numbers of 16 bits must be equal; rounded ones no farther off than rounding explains; zeros must be zero.

        Raises:
            VerificationError: naming the first that is not as it should be.
        """
        check_model_folder(path, packed=True)
        if read_config(path)["quantization_config"] != self.header.to_dict():
            raise VerificationError(f"{path}: the header is not what was written")
        reporter.stage("read back", len(self.packed) + len(self.plain))
        worst: dict[str, float] = {}
        with open_reader(path) as made, CheckpointReader(self.folder) as source:
            for key in self.plain:
                compare_tensor(made, key, source, key)
                reporter.advance(key)
            for candidate, entry in self.packed:
                ours = made.tensor(f"{candidate.module}.weight").float()
                theirs = load(candidate, source)
                difference = _compare(path, candidate, entry, ours.T if candidate.transposed else ours, theirs)
                kind = f"{entry.bits} bits"
                worst[kind] = max(worst.get(kind, 0.0), difference)
                reporter.advance(candidate.module)
        return {"matrices": len(self.packed), "tensors_plain": len(self.plain), "largest_difference": worst}


def load(candidate: Candidate, reader: CheckpointReader) -> torch.Tensor:
    """A matrix as (out, in)."""
    tensor = reader.tensor(candidate.key)
    return tensor.T if candidate.transposed else tensor


def _plain_dtype(info: TensorInfo) -> torch.dtype:
    """Matrices that stay plain have 16 bits in the file at most."""
    wide = info.dtype in (torch.float32, torch.float64) and len(info.shape) > 1
    return torch.bfloat16 if wide else info.dtype


def _compare(path: Path, candidate: Candidate, entry: Entry, ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference as a share of the largest weight of its group (0 at 16 bits).

    The file's numbers come in float32 or the model's own format, so that is allowed for.
    """
    hint = "please report this: the file is not the model"
    if entry.bits == 16:
        if not torch.equal(ours, theirs.to(entry.value_dtype).float()):
            raise VerificationError(f"{path}: {candidate.module} differs from the source", hint=hint)
        return 0.0
    wanted = theirs.float()
    if bool(((wanted == 0) & (ours != 0)).any()):
        raise VerificationError(f"{path}: {candidate.module} has lost zeros", hint=hint)
    size = entry.group_size or entry.columns
    worst = 0.0
    for first in range(0, entry.columns, size):
        part = wanted[:, first : first + size]
        largest = part.abs().amax(1, keepdim=True)
        share = (ours[:, first : first + size] - part).abs() / torch.where(largest == 0, 1.0, largest)
        worst = max(worst, float(share.max()))
    if not worst <= _FARTHEST[entry.bits] + 2.0**-8:  # the model's own format may be bfloat16
        raise VerificationError(
            f"{path}: {candidate.module} is off by {worst:.2g} of the largest weight of a group", hint=hint
        )
    return worst


def _stored(
    candidate: Candidate, info: TensorInfo, kind: str, nbytes: int, zeros: int, reason: str, bits: int = 0
) -> StoredMatrix:
    bits = bits or 8 * _plain_dtype(info).itemsize
    return StoredMatrix(
        candidate.module,
        list(info.shape),
        kind,
        bits,
        zeros,
        nbytes,
        8 * nbytes / info.numel,
        reason,
        candidate.in_block,
    )


def _numel(stored: StoredMatrix) -> int:
    return math.prod(stored.shape)


def _reason(candidate: Candidate, counts: Counts, entries: dict[str, Entry], entry: Entry) -> str:
    weights = counts.rows * counts.columns
    if candidate.embedding:
        return "an embedding: its rows are looked up one by one"
    if entry.kind == "2:4":
        return "every four weights have at most two that are not zero"
    share = f"{counts.stored_zeros / weights:.0%} zeros as stored"
    mask, dense = (8 * entries[kind].nbytes / weights for kind in ("mask", "dense"))
    if entry.kind == "mask":
        return f"{share}: {mask:.2f} bits a weight, {dense:.2f} without a mask"
    return f"{share} do not pay: {mask:.2f} bits a weight with a mask, {dense:.2f} without"


def _warn(plan: SparsePlan, reader: CheckpointReader, reporter: Reporter) -> None:
    """Say what is not stored as it was."""
    wide = Counter(NAMES[info.dtype] for info in plan.plain.values() if _plain_dtype(info) != info.dtype)
    for candidate, entry in plan.packed:
        if entry.bits == 16 and reader.info(candidate.key).dtype != entry.value_dtype:
            wide[NAMES[reader.info(candidate.key).dtype]] += 1
    for name, matrices in wide.items():
        reporter.warn(f"{matrices} matrices of {name} are rounded to bfloat16: the file is not lossless")
    if plan.negative_zeros:
        reporter.note(f"{plan.negative_zeros:,} negative zeros become plain zeros")
