"""The proof of a folder in the sparse format or torchao's: fresh processes open it and its source, and both answer.

What the file holds was compared number by number before; here it is seen that transformers loads it and computes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file

from secateur.checkpoint.source import Source
from secateur.engine.forward import probe_inputs
from secateur.engine.skeleton import build_skeleton
from secateur.errors import SecateurError, VerificationError
from secateur.formats.sparse import SparsePlan
from secateur.formats.torchao import TorchAOPlan
from secateur.measure.compare import Worker
from secateur.progress import Reporter
from secateur.runtime.kernels import ACTIVATIONS

TOLERANCE = 1e-3
"""Largest difference of an output, as a share of the largest output, where no number was rounded."""


def prove_sparse(plan: SparsePlan | TorchAOPlan, folder: Path, source: Source, reporter: Reporter) -> dict[str, Any]:
    """Compare the outputs of both, in float32.

    Raises:
        VerificationError: when the folder cannot be opened, or answers differently although nothing was rounded.
    """
    size = 2 * sum(path.stat().st_size for path in source.folder.glob("*.safetensors"))
    if size > psutil.virtual_memory().available:
        reporter.note("the model does not fit in memory: what the file holds was compared, but it was not run")
        return {}
    reporter.stage("run", 2)
    answers = []
    with tempfile.TemporaryDirectory() as scratch:
        given, out = Path(scratch) / "inputs.safetensors", Path(scratch) / "outputs.safetensors"
        save_file(probe_inputs(build_skeleton(source.folder)), given)
        for one in (source.folder, folder):
            try:
                # The kernels round activations, which says nothing of the file.
                with Worker(one, dtype="float32", environment={ACTIVATIONS: "float"}) as worker:
                    worker.ask("logits", inputs=str(given), out=str(out))
            except SecateurError as error:
                raise VerificationError(f"{one} cannot be opened: {error.message}", hint=error.hint) from error
            found = load_file(out)
            name = next(name for name in ("logits", "last_hidden_state", *found) if name in found)
            answers.append(found[name].float())
            reporter.advance()
    dense, sparse = answers
    if dense.shape != sparse.shape or not bool(torch.isfinite(sparse).all()):
        raise VerificationError(f"{folder}: outputs are not finite, or of another shape than those of the source")
    difference = float((dense - sparse).abs().max()) / (float(dense.abs().max()) or 1.0)
    if not plan.rounds and not difference <= TOLERANCE:
        raise VerificationError(
            f"{folder}: the packed model answers differently, by {difference:.2g} of the largest output",
            hint="please report this: the file holds the numbers of the source",
        )
    return {"package": "transformers, fresh process", "output_difference": difference}
