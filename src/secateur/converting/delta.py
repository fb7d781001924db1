"""A fine-tuned model as its difference from the base: a folder with the difference alone, and how it is applied.

``delta.safetensors`` holds, for each matrix of the base under its checkpoint key, ``KEY.up`` (out, k) and ``KEY.down``
(k, in), whose product is added to the matrix; and under ``KEY`` itself every other tensor that differs, whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.checkpoint.folder import copy_side_files
from secateur.checkpoint.ledger import LEDGER, Ledger
from secateur.checkpoint.writer import CheckpointWriter, hash_file, layout_like
from secateur.converting.fused import FuseWork
from secateur.converting.opened import Converted, Opened
from secateur.converting.output import write_config
from secateur.engine.forward import probe_inputs, stream_forward
from secateur.errors import CheckpointError, SourceError
from secateur.progress import Reporter
from secateur.result import RESULT_FILE, ConvertedMatrix

DELTA = "delta.safetensors"
_HINT = "give the folder that `secateur convert BASE --to fused --models MODEL --format delta` wrote"


def write_delta(work: FuseWork, partial: Path, reporter: Reporter) -> tuple[dict[str, str], list[ConvertedMatrix]]:
    """Write the difference of one model; returns the sha256 of the file by its name, and the matrices.

    The differences are held in memory until they are written: they are what is small.
    """
    opened = work.opened
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    reporter.stage("writing the difference", len(work.by_name))
    for one in work.by_name.values():
        dtype = opened.dtype or opened.reader.info(one.key).dtype
        made, errors[one.name] = work.tensors_of(one)
        tensors[f"{one.key}.up"] = made["up"][0].to(dtype).contiguous()
        tensors[f"{one.key}.down"] = made["down"][0].to(dtype).contiguous()
        bias = one.module + ".bias"
        if bias in work.differing:
            tensors[opened.binding.unit_of(bias).keys[0]] = work.members[0].tensor(bias).contiguous()
        reporter.advance(one.name)
    for name in work.rest if work.conversion.origin_of_rest == "model" else []:
        tensors[work._keys(name)[0]] = work.other(name).contiguous()
    save_file(tensors, partial / DELTA, metadata={"format": "pt", "base_sha256": opened.digest})
    return {DELTA: hash_file(partial / DELTA)}, work.rows(errors)


@dataclass
class ApplyWork:
    """A delta that fits a base; the result is an ordinary folder of the base's architecture."""

    opened: Opened
    tensors: dict[str, Tensor]
    nbytes: int
    parameters: tuple[int, int]
    models: list[dict[str, Any]]

    def write(self, partial: Path, fingerprint: dict[str, Any], resume: bool, reporter: Reporter) -> Converted:
        """Write the base with the difference added."""
        opened, reader = self.opened, self.opened.reader
        Ledger.begin(partial / LEDGER, fingerprint, resume=resume)
        reporter.stage("applying the difference", len(reader.keys))
        rows, touched = [], set()
        names = {opened.binding.unit_of(spec.name).keys[0]: spec for spec in opened.specs.values()}
        with CheckpointWriter(partial, layout_like(reader, opened.dtype)) as writer:
            for key in reader.keys:
                dtype = opened.dtype or reader.info(key).dtype
                if f"{key}.up" in self.tensors:
                    added = self.tensors[f"{key}.up"].float() @ self.tensors[f"{key}.down"].float()
                    spec = names[key]
                    added = added.t() if spec.transposed else added
                    writer.write(key, (reader.tensor(key).float() + added).to(dtype))
                    rank = self.tensors[f"{key}.up"].shape[1]
                    rows.append(ConvertedMatrix(spec.name, spec.shape, "dense", spec.size, rank))
                    touched.add(key)
                elif key in self.tensors:
                    writer.write(key, self.tensors[key].to(dtype))
                    touched.add(key)
                else:
                    writer.copy(reader, key)
                reporter.advance(key)
            shards = writer.finish()
        copy_side_files(opened.source.folder, partial)
        write_config(partial, opened, None)
        probe = probe_inputs(opened.model)
        return Converted(
            spec=None,
            matrices=rows,
            shards=shards,
            probe=probe,
            answer=stream_forward(partial, probe),
            prunable=opened.prunable(),
            renamed={key: key for key in reader.keys if key not in touched},
            told=[f"The difference is added to {len(rows)} matrices and replaces {len(touched) - len(rows)} tensors: "
                  "an ordinary model of the base's architecture."],
        )  # fmt: skip


def read_delta(folder: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Tensors of a delta, and its result file.

    Raises:
        SourceError: when the folder is none.
        CheckpointError: when it cannot be read.
    """
    path = folder / DELTA
    if not path.is_file():
        raise SourceError(f"{folder} is no delta: it has no {DELTA}", hint=_HINT)
    try:
        result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        digest, base = result["shards"][DELTA], result["source"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise SourceError(f"{folder} has no {RESULT_FILE} of a delta", hint=_HINT) from None
    if not isinstance(base, str) or hash_file(path) != digest:
        raise CheckpointError(f"{path} is not what was written: its sha256 differs", hint="make or copy it again")
    try:
        return load_file(path), result
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", hint="make or copy it again") from None


def apply_delta(folder: Path, opened: Opened) -> ApplyWork:
    """Check that a delta belongs to a base.

    Raises:
        SourceError: when it was made from another one.
    """
    tensors, result = read_delta(folder)
    if result["source"]["sha256"] != opened.digest:
        raise SourceError(
            f"{folder} was made from {result['source'].get('name')}, and {opened.source.name} has other weights",
            hint="give the very base that the delta was made from with --base",
        )
    known = {opened.binding.unit_of(name).keys[0]: spec for name, spec in opened.specs.items()}
    for key, tensor in tensors.items():
        stem, _, leaf = key.rpartition(".")
        if leaf in ("up", "down") and stem in known:
            up, down = tensors.get(f"{stem}.up"), tensors.get(f"{stem}.down")
            fits = (
                up is not None and down is not None and up.ndim == down.ndim == 2 and up.shape[1] == down.shape[0]
                and (up.shape[0], down.shape[1]) == (known[stem].out_features, known[stem].in_features)
            )  # fmt: skip
        else:
            fits = key in opened.reader and tuple(tensor.shape) == opened.reader.info(key).shape
        if not fits or not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{folder}: {key} does not fit {opened.source.name}", hint="make the delta again")
    models = [entry for entry in result.get("models", []) if isinstance(entry, dict)]
    layout = layout_like(opened.reader, opened.dtype)
    return ApplyWork(opened, tensors, layout.nbytes, (layout.parameters, layout.parameters), models)
