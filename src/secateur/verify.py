"""The proof: what was written is opened again in a fresh process and compared with what was made.

Run as ``python -m secateur.verify FOLDER INPUTS OUTPUT`` it answers with a streamed forward, for models that do not fit
in memory; otherwise the fresh process knows nothing of secateur and uses the stock loader.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.view import CheckpointView
from secateur.checkpoint.writer import hash_file
from secateur.errors import SecateurError, VerificationError
from secateur.measure.compare import Worker
from secateur.progress import Reporter

TOLERANCE = 1e-3
"""Largest difference of an output, as a share of the largest output. Both sides compute in float32."""


@dataclass
class Expected:
    """What the run made. ``output`` is the engine's answer to ``inputs``, None when there was no probe."""

    shards: Mapping[str, str]
    """Shard name -> sha256."""
    zeros: Mapping[str, int]
    """Checkpoint key of every pruned tensor -> number of zeros."""
    inputs: Mapping[str, torch.Tensor] | None = None
    output: torch.Tensor | None = None
    source: Path | None = None
    """Folder of the dense model: what was not pruned must be the same there, byte for byte."""
    origin: Mapping[str, str] | None = None
    """Checkpoint key -> key in the source; None when they are the same and none is left out."""
    moved: Mapping[str, Sequence[tuple[int, torch.Tensor]]] = field(default_factory=dict)
    """Checkpoint key -> dimensions along which it has another order than the source, and the order."""


def verify(folder: Path, expected: Expected, reporter: Reporter | None = None) -> dict[str, Any]:
    """Check shards, zeros and outputs of a written folder; returns what was checked, for the result file.

    Raises:
        VerificationError: naming the first thing that is not as it was made.
    """
    check_shards(folder, expected.shards)
    checked: dict[str, Any] = {"shards": len(expected.shards)}
    checked["bytes"] = sum((folder / name).stat().st_size for name in expected.shards)
    checked["zeros"] = _check_zeros(folder, expected)
    if expected.source is not None:
        checked["tensors_unchanged"] = _check_copies(folder, expected.source, expected)
    if expected.inputs is not None and expected.output is not None:
        answer, loader = _fresh_output(folder, expected.inputs, reporter or Reporter())
        checked["loader"] = loader
        checked["output_shape"] = list(answer.shape)
        if answer.shape != expected.output.shape:
            raise VerificationError(f"{folder}: outputs are {tuple(answer.shape)}, not {tuple(expected.output.shape)}")
        scale = float(expected.output.abs().max()) or 1.0
        difference = float((answer - expected.output).abs().max()) / scale
        checked["output_difference"], checked["tolerance"] = difference, TOLERANCE
        if not difference <= TOLERANCE:  # also when it is NaN
            raise VerificationError(
                f"{folder}: the reloaded model answers differently, by {difference:.2g} of the largest output",
                hint="please report this: the model in memory was not the model on the disk",
            )
    return checked


def check_shards(folder: Path, shards: Mapping[str, str]) -> None:
    """Compare every shard with its sha256.

    Raises:
        VerificationError: when one is missing or differs.
    """
    for name, digest in shards.items():
        path = folder / name
        if not path.is_file():
            raise VerificationError(f"{path} is missing")
        if hash_file(path) != digest:
            raise VerificationError(
                f"{path} is not what was written: its sha256 differs",
                hint="the file was changed or damaged; make it again",
            )


def _check_zeros(folder: Path, expected: Expected) -> int:
    total = 0
    counted: dict[str, int] = {}
    for name in expected.shards:
        with safe_open(folder / name, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118 - not a dict
                if key in expected.zeros:
                    counted[key] = int((shard.get_tensor(key) == 0).sum())
    for key, zeros in expected.zeros.items():
        if counted.get(key) != zeros:
            raise VerificationError(f"{folder}: {key} has {counted.get(key)} zeros on the disk, {zeros} were made")
        total += zeros
    return total


def _check_copies(folder: Path, source: Path, expected: Expected) -> int:
    """Compare every tensor that was not pruned with the source's; where the number format changed, by value."""
    same, origin = 0, expected.origin
    whole = CheckpointReader(source) if origin is None else CheckpointView(source, origin)
    with whole as dense, CheckpointReader(folder) as made:
        if set(dense.keys) != set(made.keys):
            raise VerificationError(f"{folder} does not hold the tensors of {source}")
        for key in made.keys:
            if key in expected.zeros:
                continue
            dtype = made.info(key).dtype
            if key in expected.moved:
                theirs = dense.tensor(key)
                for dim, order in expected.moved[key]:
                    theirs = theirs.index_select(dim, order)
                equal = torch.equal(made.tensor(key), theirs.to(dtype))
            elif dtype == dense.info(key).dtype:
                pairs = zip(made.chunks(key), dense.chunks(key), strict=True)
                equal = all(torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)) for ours, theirs in pairs)
            else:
                equal = torch.equal(made.tensor(key), dense.tensor(key).to(dtype))
            if not equal:
                raise VerificationError(f"{folder}: {key} was not pruned, but differs from the source")
            same += 1
    return same


def _fresh_output(folder: Path, inputs: Mapping[str, torch.Tensor], reporter: Reporter) -> tuple[torch.Tensor, str]:
    """The folder's answer from a fresh process, and how it was loaded."""
    with tempfile.TemporaryDirectory() as scratch:
        given, out = Path(scratch) / "inputs.safetensors", Path(scratch) / "outputs.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, given)
        size = 2 * sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        if size > psutil.virtual_memory().available:
            reporter.note("the model does not fit in memory: it is verified block by block")
            command = [sys.executable, "-P", "-m", "secateur.verify", str(folder), str(given), str(out)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise VerificationError(f"{folder} cannot be opened again: {_last_line(done.stderr)}")
            return load_file(out)["output"].float(), "streamed, one block in memory at a time"
        try:
            with Worker(folder, dtype="float32") as worker:
                worker.ask("load")
                worker.ask("logits", inputs=str(given), out=str(out))
        except SecateurError as error:
            raise VerificationError(f"{folder} cannot be opened by the stock loader: {error.message}") from error
        found = load_file(out)
        name = next(name for name in ("logits", "last_hidden_state", *found) if name in found)
        return found[name].float(), "transformers from_pretrained, fresh process"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def _main(folder: str, inputs: str, out: str) -> None:
    from secateur.engine.forward import stream_forward

    save_file({"output": stream_forward(Path(folder), load_file(inputs))}, out)


if __name__ == "__main__":
    _main(*sys.argv[1:])
