"""`secateur inspect`: what a model is made of, what can be pruned, and what cannot and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from secateur.checkpoint.check import check_model_folder
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.source import open_source
from secateur.checkpoint.unpacked import UnpackedReader, open_reader
from secateur.engine.binding import Binding
from secateur.engine.blocks import Structure, find_structure
from secateur.engine.forward import rehearse
from secateur.engine.skeleton import build_skeleton
from secateur.errors import CheckpointError, UnsupportedModelError
from secateur.progress import Reporter
from secateur.result import RESULT_FILE, InspectResult, Matrix, Unprunable
from secateur.verify import check_shards


def inspect(model: str | Path, *, reporter: Reporter | None = None) -> InspectResult:
    """Look at a model without loading it: one tensor at a time is read to count its zeros.

    A folder that secateur wrote is also compared with the hashes in its ``secateur.json``.

    Raises:
        SourceError: when it cannot be found or opened.
        UnsupportedModelError: when it has no blocks that could be pruned.
        VerificationError: when it is a result of secateur that was changed since.
    """
    reporter = reporter or Reporter()
    source = open_source(model, reporter=reporter, packed=True)
    check_model_folder(source.folder, packed=True)
    _check_own_result(source.folder, reporter)
    skeleton = build_skeleton(source.folder)
    structure = find_structure(skeleton)
    with open_reader(source.folder) as reader:
        binding = Binding(skeleton, reader.keys)
        if binding.missing:
            raise CheckpointError(f"the checkpoint lacks weights of the model, the first is {binding.missing[0]}")
        obstacle = None
        try:
            rehearse(skeleton, structure, binding, reader)
        except UnsupportedModelError as error:
            obstacle = error.message
        parameters = sum(reader.info(key).numel for key in reader.keys)
        reporter.stage("counting zeros", len(reader.keys))
        zeros: dict[str, int] = {}
        for key in reader.keys:
            zeros[key] = reader.zeros(key)
            reporter.advance()
        counts = zeros_of_matrices(structure, binding, reader, zeros)
        matrices = [Matrix(matrix.name, matrix.shape, counts[matrix.name]) for matrix in structure.matrices]
        dtypes = sorted({_format_of(reader, key) for key in reader.keys})
        size = sum(shard.path.stat().st_size for shard in reader.shards)
    prunable = sum(matrix.size for matrix in structure.matrices)
    zero = sum(matrix.zeros for matrix in matrices)
    return InspectResult(
        model=str(model),
        architecture=type(skeleton).__name__,
        dtype=", ".join(dtypes),
        parameters=parameters,
        nonzero=parameters - sum(zeros.values()),
        prunable=prunable,
        zeros=zero,
        sparsity=zero / prunable if prunable else 0.0,
        bytes_disk=size,
        blocks=len(structure.blocks),
        obstacle=obstacle,
        matrices=matrices,
        unprunable=[Unprunable(name, shape, reason) for name, (shape, reason) in structure.unprunable.items()],
    )


def zeros_of_matrices(
    structure: Structure, binding: Binding, reader: CheckpointReader, known: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Zeros of every prunable matrix, by name.

    Args:
        known: zeros of the checkpoint's tensors, where they were counted already.
    """
    found = {}
    for matrix in structure.matrices:
        unit = binding.unit_of(matrix.name)
        if known is not None and len(unit.names) == 1:
            found[matrix.name] = sum(known[key] for key in unit.keys)
        else:
            found[matrix.name] = int((binding.load([matrix.name], reader)[matrix.name] == 0).sum())
    return found


def _format_of(reader: CheckpointReader, key: str) -> str:
    """The number format of a tensor, or how it is packed."""
    if isinstance(reader, UnpackedReader) and key in reader.packed:
        entry = reader.header.matrices[key.removesuffix(".weight")]
        return f"{entry.kind} of {entry.bits} bits"
    return str(reader.info(key).dtype).removeprefix("torch.")


def _check_own_result(folder: Path, reporter: Reporter) -> None:
    path = folder / RESULT_FILE
    if not path.is_file():
        return
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["shards"]
    except (ValueError, KeyError, TypeError, OSError):
        reporter.warn(f"{path} cannot be read: the weights were not compared with it")
        return
    check_shards(folder, shards)
    reporter.note(f"the weights are those that {RESULT_FILE} describes")
