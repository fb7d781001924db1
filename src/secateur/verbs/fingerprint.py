"""What must be the same for an interrupted run to be resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from secateur.checkpoint.source import Source
from secateur.engine.sink import tensor_digest
from secateur.verbs.provenance import versions

if TYPE_CHECKING:
    from secateur.verbs.job import Job


def fingerprint(job: Job) -> dict[str, Any]:
    """What must be the same for a run to be resumed: everything that changes a byte of the result."""
    recipe = job.recipe.to_dict() | {"method_options": job.method_options}
    recipe.pop("activation_memory")
    return {
        "recipe": recipe,
        "blocks": job.shape.depth.kept if job.shape.depth else None,
        "channels": job.choices.keep.tolist() if job.choices.keep is not None else None,
        "units": {name: units.tolist() for name, units in job.choices.units.items()},
        "allocation": {name: target.sparsity for name, target in job.plan.targets.items()},
        "split": job.shape.split.record if job.shape.split else None,
        "source_sha256": job.source_hash,
        "calibration": job.calibration.protocol,
        "calibration_sha256": digest_of(job.calibration.batches),
        "config_sha256": config_digest(job.source),
        "device": str(job.device),
        "compute_dtype": str(job.compute),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def config_digest(source: Source) -> str:
    """Hex sha256 of the source's config.json."""
    return hashlib.sha256((source.folder / "config.json").read_bytes()).hexdigest()


def digest_of(batches: Sequence[Mapping[str, torch.Tensor]]) -> str:
    """Hex sha256 of all calibration inputs: the same text, cut by the same tokenizer."""
    digests = [f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:{tensor_digest(tensor.cpu())}" for batch in batches
               for name, tensor in sorted(batch.items())]  # fmt: skip
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
