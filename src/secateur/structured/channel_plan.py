"""Plans the removal of hidden channels: finds the config, what is cut, who reads the residual stream, and proves it.

The config entry is found by trying: a smaller model whose tensors differ only in dimensions that had all channels and
now have fewer is the right one, and these dimensions are those along which tensors are cut. Then the whole model, with
every slice that goes at zero, and the smaller one must give the same output on random weights.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from secateur.checkpoint.reader import CheckpointReader
from secateur.engine.activations import ActivationStore
from secateur.engine.binding import Binding, TensorReader
from secateur.engine.blocks import Structure, find_structure
from secateur.engine.forward import NoSink, forward_outputs, probe_inputs
from secateur.engine.inputs import output_tensor
from secateur.engine.skeleton import model_class, skeleton_of
from secateur.errors import SparsityError, UnsupportedModelError
from secateur.structured.channel_norms import gain_of
from secateur.structured.channel_readers import find_head, find_readers
from secateur.structured.channels import Channels, CutBinding
from secateur.structured.configure import Shapes, Shrunk, shapes_of
from secateur.structured.couplings import heads_of
from secateur.structured.entries import changed, part_of
from secateur.structured.explore import RandomTensors
from secateur.structured.proof import TOLERANCE

HINT = "choose another --structure, such as ffn"


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
    after, step, shrunk, cuts = _smaller(config, model, old, before, wanted, round_to)
    each = sum(matrix.size for matrix in structure.matrices if matrix.name in cuts) / before
    if abs(before - sparsity * total / each - wanted) > 0.5:  # not every matrix touches the residual stream
        wanted = before - sparsity * total / each
        after, step, shrunk, cuts = _smaller(config, model, old, before, wanted, round_to)
    _refuse_both_sides(structure, cuts)
    made = Channels(before, after, step, shrunk, cuts, {}, {}, {})
    _look_at_modules(made, model)
    made.groups, made.loose = find_readers(made, model, structure, binding, reader)
    _prove(made, model, structure, binding, reader)
    return made


def _width(model: transformers.PreTrainedModel) -> int:
    embedding = model.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    if not isinstance(embedding, nn.Embedding) or not isinstance(weight, Tensor):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no table of embeddings, so its residual stream is not known", hint=HINT
        )
    return int(weight.shape[1])


# --- the config ----------------------------------------------------------------------------------------------------


def _smaller(
    config: Any, model: nn.Module, old: Shapes, before: int, wanted: float, round_to: int
) -> tuple[int, int, Shrunk, dict[str, tuple[int, ...]]]:
    """The nearest number of channels that the config can say, the step it is a multiple of, and the model."""
    reasons: dict[str, None] = {}
    tried: set[int] = set()
    for count, step in _widths(before, wanted, round_to):
        if count not in tried:
            tried.add(count)
            found = _search(config, old, before, count, reasons)
            if found is not None:
                return count, step, *found
    name = model_class(config).__name__
    if not tried:
        raise SparsityError(
            f"{wanted:,.1f} of {before:,} hidden channels cannot stay",
            hint=f"at least one of {before:,} goes and one stays; choose another --sparsity",
        )
    near = [] if reasons else _legal_near(config, old, before, wanted, tried)
    if near:
        raise SparsityError(
            f"{wanted:,.1f} of {before:,} hidden channels are not legal in a {type(config).__name__}",
            hint=f"the nearest numbers that are: {', '.join(map(str, near))}; choose another --sparsity",
        )
    reason = next(iter(reasons), "no entry of the config sets the width of its embeddings alone")
    raise UnsupportedModelError(f"{name} cannot have fewer hidden channels: {reason}", hint=HINT)


def _widths(before: int, wanted: float, round_to: int) -> Iterator[tuple[int, int]]:
    """Numbers near the wanted one, with their steps: multiples of ``round_to``, then of its half, and so on."""
    step = round_to
    while step:
        reach = max(step / 2, 0.02 * before)
        first, last = int((wanted - reach) // step), int((wanted + reach) // step) + 1
        near = [number * step for number in range(first, last + 1) if abs(number * step - wanted) <= reach]
        yield from ((count, step) for count in sorted(near, key=lambda n: abs(n - wanted)) if 0 < count < before)
        step = step // 2 if step % 2 == 0 else int(step > 1)


def _legal_near(config: Any, old: Shapes, before: int, wanted: float, tried: set[int]) -> list[int]:
    """The nearest legal numbers below and above."""
    found = []
    for numbers in (range(int(wanted), 0, -1), range(int(wanted) + 1, before)):
        for number in numbers:
            if number not in tried and _search(config, old, before, number, {}) is not None:
                found.append(number)
                break
    return found


def _search(
    config: Any, old: Shapes, before: int, count: int, reasons: dict[str, None]
) -> tuple[Shrunk, dict[str, tuple[int, ...]]] | None:
    part, path = part_of(config)
    for entries in _entries(part, before, count):
        changes = {(*path, key): value for key, value in entries.items()}
        try:
            skeleton = skeleton_of(changed(config, changes))
        except Exception:  # noqa: BLE001 - a config may refuse values in any way; then it was not this entry
            continue
        cuts, reason = _cuts(old, shapes_of(skeleton), before, count)
        embedding = skeleton.get_input_embeddings()
        if embedding is None or tuple(embedding.weight.shape)[1:] != (count,):
            continue  # an entry of the same value that means something else
        if cuts:
            return Shrunk(skeleton, changes), cuts
        reasons[reason] = None
    return None


def _entries(config: Any, before: int, count: int) -> Iterator[dict[str, Any]]:
    """Entries that may set the width, the likeliest first; the size of heads is said beside where it can be."""
    known: dict[str, Any] = config.to_dict()
    real = dict(getattr(config, "attribute_map", {}))
    name, head = real.get("hidden_size", "hidden_size"), real.get("head_dim", "head_dim")
    keys = sorted((key for key, value in known.items() if type(value) is int and value == before and key != head),
                  key=lambda key: key != name)  # fmt: skip
    now = known.get(head)
    sizes = list(
        dict.fromkeys([*([now] if type(now) is int else []), *(heads.size for heads in heads_of(config, before))])
    )
    said = [{head: size} for size in sizes]
    ways = [*said, {}] if head in known or hasattr(config, head) else [{}, *said]
    for extra in ways:
        for key in keys:
            yield {key: count, **extra}
        if len(keys) > 1:
            yield {**dict.fromkeys(keys, count), **extra}


def _cuts(old: Shapes, new: Shapes, before: int, count: int) -> tuple[dict[str, tuple[int, ...]], str]:
    """Tensor -> dimensions that have fewer channels; empty, with the reason, when something else changed as well."""
    if old.keys() != new.keys():
        return {}, "other tensors hang on it"
    cuts = {}
    for name, shape in old.items():
        if new[name] == shape:
            continue
        pairs = list(zip(shape, new[name], strict=False))
        dims = tuple(dim for dim, (a, b) in enumerate(pairs) if a != b)
        if len(shape) != len(new[name]) or any(pairs[dim] != (before, count) for dim in dims):
            sizes = f"{' x '.join(map(str, shape))} would be {' x '.join(map(str, new[name]))}"
            return {}, f"other sizes hang on it in this config: {name}, {sizes}"
        cuts[name] = dims
    return cuts, "" if cuts else "it changes nothing"


def _refuse_both_sides(structure: Structure, cuts: Mapping[str, tuple[int, ...]]) -> None:
    for matrix in structure.matrices:
        if len(cuts.get(matrix.name, ())) > 1:
            raise UnsupportedModelError(
                f"inputs and outputs of {matrix.name} hang on the hidden size together: with fewer hidden channels "
                "this config has smaller heads as well",
                hint=HINT,
            )


# --- modules and proof ---------------------------------------------------------------------------------------------


def _look_at_modules(channels: Channels, model: transformers.PreTrainedModel) -> None:
    """Find the norms over the channels, and what embeddings are multiplied with."""
    small, keep = channels.shrunk.skeleton, channels.spread()
    owners: dict[str, None] = dict.fromkeys(name.rpartition(".")[0] for name in channels.cuts)
    for owner in owners:
        whole, cut = model.get_submodule(owner), small.get_submodule(owner)
        own = {leaf for leaf, _ in whole.named_parameters(recurse=False) if f"{owner}.{leaf}" in channels.cuts}
        if isinstance(whole, nn.Embedding):
            channels.embeddings[f"{owner}.weight"] = _embedding_factor(whole, cut, keep)
        elif own and all(whole.get_parameter(leaf).ndim == 1 for leaf in own):
            gain = gain_of(whole, cut, owner, keep)
            if gain is not None:
                leaf, found = gain
                channels.gains[f"{owner}.{leaf}"] = found


def _embedding_factor(whole: nn.Module, small: nn.Module, keep: Tensor) -> float:
    shape = whole.get_parameter("weight").shape
    weight = torch.randn(shape[0], shape[1], generator=torch.Generator().manual_seed(0))
    ids = torch.arange(min(4, shape[0]))[None]
    wide: Tensor = torch.func.functional_call(whole, {"weight": weight}, (ids,))[..., keep]
    narrow: Tensor = torch.func.functional_call(small, {"weight": weight[:, keep]}, (ids,))
    factor = float((wide * narrow).sum() / narrow.square().sum().clamp_min(1e-30))
    return 1.0 if abs(factor - 1) < 1e-6 else factor


class _Trial:
    """A binding's tensors as the proof wants them."""

    def __init__(self, binding: Binding, change: Callable[[str, Tensor], Tensor]) -> None:
        self._binding, self._change = binding, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._binding, name)

    def load(self, names: Sequence[str], reader: TensorReader) -> dict[str, Tensor]:
        return {name: self._change(name, tensor) for name, tensor in self._binding.load(names, reader).items()}


