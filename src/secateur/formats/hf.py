"""An ordinary Hugging Face folder with plain weights: unpacks what ``sparse`` packed, and takes any other model too.

Numbers of 16 bits come out bit for bit. Those that were rounded to 8 or 4 bits are written in the number format that
config.json names; they are exact in float32. One matrix is in memory at a time.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from secateur.checkpoint.check import check_model_folder, hash_folder
from secateur.checkpoint.dtypes import NAMES
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.source import Source
from secateur.checkpoint.unpacked import UnpackedReader, open_reader
from secateur.checkpoint.writer import CheckpointWriter, Layout, layout_for
from secateur.formats._folder import compare_tensor, largest_shard, write_beside
from secateur.progress import Reporter


@dataclass(frozen=True, kw_only=True)
class HF:
    """Options of the format: there are none."""

    name: ClassVar[str] = "hf"
    suffix: ClassVar[str] = ""
    reads_packed: ClassVar[bool] = True

    def plan(self, source: Source, reporter: Reporter) -> HFPlan:
        """Work out the shards.

        Raises:
            CheckpointError: when the weights, or what is packed in them, make no sense.
        """
        config = check_model_folder(source.folder, packed=True)
        config.pop("quantization_config", None)
        with open_reader(source.folder) as reader:
            infos = [reader.info(key) for key in reader.keys]
            layout = layout_for([(info.key, info.dtype, info.shape) for info in infos], largest_shard(reader))
            if isinstance(reader, UnpackedReader):
                rounded = [key for key in reader.packed if reader.rounds(key)]
                if rounded:
                    reporter.note(
                        f"{len(rounded)} matrices of 8 or 4 bits are written as {NAMES[reader.info(rounded[0]).dtype]}"
                    )
        return HFPlan(source.folder, config, layout, hash_folder(source.folder))


@dataclass
class HFPlan:
    """What a folder will hold."""

    folder: Path
    config: dict[str, Any]
    layout: Layout
    source_sha256: str

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    def write(self, path: Path, reporter: Reporter) -> dict[str, Any]:
        """Write the folder, one tensor in memory at a time.

        Raises:
            OutputError: when the disk does not take it.
            CheckpointError: when what was packed makes no sense.
        """
        write_beside(self.folder, path, self.config)
        zeros = 0
        reporter.stage("write weights", len(self.layout.keys))
        with open_reader(self.folder) as reader, CheckpointWriter(path, self.layout) as writer:
            for key in self.layout.keys:
                tensor = reader.tensor(key)
                if tensor.ndim > 1:
                    zeros += int((tensor == 0).sum())
                writer.write(key, tensor)
                reporter.advance(key)
            shards = writer.finish()
            kinds = Counter(NAMES[reader.info(key).dtype].lower() for key in self.layout.keys)
        return {"tensors": dict(kinds), "zeros": zeros, "zeros_lost": 0, "shards": shards}

    def check(self, path: Path, reporter: Reporter) -> dict[str, Any]:
        """Read the folder back and compare every tensor with its source.

        Raises:
            VerificationError: naming the first that differs.
        """
        check_model_folder(path)
        reporter.stage("read back", len(self.layout.keys))
        with CheckpointReader(path) as made, open_reader(self.folder) as source:
            for key in self.layout.keys:
                compare_tensor(made, key, source, key)
                reporter.advance(key)
        return {"tensors": len(self.layout.keys)}
