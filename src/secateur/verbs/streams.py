"""The stream that a pruning run goes through, and what it needs beside a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secateur.engine.activations import ActivationStore
from secateur.engine.blocks import find_structure
from secateur.engine.correct import CorrectingStream
from secateur.engine.forward import Stored
from secateur.engine.permute import Permuting
from secateur.engine.reconstruct import CorrectingReconstructingStream, ReconstructingStream, Reconstruction
from secateur.engine.sink import CheckpointSink
from secateur.engine.stream import BlockStream
from secateur.errors import UsageError
from secateur.methods._refitted import name_of
from secateur.plugins import Criterion, ExpertCriterion, Method, build, make_method
from secateur.progress import Reporter
from secateur.recipe import Recipe
from secateur.structured.channel_stream import ChannelStream, Whole
from secateur.structured.expert_stream import ExpertStream
from secateur.structured.reconstruct import ReconstructingUnitStream
from secateur.structured.stream import UnitStream

if TYPE_CHECKING:
    from secateur.verbs.job import Job


def make_stream(job: Job, sink: CheckpointSink, store: ActivationStore, reporter: Reporter) -> BlockStream:
    """The stream that does what a job asks for."""
    if isinstance(job.method, Method):
        return _weights(job, job.method, sink, store, reporter)
    if job.shape.experts is not None:
        assert isinstance(job.method, ExpertCriterion)
        return ExpertStream(
            job.model, job.structure, job.binding, job.reader, sink, make_method("magnitude"), job.plan, store,
            job.device, job.compute, job.recipe.seed, reporter, experts=job.shape.experts, criterion=job.method,
        )  # fmt: skip
    width, hidden = job.shape.width, job.shape.hidden
    if hidden is not None:
        small, keep = hidden.shrunk.skeleton, job.choices.keep
        assert keep is not None
        return ChannelStream(
            small, find_structure(small), job.cut_binding(), job.reader, sink, make_method("magnitude"), job.plan,
            store, job.device, job.compute, job.recipe.seed, reporter, channels=hidden, keep=keep,
            units=job.choices.units, update=job.recipe.update,
            whole=Whole(job.model, job.structure, job.binding, Stored(job.reader)),
        )  # fmt: skip
    jobs = width.jobs if width is not None else {}
    criterion = job.method if isinstance(job.method, Criterion) else None  # at sparsity 0 nothing is chosen
    common: dict[str, Any] = {
        "model": job.model, "structure": job.structure, "binding": job.binding, "source": job.reader, "sink": sink,
        "method": make_method("magnitude"), "plan": job.plan, "store": store, "device": job.device,
        "compute_dtype": job.compute, "seed": job.recipe.seed, "reporter": reporter,
        "jobs": jobs, "criterion": criterion, "update": job.recipe.update, "saliences": job.choices.saliences,
    }  # fmt: skip
    trained = reconstruction(job.recipe)
    if trained is None:
        return UnitStream(**common)
    halves = job.recipe.reconstruct == "half-block"
    return ReconstructingUnitStream(**common, teacher=job.reader, reconstruction=trained, halves=halves)


@dataclass
class PermutingStream(Permuting):
    """A pruning stream that puts inputs in another order first."""


@dataclass
class PermutingCorrectingStream(Permuting, CorrectingStream):
    """The same, correcting errors matrix by matrix."""


@dataclass
class PermutingReconstructingStream(Permuting, ReconstructingStream):
    """The same, reconstructing blocks."""


@dataclass
class PermutingCorrectingReconstructingStream(Permuting, CorrectingReconstructingStream):
    """The same, with both."""


def _weights(job: Job, method: Method, sink: CheckpointSink, store: ActivationStore, reporter: Reporter) -> BlockStream:
    """The stream that prunes single weights."""
    common: dict[str, Any] = {
        "model": job.model, "structure": job.structure, "binding": job.binding, "source": job.reader, "sink": sink,
        "method": method, "plan": job.plan, "store": store, "device": job.device, "compute_dtype": job.compute,
        "seed": job.recipe.seed, "reporter": reporter,
    }  # fmt: skip
    share, trained = job.recipe.correction, reconstruction(job.recipe)
    permuting, correcting = bool(job.free), share != "off"
    if permuting:
        common |= {"free": job.free}
    if correcting:
        common |= {"beta": share if isinstance(share, float) else None}
    if correcting or trained is not None:
        common |= {"teacher": job.reader}
    if trained is not None:
        common |= {"reconstruction": trained, "halves": job.recipe.reconstruct == "half-block"}
    return _STREAMS[permuting, correcting, trained is not None](**common)


_STREAMS: dict[tuple[bool, bool, bool], type[BlockStream]] = {
    (False, False, False): BlockStream,
    (False, True, False): CorrectingStream,
    (False, False, True): ReconstructingStream,
    (False, True, True): CorrectingReconstructingStream,
    (True, False, False): PermutingStream,
    (True, True, False): PermutingCorrectingStream,
    (True, False, True): PermutingReconstructingStream,
    (True, True, True): PermutingCorrectingReconstructingStream,
}
"""By what a stream does: permute, correct, reconstruct."""


def reconstruction(recipe: Recipe) -> Reconstruction | None:
    """How blocks are reconstructed; None when they are not.

    Raises:
        UnknownNameError: for an unknown option.
        UsageError: for an option with a value that makes no sense.
    """
    if recipe.reconstruct == "none":
        return None
    made: Reconstruction = build(Reconstruction, recipe.reconstruct_options, "--reconstruct")
    return made


def check_reconstruction(recipe: Recipe, batches: int) -> None:
    """Refuse to reconstruct blocks by data of which nothing can be held out.

    Raises:
        UsageError: saying what it needs.
    """
    if recipe.reconstruct != "none" and batches < 2:
        raise UsageError(
            f"--reconstruct needs at least 2 calibration batches, one of them to be held out; there is {batches}",
            hint="use more --samples: windows are put together up to 1,024 tokens",
        )


def check_correction(recipe: Recipe, method: Method) -> None:
    """Refuse an error correction that would have nothing to go by.

    Raises:
        UsageError: saying what it needs.
    """
    if recipe.correction != "off" and method.statistics != "gram":
        raise UsageError(
            f"--error-correction needs the Gram matrix of the inputs, which {name_of(method)} does not gather",
            hint="add --refit, or use --method sparsegpt, admm or alps",
        )