def _prove(
    channels: Channels, model: transformers.PreTrainedModel, structure: Structure, binding: Binding,
    reader: CheckpointReader,
) -> None:  # fmt: skip
    """Channels at zero, and channels removed, by a forward through the whole model.

    Raises:
        UnsupportedModelError: when the outputs are not the same.
    """
    keep, small = channels.spread(), channels.shrunk.skeleton
    gone = torch.ones(channels.before, dtype=torch.bool)
    gone[keep] = False
    scales = {name: gain.unit * (channels.before / channels.after) ** 0.5 for name, gain in channels.gains.items()}

    def louder(name: str, tensor: Tensor) -> Tensor:
        # An epsilon in a norm, which counts for more where all channels are divided by, must not matter.
        return tensor * (0.3 * channels.before**0.5) if name in channels.embeddings else tensor

    def zeroed(name: str, tensor: Tensor) -> Tensor:
        made = louder(own(name), tensor.clone())
        for dim in channels.cuts.get(name, ()):
            made.index_fill_(dim, gone.nonzero().squeeze(1), 0.0)
        return made

    smaller = CutBinding(small, reader.keys, binding, channels, keep, scales)
    own = smaller.own_name
    source = RandomTensors(reader)
    probe = probe_inputs(model, tokens=12)
    with find_head(channels, model, structure, binding):
        expected = _answer(model, structure, _Trial(binding, zeroed), source, probe)
    if expected.shape[-1] == channels.before and channels.head is None:
        expected = expected[..., keep]
    cut = _Trial(smaller, lambda name, tensor: louder(own(name), tensor))
    for _ in range(4):
        try:
            found = _answer(small, find_structure(small), cut, source, probe)
        except (RuntimeError, ValueError, IndexError) as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be run with fewer hidden channels: {str(error).splitlines()[0]}",
                hint=HINT,
            ) from error
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
        f"{type(model).__name__} computes something else without hidden channels than with them at zero, by "
        f"{channels.difference:.2g}",
        hint=HINT,
    )


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
