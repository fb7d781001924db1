"""A folder of torchao: weights of linear layers rounded to 8 bits, and activations to 8 bits as they come.

Every row of a weight has a scale, every token's activations have one, and products are sums of 8-bit integers, which is
what a model is mostly quantised to for a CPU. transformers opens such a folder wherever torchao is installed, without
secateur. Embeddings, norms, biases, the head of a language model, and convolutions stay as they are. Zeros are stored
like any other number: smaller is what has fewer bits, and what lost whole units before.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers

from secateur.checkpoint.check import check_model_folder, hash_folder, is_finite, read_config
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.source import Source
from secateur.checkpoint.writer import hash_file
from secateur.engine.quiet import quiet_loading
from secateur.engine.skeleton import build_skeleton
from secateur.errors import (
    MissingExtraError,
    OutputError,
    UnsupportedModelError,
    VerificationError,
    WeightValueError,
)
from secateur.formats._folder import compare_tensor, largest_shard, write_beside
from secateur.progress import Reporter

PACKAGE = "torchao"
INSTALL = "pip install 'secateur[torchao]'"
_PARTS = ("_weight_qdata", "_weight_scale", "_weight_zero_point")
"""What a weight becomes in the file; the last is there for grids with an offset, and empty for this one."""


def is_installed() -> bool:
    """Whether the library is there."""
    return importlib.util.find_spec(PACKAGE) is not None


@dataclass(frozen=True, kw_only=True)
class TorchAO:
    """Options of the format: there are none."""

    name: ClassVar[str] = "torchao"
    suffix: ClassVar[str] = ""
    reads_packed: ClassVar[bool] = False

    def plan(self, source: Source, reporter: Reporter) -> TorchAOPlan:
        """See which weights are rounded.

        Raises:
            MissingExtraError: when torchao is not installed.
            UnsupportedModelError: for a model without linear layers in its blocks.
            WeightValueError: for weights that are not finite.
        """
        config = check_model_folder(source.folder)
        if not is_installed():
            raise MissingExtraError("--format torchao needs torchao", hint=INSTALL)
        skeleton = build_skeleton(source.folder)
        head = skeleton.get_output_embeddings()
        linear = {
            name
            for name, module in skeleton.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        }
        nbytes = zeros = 0
        with CheckpointReader(source.folder) as reader:
            reporter.stage("look at matrices", len(reader.keys))
            for key in reader.keys:
                info = reader.info(key)
                if len(info.shape) > 1:
                    zeros += reader.zeros(key)
                    if not all(is_finite(chunk) for chunk in reader.chunks(key)):
                        raise WeightValueError(
                            f"{key} has NaN or infinite weights",
                            hint="the model is broken; download it again, or use another checkpoint of it",
                        )
                rows = info.shape[0] if info.shape else 1
                rounded = any(f"{name}.weight".endswith(key) for name in linear) and len(info.shape) == 2
                nbytes += info.numel + 8 * rows if rounded else info.nbytes
                reporter.advance(key)
            shard = largest_shard(reader)
        if not linear:
            raise UnsupportedModelError(
                f"{source.name} has no linear layer of PyTorch, and torchao rounds nothing else",
                hint="--format sparse --bits 8 knows other layers too",
            )
        names = frozenset(skeleton.state_dict())
        tied = frozenset(getattr(skeleton, "all_tied_weights_keys", None) or ())
        return TorchAOPlan(source.folder, config, hash_folder(source.folder), nbytes, zeros, shard, names, tied)


@dataclass
class TorchAOPlan:
    """What a folder will hold."""

    folder: Path
    config: dict[str, Any]
    source_sha256: str
    nbytes: int
    zeros: int
    shard_bytes: float
    names: frozenset[str]
    """Of the tensors of the model's class."""
    tied: frozenset[str]
    """Those that are stored under another name."""
    rounds: ClassVar[bool] = True

    def write(self, path: Path, reporter: Reporter) -> dict[str, Any]:
        """Let transformers and torchao round and write the model; rounded, it is in memory whole.

        Raises:
            OutputError: when the disk does not take it.
            UnsupportedModelError: when transformers has no such class, or torchao rounds nothing of it.
        """
        name = (self.config.get("architectures") or ["AutoModelForCausalLM"])[0]
        stock: Any = getattr(transformers, name, None)
        if stock is None:
            raise UnsupportedModelError(
                f"transformers {transformers.__version__} has no class {name}", hint="a newer transformers may have it"
            )
        reporter.stage("round to 8 bits", 1)
        with quiet_loading(), quiet_import():
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig

            how = transformers.TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
            model = stock.from_pretrained(
                self.folder, dtype="auto", local_files_only=True, use_safetensors=True, quantization_config=how
            )
            size = {"max_shard_size": int(self.shard_bytes)} if self.shard_bytes < float("inf") else {}
            try:
                model.save_pretrained(path, **size)
            except OSError as error:
                raise OutputError(f"{path} cannot be written: {error.strerror}", hint="check the disk") from error
        quantised = read_config(path)["quantization_config"]
        write_beside(self.folder, path, {**self.config, "quantization_config": quantised})
        with CheckpointReader(path) as made:
            rounded = sum(key.endswith(_PARTS[0]) for key in made.keys)
            kinds = {"8 bits": rounded, "plain": len(made.keys) - sum(key.endswith(_PARTS) for key in made.keys)}
            shards = {shard.path.name: hash_file(shard.path) for shard in made.shards}
        if not rounded:
            raise UnsupportedModelError(
                "torchao rounds no layer of this model", hint="--format sparse --bits 8 knows other layers too"
            )
        return {"tensors": kinds, "zeros": self.zeros, "zeros_lost": 0, "shards": shards}

    def check(self, path: Path, reporter: Reporter) -> dict[str, Any]:
        """Read the folder back and compare every number with the source's.

        Rounded ones must be within half a step of their row (a step in 16-bit models), and zeros zero; the others must
        be equal.

        Raises:
            VerificationError: naming the first that is not as it should be.
        """
        worst, found = 0.0, 0
        with CheckpointReader(path) as made, CheckpointReader(self.folder) as source:
            theirs = set(made.keys)
            reporter.stage("read back", len(source.keys))
            for key in source.keys:
                reporter.advance(key)
                # A folder of the bare model names its tensors without the prefix that the class has.
                name = key if key in self.names else next((n for n in self.names if n.endswith(f".{key}")), None)
                if name is None:
                    continue  # left over from an older class: the model has no such tensor
                found += 1
                if name in theirs:
                    compare_tensor(made, name, source, key)
                elif f"{name.removesuffix('weight')}{_PARTS[0]}" in theirs:
                    worst = max(worst, _compare(path, name, made, source, key))
                elif name in self.tied:
                    found -= 1  # such as a head that is the embedding
                else:
                    raise VerificationError(f"{path}: {name} is not there", hint="please report this")
        return {"tensors": found, "largest_difference": {"8 bits": worst}}


