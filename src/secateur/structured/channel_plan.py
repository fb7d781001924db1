"""Plans the removal of hidden channels: finds the config, what is cut, who reads the residual stream, and proves it.

The config entry is found by trying: a smaller model whose tensors differ only in dimensions that had all channels and
now have fewer is the right one, and these dimensions are those along which tensors are cut; units of blocks may go
along (`secateur.structured.together`). Then the whole model, with every slice that goes at zero, and the smaller one
must give the same output on random weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import transformers
from torch import Tensor, nn

from secateur.checkpoint.reader import CheckpointReader
from secateur.engine.binding import Binding
from secateur.engine.blocks import Structure
from secateur.errors import UnsupportedModelError
from secateur.structured.channel_config import refuse_both_sides, smaller
from secateur.structured.channel_norms import gain_of
from secateur.structured.channel_proof import prove_channels
from secateur.structured.channel_readers import find_readers
from secateur.structured.channels import Channels, Group, Reader
from secateur.structured.configure import ANOTHER_STRUCTURE, shapes_of
from secateur.structured.couplings import Kind
from secateur.structured.plan import couplings_of_blocks
from secateur.structured.stream import Job, bias_of
from secateur.structured.together import Together, find_together


def plan_channels(
    config: transformers.PreTrainedConfig, model: transformers.PreTrainedModel, structure: Structure, binding: Binding,
    reader: CheckpointReader, sparsity: float, round_to: int,
) -> Channels:  # fmt: skip
    """Decide how many channels stay, find the config for it, and prove that the others can be removed.

    Args:
        config: as it was read, unchanged.
        sparsity: share of all prunable weights that goes.
        round_to: channels that stay are a multiple of this, or of a half, a quarter ... of it where the config allows
            no such number near.

    Raises:
        UnsupportedModelError: when the model has no such channels or cannot do without some of them.
        SparsityError: when the request comes to nothing, leaves nothing, or to a number that the config refuses.
    """
    before = _width(model)
    old = shapes_of(model)
    total = sum(matrix.size for matrix in structure.matrices)
    wanted = before * (1 - sparsity)
    after, step, shrunk, cuts = smaller(config, model, old, before, wanted, round_to)
    each = sum(matrix.size for matrix in structure.matrices if matrix.name in cuts) / before
    if abs(before - sparsity * total / each - wanted) > 0.5:  # not every matrix touches the residual stream
        wanted = before - sparsity * total / each
        after, step, shrunk, cuts = smaller(config, model, old, before, wanted, round_to)
    refuse_both_sides(structure, cuts)
    made = Channels(before, after, step, shrunk, cuts, {}, {}, {})
    return _proved(made, model, structure, binding, reader)


def plan_channels_with_units(
    config: transformers.PreTrainedConfig, model: transformers.PreTrainedModel, structure: Structure, binding: Binding,
    reader: CheckpointReader, kind: Kind, sparsity: float,
) -> Channels:  # fmt: skip
    """Decide how many heads and in proportion channels stay, find the config, and prove that the others can be removed.

    Args:
        config: as it was read, unchanged.
        kind: heads, or key-value groups with all their query heads.
        sparsity: share of all prunable weights that goes.

    Raises:
        UnsupportedModelError: when the model has no such units, or cannot do without some of them and of the channels.
        SparsityError: when the request comes to nothing, or leaves nothing.
    """
    every = couplings_of_blocks(model, structure, binding, reader)
    found = find_together(config, model, structure, every, kind, sparsity)
    try:
        return _proved(_channels(found, structure), model, structure, binding, reader)
    except UnsupportedModelError:
        other = found.otherwise()
        if other is None:
            raise
    return _proved(_channels(other, structure), model, structure, binding, reader)


def _channels(found: Together, structure: Structure) -> Channels:
    return Channels(
        found.before, found.after, found.step, found.shrunk, found.cuts, {}, {}, {}, joint=found.joint,
        jobs={
            block.index: [job for job in found.jobs if job.coupling.consumer.startswith(f"{block.name}.")]
            for block in structure.blocks
        },
    )  # fmt: skip


def _proved(
    made: Channels, model: transformers.PreTrainedModel, structure: Structure, binding: Binding,
    reader: CheckpointReader,
) -> Channels:  # fmt: skip
    """The plan with what hangs on the channels, tried on random weights."""
    _look_at_modules(made, model)
    made.groups, made.loose = find_readers(made, model, structure, binding, reader)
    _refuse_unseen(made, structure)
    for block in structure.blocks:
        owners = {matrix.name: matrix.module for matrix in block.matrices}
        made.groups.setdefault(block.index, []).extend(
            _consumer(job, owners, block.tensors) for job in made.jobs.get(block.index, ())
        )
    prove_channels(made, model, structure, binding, reader)
    return made


def _refuse_unseen(channels: Channels, structure: Structure) -> None:
    """Refuse to cut both sides of a matrix that no forward has shown to read and write the residual stream.

    One that no token came to may as well give heads, which the proof could not tell.
    """
    read = {one.name for groups in channels.groups.values() for group in groups for one in group.readers}
    for matrix in structure.matrices:
        if len(channels.cuts.get(matrix.name, ())) > 1 and matrix.name not in read:
            raise UnsupportedModelError(
                f"{matrix.name} becomes narrower on both sides, and no token of a short input came to it, so what it "
                "gives is not known",
                hint=ANOTHER_STRUCTURE,
            )


def _consumer(job: Job, owners: Mapping[str, str], tensors: list[str]) -> Group:
    """The matrix that reads units which go along."""
    cut, bias = job.coupling.cuts[0], bias_of(job.coupling)
    return Group(owners[cut.name], (Reader(cut.name, cut.dim, bias if bias in tensors else None),), job)


def _width(model: transformers.PreTrainedModel) -> int:
    embedding = model.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    if not isinstance(embedding, nn.Embedding) or not isinstance(weight, Tensor):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no table of embeddings, so its residual stream is not known",
            hint=ANOTHER_STRUCTURE,
        )
    return int(weight.shape[1])


def _look_at_modules(channels: Channels, model: transformers.PreTrainedModel) -> None:
    """Find the norms over the channels, and what embeddings are multiplied with."""
    small, keep = channels.shrunk.skeleton, channels.spread()
    owners: dict[str, None] = dict.fromkeys(name.rpartition(".")[0] for name in channels.cuts)
    for owner in owners:
        whole, cut = model.get_submodule(owner), small.get_submodule(owner)
        own = {leaf for leaf, _ in whole.named_parameters(recurse=False) if f"{owner}.{leaf}" in channels.cuts}
        if isinstance(whole, nn.Embedding):
            channels.embeddings[f"{owner}.weight"] = _embedding_factor(whole, cut, keep)
        elif own and all(whole.get_parameter(leaf).ndim == 1 for leaf in own) and not list(whole.children()):
            # A vector of a larger module is taken to be added or multiplied with; the proof shows whether it is.
            gain = gain_of(whole, cut, owner, keep)
            if gain is not None:
                leaf, found = gain
                channels.gains[f"{owner}.{leaf}"] = found


def _embedding_factor(whole: nn.Module, small: nn.Module, keep: Tensor) -> float:
    shape = whole.get_parameter("weight").shape
    weight = torch.randn(shape[0], shape[1], generator=torch.Generator().manual_seed(0))
    ids = torch.arange(min(4, shape[0]))[None]
    try:
        wide: Tensor = torch.func.functional_call(whole, {"weight": weight}, (ids,))[..., keep]
        narrow: Tensor = torch.func.functional_call(small, {"weight": weight[:, keep]}, (ids,))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return 1.0  # it wants other arguments than numbers of rows; the proof shows whether there is a factor
    factor = float((wide * narrow).sum() / narrow.square().sum().clamp_min(1e-30))
    return 1.0 if abs(factor - 1) < 1e-6 else factor
