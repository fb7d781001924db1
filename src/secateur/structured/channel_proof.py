"""Zero, then remove, for hidden channels: the whole model on random weights against the smaller one."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from secateur.checkpoint.reader import CheckpointReader
from secateur.engine.activations import ActivationStore
from secateur.engine.binding import Binding, TensorReader
from secateur.engine.blocks import Structure, find_structure
from secateur.engine.forward import NoSink, forward_outputs, probe_inputs
from secateur.engine.inputs import output_tensor
from secateur.errors import UnsupportedModelError
from secateur.structured.channel_norms import mean_where_gone
from secateur.structured.channel_readers import find_head
from secateur.structured.channels import Channels, CutBinding
from secateur.structured.configure import ANOTHER_STRUCTURE
from secateur.structured.couplings import Coupling
from secateur.structured.explore import RandomTensors
from secateur.structured.proof import TOLERANCE


class _Trial:
    """A binding's tensors as the proof wants them."""

    def __init__(self, binding: Binding, change: Callable[[str, Tensor], Tensor]) -> None:
        self._binding, self._change = binding, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._binding, name)

    def load(self, names: Sequence[str], reader: TensorReader) -> dict[str, Tensor]:
        return {name: self._change(name, tensor) for name, tensor in self._binding.load(names, reader).items()}


def prove_channels(
    channels: Channels, model: transformers.PreTrainedModel, structure: Structure, binding: Binding,
    reader: CheckpointReader,
) -> None:  # fmt: skip
    """Channels and units at zero, and channels and units removed, by a forward through the whole model.

    Every block keeps other units. Where the outputs differ then, blocks may share something that has a number for each
    unit (position biases that the first one makes): it is tried once more with the same units in all, and noted.

    Raises:
        UnsupportedModelError: when the outputs are not the same.
    """
    if channels.jobs and not channels.joint:
        try:
            _prove(channels, model, structure, binding, reader)
        except UnsupportedModelError:
            channels.joint, channels.answer = True, 1.0
        else:
            return
    _prove(channels, model, structure, binding, reader)


def _prove(
    channels: Channels, model: transformers.PreTrainedModel, structure: Structure, binding: Binding,
    reader: CheckpointReader,
) -> None:  # fmt: skip
    keep, units, small = channels.spread(), channels.spread_units(), channels.shrunk.skeleton
    gone = torch.ones(channels.before, dtype=torch.bool)
    gone[keep] = False
    scales = {name: gain.unit * (channels.before / channels.after) ** 0.5 for name, gain in channels.gains.items()}
    bound: dict[str, list[Coupling]] = {}
    for job in channels.every_job():
        for one in {cut.name for cut in job.coupling.cuts}:
            bound.setdefault(one, []).append(job.coupling)
    what = "hidden channels" + (" and the units that go along" if bound else "")

    def louder(name: str, tensor: Tensor) -> Tensor:
        # An epsilon in a norm, which counts for more where all channels are divided by, must not matter.
        return tensor * channels.before**0.5 if name in channels.embeddings else tensor

    def zeroed(name: str, tensor: Tensor) -> Tensor:
        made = louder(own(name), tensor.clone())
        for dim in channels.cuts.get(name, ()):
            made.index_fill_(dim, gone.nonzero().squeeze(1), 0.0)
        for coupling in bound.get(name, ()):
            made = _silenced(name, made, coupling, units[coupling.consumer])
        return made

    def smaller_still(name: str, tensor: Tensor) -> Tensor:
        made = louder(own(name), tensor)
        for coupling in bound.get(name, ()):
            made = _raised(name, made, coupling, units[coupling.consumer])
        return made

    smaller = CutBinding(small, reader.keys, binding, channels, keep, scales, units)
    own = smaller.own_name
    source = RandomTensors(reader)
    probe = probe_inputs(model, tokens=12)
    centred = _centred_norms(channels, keep, units)
    with find_head(channels, model, structure, binding), _norms_see_what_stays(model, centred):
        expected = _answer(model, structure, _Trial(binding, zeroed), source, probe)
    cut = _Trial(smaller, smaller_still)
    for _ in range(4):
        try:
            found = _answer(small, find_structure(small), cut, source, probe)
        except (RuntimeError, ValueError, IndexError) as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be run with fewer {what}: {str(error).splitlines()[0]}",
                hint=ANOTHER_STRUCTURE,
            ) from error
        if (expected.shape[-1], found.shape[-1]) == (channels.before, channels.after):
            expected = expected[..., keep]
        if found.shape != expected.shape:
            break
        channels.difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        if channels.difference <= TOLERANCE:
            return
        ratio = float((found * expected).sum() / found.square().sum().clamp_min(1e-30))
        if channels.final is None or not 1e-3 < ratio < 1e3:
            break
        channels.answer *= ratio
    raise UnsupportedModelError(
        f"{type(model).__name__} computes something else without {what} than with them at zero, by "
        f"{channels.difference:.2g}",
        hint=ANOTHER_STRUCTURE,
    )


def _silenced(name: str, tensor: Tensor, coupling: Coupling, units: Tensor) -> Tensor:
    """A tensor with zeros for the units that go: in the consumer's columns, and in what norms over all units see."""
    seen = {coupling.consumer, *(fed for norm in coupling.norms for fed in norm.fed_by)}
    gone = torch.ones(coupling.units, dtype=torch.bool)
    gone[units] = False
    for cut in coupling.cuts:
        if cut.name == name and name in seen:
            tensor.index_fill_(cut.dim, cut.indices[gone].reshape(-1), 0.0)
    return tensor


def _raised(name: str, tensor: Tensor, coupling: Coupling, units: Tensor) -> Tensor:
    """The weight of a norm over the units that stay, for the others being zero: they are in the mean no more."""
    over = any(name == norm.weight for norm in coupling.norms)
    return tensor * (coupling.units / len(units)) ** 0.5 if over else tensor


def _centred_norms(channels: Channels, keep: Tensor, units: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Norms that subtract a mean, and what they see that stays: channels, or the numbers of units."""
    found = {gain.module: keep for gain in channels.gains.values() if gain.centred}
    for job in channels.every_job():
        for norm in (norm for norm in job.coupling.norms if norm.centred):
            rows = next(cut for cut in job.coupling.cuts if cut.name == norm.weight)
            found[norm.module] = rows.keep(units[job.coupling.consumer], rows.indices.numel())
    return found


@contextmanager
def _norms_see_what_stays(model: transformers.PreTrainedModel, centred: Mapping[str, Tensor]) -> Iterator[None]:
    """While it lasts, norms that subtract a mean get what goes at the mean of what stays."""
    handles = [
        model.get_submodule(path).register_forward_pre_hook(mean_where_gone(stays), with_kwargs=True)
        for path, stays in centred.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _answer(
    model: transformers.PreTrainedModel, structure: Structure, binding: Any, source: RandomTensors,
    probe: Mapping[str, Tensor],
) -> Tensor:  # fmt: skip
    found: list[Tensor] = []

    def take(index: int, output: Any) -> float:
        found.append(output_tensor(output).float())
        return 0.0

    store = ActivationStore(None, Path(tempfile.gettempdir()))
    forward_outputs(model, structure, binding, source, NoSink(source), store, [copy.copy(dict(probe))], take)
    return found[0]