def _compare(path: Path, key: str, made: CheckpointReader, source: CheckpointReader, origin: str) -> float:
    """The largest difference of a rounded weight, as a share of the largest of its row."""
    numbers, scale = (made.tensor(f"{key.removesuffix('weight')}{part}") for part in _PARTS[:2])
    wanted = source.tensor(origin).float()
    scale = scale.float().reshape(-1, 1)
    hint = "please report this: the file is not the model"
    if numbers.dtype != torch.int8 or numbers.shape != wanted.shape or len(scale) != len(wanted):
        raise VerificationError(
            f"{path}: {key} is stored otherwise than as 8 bits with a scale for each row", hint=hint
        )
    ours = numbers.float() * scale
    if bool(((wanted == 0) & (numbers != 0)).any()):
        raise VerificationError(f"{path}: {key} has lost zeros", hint=hint)
    # Half a step, and what rounding the scale of a row to a narrow number format comes to at its largest number.
    step = 0.501 if source.info(origin).dtype in (torch.float32, torch.float64) else 1.0
    if bool(((ours - wanted).abs() > step * scale + 1e-12).any()):
        raise VerificationError(f"{path}: {key} is farther off than rounding explains", hint=hint)
    largest = wanted.abs().amax(1, keepdim=True)
    return float(((ours - wanted).abs() / torch.where(largest == 0, 1.0, largest)).max())


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Without torchao's list of the extensions that are for other machines, and what torch says of its enumerations."""
    own = [logging.getLogger(name) for name in (PACKAGE, "torch.utils._pytree")]
    levels = [one.level for one in own]
    for one in own:
        one.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for one, level in zip(own, levels, strict=True):
            one.setLevel(level)
