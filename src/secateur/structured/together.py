"""Hidden channels and the units that are bound to them: the config of a model with fewer of both.

Many configs know no size of a head: it is the hidden size by the number of heads. There fewer heads of the same size
can be said together with fewer hidden channels, in proportion. Neurons that are a multiple of the hidden size go along.

As everywhere, entries are tried. A smaller model is the right one when each of its tensors differs only in dimensions
that had all channels and now have fewer, or that the units of a coupling lie along; the proof on numbers comes later.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
import transformers

from secateur.engine.blocks import Structure
from secateur.engine.entries import Entries, changed, entries_of, part_of
from secateur.engine.skeleton import model_class, skeleton_of
from secateur.errors import SparsityError, UnsupportedModelError
from secateur.structured.configure import Shapes, Shrunk, noun, shapes_of
from secateur.structured.couplings import Coupling, Cut, Kind
from secateur.structured.stream import Job

Path = tuple[str, ...]
_TRIED = 3
"""Numbers of heads for which no entries are found, after which the config is taken to have none."""
_WIDTH = ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "width")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_NO_WIDTH = ("head", "vocab", "position", "token", "window", "layers", "image", "label", "patch")


@dataclass
class Together:
    """A smaller model with fewer hidden channels and fewer units, and what is cut."""

    before: int
    after: int
    step: int
    shrunk: Shrunk
    cuts: dict[str, tuple[int, ...]]
    """Tensor -> the dimensions along which it loses hidden channels."""
    jobs: list[Job]
    """Units that go along, with all that is cut with them."""
    joint: bool
    """Whether something outside the blocks has a number for each unit, so that all blocks must keep the same."""
    doubtful: list[str] = field(default_factory=list)
    """Vectors of larger modules that are taken to lie along the channels, and that may as well lie along units."""

    def otherwise(self) -> Together | None:
        """The same with the doubtful vectors along units; None where there are none."""
        if not self.doubtful:
            return None
        cuts = {name: dims for name, dims in self.cuts.items() if name not in self.doubtful}
        extra: dict[str, list[Cut]] = {}
        for name in self.doubtful:
            found = _unit_of_each(name, self.before, self.after, _attentions(self.jobs), matrix=False)
            assert found is not None
            indices = torch.arange(self.before).reshape(found[0].coupling.units, -1)
            extra.setdefault(found[0].coupling.consumer, []).append(Cut(name, 0, indices))
        jobs = [_longer(job, extra.get(job.coupling.consumer, [])) for job in self.jobs]
        return dataclasses.replace(self, cuts=cuts, jobs=jobs, doubtful=[])


def asked_couplings(every: Mapping[int, Sequence[Coupling]], kind: Kind) -> list[Coupling]:
    """The attentions whose units are to go: groups, or query heads; where these are the same, heads mean both.

    Raises:
        UnsupportedModelError: when there are none.
    """
    found: list[Coupling] = []
    for couplings in every.values():
        own = [coupling for coupling in couplings if coupling.kind == kind]
        consumers = {coupling.consumer for coupling in own}
        if kind == "heads":
            own += [c for c in couplings if c.kind == "kv-groups" and c.consumer not in consumers and _alone(c)]
        found += own
    if not found:
        raise UnsupportedModelError(
            f"no block has {noun(kind)} that can be removed",
            hint="choose another --structure; without one, single weights are pruned",
        )
    return found


def _alone(coupling: Coupling) -> bool:
    return coupling.heads is not None and coupling.heads.each == 1


def find_together(
    config: transformers.PreTrainedConfig, model: transformers.PreTrainedModel, structure: Structure,
    every: Mapping[int, Sequence[Coupling]], kind: Kind, sparsity: float,
) -> Together:  # fmt: skip
    """The number of heads, and in proportion the hidden size, that come nearest to a sparsity, and the config for it.

    Args:
        config: as it was read, unchanged.
        every: couplings of all blocks.
        sparsity: share of all prunable weights that is to go.

    Raises:
        UnsupportedModelError: when no entries of the config say fewer heads and channels and nothing else.
        SparsityError: when the request comes to nothing, or leaves nothing.
    """
    asked = asked_couplings(every, kind)
    others = [c for couplings in every.values() for c in couplings if c.kind == "ffn"]
    widths = {matrix.name: matrix.out_features for matrix in structure.matrices}
    counted: dict[int, int] = {}
    for coupling in asked:
        counted[widths[coupling.consumer]] = counted.get(widths[coupling.consumer], 0) + 1
    reason = ""
    for before in sorted(counted, key=lambda width: -counted[width]):
        own = [coupling for coupling in asked if widths[coupling.consumer] == before]
        search = _Search(config, model, structure, own, others, before)
        if (found := search.nearest(sparsity)) is not None:
            return found
        reason = reason or search.reason
    raise UnsupportedModelError(
        f"the config of {model_class(config).__name__} has no entries for fewer {noun(kind)} with fewer hidden channels"
        + (f": {reason}" if reason else ""),
        hint="this structure is bound to other sizes there; another --structure may be free",
    )


class _Search:
    """Looks for configs of one model, for shares of its heads and channels."""

    def __init__(
        self, config: Any, model: transformers.PreTrainedModel, structure: Structure, asked: Sequence[Coupling],
        others: Sequence[Coupling], before: int,
    ) -> None:  # fmt: skip
        self.config, self.asked, self.others, self.before = config, asked, others, before
        self.old = shapes_of(model)
        self.vectors = {
            f"{path}.{leaf}" for path, module in model.named_modules() if list(module.children())
            for leaf, tensor in module.named_parameters(recurse=False) if tensor.ndim == 1
        }  # fmt: skip
        self.sizes = {matrix.name: matrix.size for matrix in structure.matrices}
        self.parts = math.gcd(before, *(coupling.units // coupling.parts for coupling in asked))
        """Units and channels go in steps of one of this many parts."""
        self.reason = ""

    def nearest(self, sparsity: float) -> Together | None:
        """The legal share nearest to a sparsity; None when no share is legal."""
        if self.parts < 2:
            self.reason = "the hidden size and the numbers of heads have no common part that could go"
            return None
        stay = sorted(range(1, self.parts), key=lambda left: abs(1 - left / self.parts - sparsity))
        first = next((made for left in [*stay[:_TRIED], self.parts // 2] if (made := self._with(left))), None)
        if first is None:
            return None
        shares = {left: self._removed(first, Fraction(left, self.parts)) for left in stay}
        if sparsity < min(shares.values()) / 2 or sparsity > (1 + max(shares.values())) / 2:
            raise SparsityError(
                f"{sparsity:.1%} of the weights cannot go: heads go together with hidden channels, and that is "
                f"{min(shares.values()):.1%} to {max(shares.values()):.1%}",
                hint="choose another --sparsity",
            )
        for left in sorted(stay, key=lambda one: abs(shares[one] - sparsity)):
            if (made := self._with(left)) is not None:
                return made
        return first

    def _removed(self, found: Together, share: Fraction) -> float:
        """Share of the prunable weights that would go, were ``share`` of heads and channels left."""
        dims = dict.fromkeys(self.sizes, 0)
        for name, along in found.cuts.items():
            if name in dims:
                dims[name] += len(along)
        for job in found.jobs:
            for name in {cut.name for cut in job.coupling.cuts}.intersection(dims):
                dims[name] += 1
        left = sum(size * float(share) ** dims[name] for name, size in self.sizes.items())
        return 1 - left / sum(self.sizes.values())

    def _with(self, left: int) -> Together | None:
        """The model with ``left`` of all parts."""
        share = Fraction(left, self.parts)
        for changes in _entries(self.config, self.asked, self.others, self.before, share):
            try:
                skeleton = skeleton_of(changed(self.config, changes))
            except Exception:  # noqa: BLE001 - a config may refuse values in any way; then it was not this entry
                continue
            made = self._explained(shapes_of(skeleton), int(self.before * share))
            if isinstance(made, str):
                self.reason = self.reason or made
                continue
            cuts, jobs, joint = made
            step = self.before // self.parts
            after, inside = int(self.before * share), _attentions(jobs)
            doubtful = [
                name for name in cuts if name in self.vectors
                and (found := _unit_of_each(name, self.before, after, inside, matrix=False)) and not found[1]
            ]  # fmt: skip
            return Together(self.before, after, step, Shrunk(skeleton, changes), cuts, jobs, joint, doubtful)
        return None

    def _explained(self, new: Shapes, count: int) -> tuple[dict[str, tuple[int, ...]], list[Job], bool] | str:
        """What is cut along channels and along units; or the reason why a shape cannot be explained so."""
        old = self.old
        if old.keys() != new.keys():
            return "other tensors hang on it"
        jobs: list[Job] = []
        known: set[tuple[str, int]] = set()
        for coupling in [*self.asked, *self.others]:
            lead, each = coupling.cuts[0], coupling.columns.shape[1]
            gone, rest = divmod(old[lead.name][lead.dim] - new[lead.name][lead.dim], each)
            if not gone and not rest:
                continue
            stay = coupling.units - gone
            if rest or coupling.experts or not 0 < stay < coupling.units or stay % coupling.parts:
                return _other_size(lead.name, old, new)
            for cut in coupling.cuts:
                if new[cut.name][cut.dim] != old[cut.name][cut.dim] - gone * cut.indices.shape[1]:
                    return _other_size(cut.name, old, new)
                known.add((cut.name, cut.dim))
            jobs.append(Job(coupling, stay))
        attentions = _attentions(jobs)
        if not attentions:
            return "the heads stay as they are"
        cuts: dict[str, tuple[int, ...]] = {}
        extra: dict[str, list[Cut]] = {}
        joint = False
        for name, shape in old.items():
            if len(shape) != len(new[name]):
                return _other_size(name, old, new)
            for dim, (was, now) in enumerate(zip(shape, new[name], strict=True)):
                if was == now or (name, dim) in known:
                    continue
                if (was, now) == (self.before, count):
                    cuts[name] = (*cuts.get(name, ()), dim)
                    continue
                found = _unit_of_each(name, was, now, attentions, matrix=name in self.sizes)
                if found is None:
                    return _other_size(name, old, new)
                job, outside = found
                joint |= outside
                indices = torch.arange(was).reshape(job.coupling.units, -1)
                extra.setdefault(job.coupling.consumer, []).append(Cut(name, dim, indices))
        if not cuts:
            return "the hidden size stays as it is"
        return cuts, [_longer(job, extra.get(job.coupling.consumer, [])) for job in jobs], joint


def _other_size(name: str, old: Shapes, new: Shapes) -> str:
    was, now = (" x ".join(map(str, shapes[name])) for shapes in (old, new))
    return f"other sizes hang on it in this config: {name}, {was} would be {now}"


def _attentions(jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if job.coupling.heads is not None]


def _longer(job: Job, cuts: Sequence[Cut]) -> Job:
    return Job(dataclasses.replace(job.coupling, cuts=(*job.coupling.cuts, *cuts)), job.stay)


def _unit_of_each(name: str, was: int, now: int, jobs: Sequence[Job], *, matrix: bool) -> tuple[Job, bool] | None:
    """The attention along whose units a tensor became shorter, and whether the tensor lies outside its block.

    It is the one with the longest common path. Matrices never go along: what feeds them is not known.
    """
    parts = name.split(".")
    best: tuple[int, Job] | None = None
    for job in jobs:
        units = job.coupling.units
        if was % units or was // units * job.stay != now:
            continue
        shared = 0
        for ours, theirs in zip(parts, job.coupling.consumer.split("."), strict=False):
            if ours != theirs:
                break
            shared += 1
        if best is None or shared > best[0]:
            best = shared, job
    if best is None or matrix:
        return None
    return best[1], not any(part.isdigit() for part in parts[: best[0]])


# --- entries -------------------------------------------------------------------------------------------------------


def _entries(
    config: Any, asked: Sequence[Coupling], others: Sequence[Coupling], before: int, share: Fraction
) -> Iterator[Entries]:
    """Entries that may say a share of the heads and of the hidden channels, the likeliest first."""
    tried: list[Entries] = []
    kept = {c.units for c in others}
    inner: Entries = {path: max(kept) for path, value in entries_of(config)
                      if value is None and "inner" in path[-1]} if len(kept) == 1 else {}  # fmt: skip
    for widths in _width_paths(config, before):
        for heads in _head_entries(config, asked, share, {path[:-1] for path in widths}):
            base = {**dict.fromkeys(widths, int(before * share)), **heads}
            for extra in [inner, {}] if inner else [{}]:
                if (made := {**base, **extra}) not in tried:
                    tried.append(made)
                    yield made


def _width_paths(config: Any, before: int) -> Iterator[list[Path]]:
    """Entries that may be the hidden size, together."""
    equal = [path for path, value in entries_of(config) if type(value) is int and value == before
             and not any(word in path[-1] for word in _NO_WIDTH)]  # fmt: skip
    part, where = part_of(config)
    main = (*where, dict(getattr(part, "attribute_map", {})).get("hidden_size", "hidden_size"))
    likely = [path for path in equal if path == main or any(path[-1].endswith(word) for word in _WIDTH)]
    inside = list(dict.fromkeys(path[:-1] for path in likely))
    sets = [[path for path in likely if path == main], [path for path in likely if path[:-1] == where], likely]
    sets += [[path for path in likely if path[:-1] == place] for place in inside]
    sets += [[path for path in equal if path[:-1] == where], equal, *([path] for path in equal)]
    made: list[list[Path]] = []
    for paths in sets:
        if paths and paths not in made:
            made.append(paths)
            yield paths


def _head_entries(config: Any, asked: Sequence[Coupling], share: Fraction, parts: set[Path]) -> Iterator[Entries]:
    """Numbers of heads, scaled, in these parts of the config; those of groups where the groups go as well."""
    scaled: set[int] = set()
    shared: set[int] = set()
    for coupling in asked:
        assert coupling.heads is not None
        scaled.add(coupling.heads.query)
        if coupling.kind == "kv-groups":
            shared.add(coupling.heads.groups)
    found: Entries = {}
    for path, value in entries_of(config):
        key = path[-1]
        if "head" not in key or any(word in key for word in ("dim", "size", "ratio")):
            continue
        numbers = shared if "kv" in key or "key_value" in key else scaled
        if type(value) is int and value in numbers:
            found[path] = int(value * share)
        elif isinstance(value, list) and value and all(type(one) is int and one in numbers for one in value):
            found[path] = [int(one * share) for one in value]
    within = {path: value for path, value in found.items() if path[:-1] in parts}
    usual = {path: value for path, value in within.items() if path[-1] in _HEADS or "key_value" in path[-1]}
    for made in (within, usual, found):
        if made:
            yield made
